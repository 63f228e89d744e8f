"""Processes of a container: how its first one is made, how others join it, and the hooks around it. Acts."""
