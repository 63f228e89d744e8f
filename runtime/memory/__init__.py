"""A container's memory, copied while it runs: which pages changed, their way to another host, and how they come back."""
