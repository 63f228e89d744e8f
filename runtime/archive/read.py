"""Read an archive: ours, podman's or CRI-O's. It is hostile until its digests are verified, and its files always.

Nothing of it is written but regular files of known names below a directory of ours; the rootfs is unpacked as a layer is.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import lzma
import os
import posixpath
import re
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from runtime import files
from runtime.archive import digests, layout
from runtime.archive.layout import Replacement
from runtime.container.bundle import load
from runtime.errors import AlreadyExists, ContainerError, KernelError, NotFound, SpecError
from runtime.image.compression import decompressed
from runtime.image.create import create_bundle, delete_bundle
from runtime.image.unpack import Unpacker
from runtime.linux.const import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS
from runtime.linux.mount import openat2

_DOCUMENTS = {layout.SPEC, layout.CONFIG, layout.DELETED}
_KEPT = {layout.ROOTFS, layout.SHM, *_DOCUMENTS}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]*")
_MAX_DOCUMENT_BYTES = 16 << 20
_COPY_BYTES = 1 << 20


class Import:
    """An archive that has been read and verified: its images in `images`, the rest in a directory that ends with the context.

    The caller destroys `images`: a lazy restore needs them longer.

    Raises: ContainerError; nothing is then left.
    """

    def __init__(self, path: Path, images: Path | None, verify_key: Path | None) -> None:
        self.path = path
        if images is not None and images.is_dir() and any(images.iterdir()):
            raise AlreadyExists(f"--image-path {images}: is not empty", hint="the archive's images are put there")
        with contextlib.ExitStack() as undo:
            try:
                self._work = Path(tempfile.mkdtemp(prefix="ferry-import-"))
                undo.callback(self.close)
                self.images = Path(tempfile.mkdtemp(prefix="ferry-images-")) if images is None else images
                self.images.mkdir(mode=0o700, parents=True, exist_ok=True)
                undo.callback(shutil.rmtree, self.images, ignore_errors=True)
            except OSError as e:
                raise KernelError(f"--import {path}: cannot make a directory for it", e.errno or 0) from e
            signed, signature, found = self._unpack()
            if verify_key is not None:
                digests.verify(signed, signature, verify_key)
            digests.check(signed, found)
            self.has_digests = signed is not None
            self.spec, self.config = self._object(layout.SPEC), self._object(layout.CONFIG)
            undo.pop_all()

    def __enter__(self) -> Import:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        shutil.rmtree(self._work, ignore_errors=True)

    def _unpack(self) -> tuple[bytes | None, bytes | None, dict[str, str]]:
        """Write what is known of an archive; return its digests, their signature, and the digests that were found."""
        found: dict[str, str] = {}
        small: dict[str, bytes] = {}
        try:
            with self.path.open("rb") as raw, tarfile.open(fileobj=decompressed(raw), mode="r|") as tar:
                for entry in tar:
                    name = posixpath.normpath(entry.name)
                    if not entry.isreg():
                        continue  # directories come by themselves; nothing else belongs here
                    if entry.issparse():
                        raise ContainerError(f"{self.path}: {name} is sparse, which no archive's member is")
                    if name in found or name in small:
                        raise ContainerError(f"{self.path}: has {name} twice")
                    stream = tar.extractfile(entry)
                    assert stream is not None
                    if name in (layout.DIGESTS, layout.SIGNATURE):
                        small[name] = _bounded(stream, name)
                    else:
                        found[name] = self._member(name, stream)
        except FileNotFoundError:
            raise NotFound(f"--import {self.path}: no such file") from None
        except (tarfile.TarError, EOFError, ValueError, lzma.LZMAError, zlib.error) as e:
            raise ContainerError(f"--import {self.path}: is no archive, or cut short: {e}") from e
        except OSError as e:
            raise KernelError(f"--import {self.path}: cannot unpack it", e.errno or 5) from e
        except Exception as e:
            # zstandard's error is its own class, and its module need not be there.
            if type(e).__name__ != "ZstdError":
                raise
            raise ContainerError(f"--import {self.path}: is damaged: {e}") from e
        return small.get(layout.DIGESTS), small.get(layout.SIGNATURE), found

    def _member(self, name: str, stream: IO[bytes]) -> str:
        """Write a member to its place, or nowhere when it is none that we know; return its digest."""
        base, _, last = name.rpartition("/")
        target = None
        if name in _KEPT:
            target = self._work / name
        elif base in (layout.IMAGES, layout.VOLUMES) and _NAME.fullmatch(last):
            target = self.images / last if base == layout.IMAGES else self._work / layout.VOLUMES / last
            target.parent.mkdir(mode=0o700, exist_ok=True)
        found = hashlib.sha256()
        with open(os.devnull if target is None else target, "wb", opener=files.owners_alone) as f:
            while data := stream.read(_COPY_BYTES):
                found.update(data)
                f.write(data)
        return f"sha256:{found.hexdigest()}"

    def _object(self, name: str) -> dict[str, Any]:
        document = self._document(name)
        if not isinstance(document, dict):
            raise SpecError(f"{self.path}: {name} is no object")
        return document

    def _document(self, name: str) -> Any:
        try:
            with (self._work / name).open("rb") as f:
                return json.loads(_bounded(f, name))
        except FileNotFoundError:
            raise SpecError(f"{self.path}: has no {name}", hint="is it a checkpoint archive?") from None
        except (ValueError, RecursionError) as e:
            raise SpecError(f"{self.path}: {name} is not JSON: {e}") from e

    @contextlib.contextmanager
    def bundle(self, path: Path, base: Path | None) -> Iterator[None]:
        """Make the container's bundle, on a base image or of the archive's rootfs alone; it is gone again if the block fails.

        A bundle that is there is used as it is, and brought to the files of the archive.

        Raises: ContainerError.
        """
        if (path / "config.json").is_file():
            if base is not None:
                raise AlreadyExists(f"bundle {path} exists", hint="leave --from out, or name another --bundle")
            self._apply(load(path).rootfs)
            yield
            return
        if base is None:
            base = self._work / "empty"
            base.mkdir()
        create_bundle(path, base, reference=None, platform=None, layers=None)
        try:
            self._fill(path)
            yield
        except BaseException:
            with contextlib.suppress(ContainerError, OSError):
                delete_bundle(path)
            raise

    def _fill(self, path: Path) -> None:
        self._apply(path / "rootfs")
        document, replacements = layout.adapt(self.spec, self.config)
        for r in replacements:
            self._replace(path, r)
        files.save_json(path / "config.json", document, 0o644)

    def _replace(self, path: Path, r: Replacement) -> None:
        place = path / r.path
        place.parent.mkdir(exist_ok=True)
        if r.content is not None:
            place.write_text(r.content)
            return
        place.mkdir()
        place.chmod(0o1777 if r.destination == "/dev/shm" else 0o755)
        if r.member is not None and (self._work / r.member).is_file():
            self._unpack_tar(self._work / r.member, place)

    def _apply(self, rootfs: Path) -> None:
        """Bring a rootfs to the files of the archive."""
        self._remove(rootfs)
        if (self._work / layout.ROOTFS).is_file():
            self._unpack_tar(self._work / layout.ROOTFS, rootfs)

    def _remove(self, rootfs: Path) -> None:
        if not (self._work / layout.DELETED).is_file():
            return
        names = self._document(layout.DELETED) or []
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise SpecError(f"{self.path}: {layout.DELETED} is no list of names")
        root = os.open(rootfs, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            for name in names:
                base, last = posixpath.split(posixpath.normpath("/" + name))
                with contextlib.suppress(OSError):
                    parent = openat2(
                        root, "." + base, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS
                    )
                    try:
                        _remove_entry(parent, last)
                    finally:
                        os.close(parent)
        finally:
            os.close(root)

    @staticmethod
    def _unpack_tar(tar: Path, target: Path) -> None:
        unpacker = Unpacker(str(target), layer=False)
        try:
            with tar.open("rb") as f:
                unpacker.apply(f)
        finally:
            unpacker.close()


def _remove_entry(parent: int, name: str) -> None:
    try:
        os.unlink(name, dir_fd=parent)
    except IsADirectoryError:
        shutil.rmtree(name, dir_fd=parent)


def _bounded(stream: IO[bytes], name: str) -> bytes:
    data = stream.read(_MAX_DOCUMENT_BYTES + 1)
    if len(data) > _MAX_DOCUMENT_BYTES:
        raise SpecError(f"{name}: is larger than {_MAX_DOCUMENT_BYTES} bytes")
    return data
