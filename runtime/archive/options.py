"""What `checkpoint` is told of an archive, as a value."""

from __future__ import annotations

from pathlib import Path

from runtime.values import Value


class ArchiveOptions(Value):
    """What `checkpoint --export` is told.

    `image` is the base image that an engine has to put the rootfs on, `runtime` the OCI runtime that it has to restore with.
    """

    path: Path
    runtime: str
    image: str | None = None
    compression: str = "zstd"
    sign_key: Path | None = None
    without_rootfs: bool = False
