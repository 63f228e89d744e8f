"""Write an archive: the rootfs while the container stands still, the images when CRIU has written them."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from runtime.archive import digests, layout, rootfs
from runtime.archive.options import ArchiveOptions
from runtime.container.container import Container
from runtime.container.create import timestamp
from runtime.criu import pagemap
from runtime.criu.checkpoint import checkpoint
from runtime.criu.images import require_parent, tracked, wipe
from runtime.criu.options import CgroupsMode, CheckpointOptions
from runtime.criu.request import DUMP_LOG
from runtime.errors import AlreadyExists, KernelError, Unsupported
from runtime.files import owners_alone
from runtime.values import replace

COMPRESSIONS = ("zstd", "gzip", "none")
_LOGS = {DUMP_LOG, layout.STATS}


def export(
    container: Container, options: CheckpointOptions, archive: ArchiveOptions, *, keep_images: bool, keep_log: bool
) -> dict[str, Any]:
    """Checkpoint a container into an archive; return CRIU's statistics.

    Without `keep_images` the images are in the archive only, without `keep_log` CRIU's log goes with them.

    A container that does not run on is let go of only when the archive is written: with a full disk it runs on.

    Raises: ContainerError; there is no archive then, and the container runs on.
    """
    if archive.image is not None and options.cgroups_mode == CgroupsMode.IGNORE:
        # runc restores a cgroup namespace only of images that know of cgroups.
        options = replace(options, cgroups_mode=CgroupsMode.SOFT)
    if options.parent_path is not None:
        require_parent(options.parent_path)
        if not tracked(options.parent_path):
            # All memory is written then, and what the parent has would be looked for only to be put back.
            options = replace(options, parent_path=None)
    with _Export(container, archive) as e:
        if not keep_images:
            options = replace(options, image_path=e.images, work_path=options.work_path if keep_log else e.images)

        def at_rest() -> None:
            e.capture_rootfs()
            _flatten(options.image_path)
            if not options.leave_running:
                e.write(options.image_path, None)

        stats = checkpoint(container, options, at_rest=at_rest)
        if options.leave_running:
            e.write(options.image_path, options.work_path)
        return stats


def _flatten(images: Path) -> None:
    """An archive is whole by itself."""
    try:
        pagemap.flatten(images)
    except OSError as e:
        raise KernelError(f"cannot bring the images in {images} together", e.errno or 0) from e


class _Export:
    """One container's way into an archive; a context that leaves nothing behind but the finished file."""

    def __init__(self, container: Container, options: ArchiveOptions) -> None:
        if options.path.exists():
            raise AlreadyExists(f"--export {options.path}: exists", hint="name another file, or remove it")
        if options.sign_key is not None:
            digests.sign(b"", options.sign_key)  # a key that is of no use is found out before anything is frozen
        self._container, self._options = container, options
        self._deleted: list[str] = []
        try:
            # Beside the archive: the system's /tmp may be small, and memory.
            self._work = Path(tempfile.mkdtemp(prefix=f".{options.path.name}.", dir=options.path.absolute().parent))
        except OSError as e:
            raise KernelError(f"--export {options.path}: cannot make a directory beside it", e.errno or 0) from e
        self.images = self._work / layout.IMAGES

    def __enter__(self) -> _Export:
        return self

    def __exit__(self, *exc: object) -> None:
        if self.images.is_dir():
            wipe(self.images)
        shutil.rmtree(self._work, ignore_errors=True)

    def capture_rootfs(self) -> None:
        """Archive the rootfs; the container must stand still. Raises: ContainerError."""
        if not self._options.without_rootfs:
            bundle = self._container.bundle()
            only_changes = self._options.image is not None
            target = self._work / layout.ROOTFS
            try:
                self._deleted = rootfs.capture(bundle.path, bundle.rootfs, target, only_changes=only_changes)
            except OSError as e:
                raise KernelError(f"cannot archive {bundle.rootfs} to {self._options.path}", e.errno or errno.EIO) from e

    def write(self, images: Path, stats: Path | None) -> None:
        """Write the archive, with CRIU's statistics from the directory `stats`. Raises: ContainerError; no file is left then."""
        new = self._work / "archive"
        try:
            with open(new, "wb", opener=owners_alone) as file:
                with _compressed(file, self._options.compression) as stream:
                    self._members(_Writer(stream), images, stats)
                os.fsync(file.fileno())
            new.rename(self._options.path)
        except OSError as e:
            raise KernelError(f"cannot write archive {self._options.path}", e.errno or errno.EIO) from e

    def _members(self, writer: _Writer, images: Path, stats: Path | None) -> None:
        state, bundle = self._container.state, self._container.bundle()
        spec = layout.spec_document(bundle.document, str(bundle.rootfs))
        writer.document(layout.SPEC, spec)
        config = layout.config_document(state.id, self._options.image, self._options.runtime, state.created, timestamp(), spec)
        writer.document(layout.CONFIG, config)
        writer.document(layout.NETWORK, None)
        writer.directory(layout.IMAGES)
        for entry in sorted(images.iterdir()):
            if entry.is_file() and not entry.is_symlink() and entry.name not in _LOGS:
                writer.file(f"{layout.IMAGES}/{entry.name}", entry)
        if stats is not None and (stats / layout.STATS).is_file():
            writer.file(layout.STATS, stats / layout.STATS)
        if not self._options.without_rootfs:
            writer.file(layout.ROOTFS, self._work / layout.ROOTFS)
            writer.document(layout.DELETED, self._deleted)
        found = digests.document(writer.digests)
        writer.data(layout.DIGESTS, found)
        if self._options.sign_key is not None:
            writer.data(layout.SIGNATURE, digests.sign(found, self._options.sign_key))
        writer.close()


class _Writer:
    """A tar that remembers the digests of what went in."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._tar = tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT)  # noqa: SIM115
        self.digests: dict[str, str] = {}

    def _add(self, name: str, size: int, content: IO[bytes]) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o600, int(time.time())
        hashed = _Hashing(content)
        self._tar.addfile(info, cast(IO[bytes], hashed))
        self.digests[name] = f"sha256:{hashed.hash.hexdigest()}"

    def directory(self, name: str) -> None:
        info = tarfile.TarInfo(name)
        info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o700, int(time.time())
        self._tar.addfile(info)

    def data(self, name: str, data: bytes) -> None:
        self._add(name, len(data), io.BytesIO(data))

    def document(self, name: str, document: Any) -> None:
        self.data(name, json.dumps(document).encode())

    def file(self, name: str, path: Path) -> None:
        with path.open("rb") as f:
            self._add(name, os.fstat(f.fileno()).st_size, f)

    def close(self) -> None:
        self._tar.close()


class _Hashing:
    def __init__(self, content: IO[bytes]) -> None:
        self._content, self.hash = content, hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._content.read(size)
        self.hash.update(data)
        return data


@contextlib.contextmanager
def _compressed(file: IO[bytes], compression: str) -> Iterator[IO[bytes]]:
    if compression == "none":
        yield file
    elif compression == "gzip":
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1) as stream:
            yield cast(IO[bytes], stream)
    else:
        try:
            import zstandard
        except ImportError:
            raise Unsupported(
                "--compress zstd: its module is not here", hint="pip install zstandard, or --compress gzip"
            ) from None
        with zstandard.ZstdCompressor(level=1).stream_writer(file, closefd=False) as writer:
            yield cast(IO[bytes], writer)
