"""Checkpoint archives: a container's images, its files and its documents in one file, in the layout of podman and CRI-O."""
