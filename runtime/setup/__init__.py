"""How a container's view of the system is built, decided as a list of operations. Pure."""
