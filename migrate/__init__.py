"""Ferry's coordinator: moves a running container to another host over SSH."""

__version__ = "0.1.0"
PROTOCOL = 6
