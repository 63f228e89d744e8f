"""Where a bundle's rootfs comes from: an image in one of its archived forms, a tarball, or a directory.

All give the same: a config document and the layers, each a stream of tar, verified against its digest.
Source: OCI image specification 1.1, image-layout.md, image-index.md, manifest.md; `docker save`'s manifest.json.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import re
import stat
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from runtime.errors import ContainerError, SpecError
from runtime.image.compression import decompressed
from runtime.linux.const import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS
from runtime.linux.mount import openat2
from runtime.values import Value

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MAX_DOCUMENT_BYTES = 16 << 20
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "i686": "386", "armv7l": "arm"}


class Layer(Value):
    """`blob` is its name in the source; `digest` is of what is stored, `diff_id` of the tar in it."""

    blob: str
    digest: str | None
    diff_id: str | None


class Image(Value):
    """An image's config document ({} for a bare rootfs), and its layers from the lowest on."""

    config: dict[str, Any]
    layers: tuple[Layer, ...] = ()


class Blobs(ABC):
    """Named pieces of a source."""

    @abstractmethod
    def open(self, name: str) -> IO[bytes]:
        """Open a piece. Raises: SpecError when it is not there."""

    @abstractmethod
    def has(self, name: str) -> bool: ...

    def document(self, name: str) -> Any:
        """Read a piece that is JSON. Raises: SpecError."""
        with self.open(name) as f:
            data = f.read(_MAX_DOCUMENT_BYTES + 1)
        if len(data) > _MAX_DOCUMENT_BYTES:
            raise SpecError(f"{name}: is larger than {_MAX_DOCUMENT_BYTES} bytes")
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as e:
            raise SpecError(f"{name}: is not JSON: {e}") from e


class DirectoryBlobs(Blobs):
    def __init__(self, path: Path) -> None:
        self._path = path

    def open(self, name: str) -> IO[bytes]:
        """Open a file below the directory: names come from documents that anybody may have written."""
        root = os.open(self._path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = openat2(root, name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, resolve=RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS)
        except OSError as e:
            raise SpecError(f"{self._path / name}: {e.strerror}") from e
        finally:
            os.close(root)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SpecError(f"{self._path / name}: is no file")
        return os.fdopen(fd, "rb")

    def has(self, name: str) -> bool:
        return (self._path / name).is_file()


class ArchiveBlobs(Blobs):
    def __init__(self, path: Path) -> None:
        self._path = path
        self._tar = tarfile.open(path)  # noqa: SIM115 - lives as long as this process
        self._members = {os.path.normpath(m.name): m for m in self._tar if m.isfile() or m.issym() or m.islnk()}

    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(os.path.normpath(name))
        stream = None
        if member is not None:
            with contextlib.suppress(KeyError):  # a link that leads nowhere
                stream = self._tar.extractfile(member)
        if stream is None:
            raise SpecError(f"{self._path}: has no {name}")
        return stream

    def has(self, name: str) -> bool:
        return os.path.normpath(name) in self._members


class Source:
    """An image to be unpacked. Raises: SpecError, ContainerError, naming the file or the digest."""

    def __init__(self, blobs: Blobs, image: Image) -> None:
        self._blobs, self.image = blobs, image

    @contextlib.contextmanager
    def layer(self, layer: Layer) -> Iterator[IO[bytes]]:
        """Give the tar of a layer; at the end both its digests are checked. Raises: ContainerError."""
        with self._blobs.open(layer.blob) as raw:
            stored = Hashed(raw)
            tar = Hashed(decompressed(stored))
            yield cast(IO[bytes], tar)
            tar.drain()
            stored.drain()
        for what, wanted, found in (("digest", layer.digest, stored), ("diff id", layer.diff_id, tar)):
            if wanted is not None and wanted != found.digest():
                raise ContainerError(f"layer {layer.blob} is damaged: its {what} is {found.digest()}, not {wanted}")


class Hashed(io.RawIOBase):
    """A stream that knows the digest of what was read from it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._hash.update(data)
        return data

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def drain(self) -> None:
        while self.read(1 << 20):
            pass

    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"


def open_source(path: Path, reference: str | None = None, wanted: str | None = None) -> Source:
    """Recognise what `path` is, and open it.

    `reference` chooses an image by its name where there are several; `wanted` is OS/ARCHITECTURE instead of our own.

    Raises: SpecError, ContainerError.
    """
    if not path.exists():
        raise SpecError(f"--from {path}: no such file or directory")
    target = wanted or f"linux/{_ARCHITECTURES.get(platform.machine(), platform.machine())}"
    if path.is_dir():
        blobs: Blobs = DirectoryBlobs(path)
        if not blobs.has("oci-layout") and not blobs.has("manifest.json"):
            raise ContainerError(f"{path} is neither an OCI image layout nor an unpacked `docker save`")
    else:
        try:
            blobs = ArchiveBlobs(path)
        except (tarfile.TarError, EOFError, OSError) as first:
            raise SpecError(f"--from {path}: is no tar archive: {first}") from first
    if blobs.has("oci-layout") and blobs.has("index.json"):
        return Source(blobs, _oci(blobs, reference, target))
    if blobs.has("manifest.json"):
        return Source(blobs, _docker(blobs, reference))
    real = path.resolve()
    return Source(DirectoryBlobs(real.parent), Image({}, (Layer(real.name, None, None),)))


def is_rootfs_directory(path: Path) -> bool:
    """Say whether a directory is a rootfs itself, not an image."""
    return path.is_dir() and not (path / "oci-layout").is_file() and not (path / "manifest.json").is_file()


def _blob(digest: Any) -> str:
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise SpecError(f"digest {digest!r} is not sha256:HEX")
    return f"blobs/sha256/{digest[7:]}"


def _verified(blobs: Blobs, digest: Any) -> Any:
    """Read a document whose digest is known. Raises: ContainerError."""
    name = _blob(digest)
    with blobs.open(name) as f:
        found = hashlib.sha256(f.read(_MAX_DOCUMENT_BYTES)).hexdigest()
    if f"sha256:{found}" != digest:
        raise ContainerError(f"{name} is damaged: its digest is sha256:{found}")
    return blobs.document(name)


def _oci(blobs: Blobs, reference: str | None, target: str) -> Image:
    descriptors = _list(blobs.document("index.json"), "manifests", "index.json")
    if reference is not None:
        key = "org.opencontainers.image.ref.name"
        descriptors = [d for d in descriptors if reference in ((d.get("annotations") or {}).get(key),)]
        if not descriptors:
            raise SpecError(f"the image layout has no image named {reference!r}")
    for _ in range(4):  # indexes may nest, but not for ever
        descriptor = _choose(descriptors, target)
        document = _verified(blobs, descriptor.get("digest"))
        if (document.get("mediaType") or descriptor.get("mediaType")) not in _INDEXES and "layers" in document:
            return _manifest(blobs, document)
        descriptors = _list(document, "manifests", str(descriptor.get("digest")))
    raise SpecError("the image layout's indexes are nested too deep")


def _choose(descriptors: list[dict[str, Any]], target: str) -> dict[str, Any]:
    os_name, _, architecture = target.partition("/")
    fitting = [
        d
        for d in descriptors
        if not d.get("platform") or (d["platform"].get("os"), d["platform"].get("architecture")) == (os_name, architecture)
    ]
    if not fitting:
        there = sorted(f"{d['platform'].get('os')}/{d['platform'].get('architecture')}" for d in descriptors)
        raise SpecError(f"the image is not there for {target}", hint=f"it has {', '.join(there)}; see --platform")
    if len(fitting) > 1 and not fitting[0].get("platform"):
        raise SpecError("the image layout has several images", hint="choose one with --ref")
    return fitting[0]


def _manifest(blobs: Blobs, manifest: dict[str, Any]) -> Image:
    config = _verified(blobs, (manifest.get("config") or {}).get("digest"))
    if not isinstance(config, dict):
        raise SpecError("the image's config is no object")
    diff_ids = ((config.get("rootfs") or {}).get("diff_ids")) or []
    layers = _list(manifest, "layers", "manifest")
    if diff_ids and len(diff_ids) != len(layers):
        raise SpecError(f"the image has {len(layers)} layers, its config names {len(diff_ids)}")
    return Image(
        config,
        tuple(
            Layer(_blob(layer.get("digest")), str(layer.get("digest")), str(diff_ids[i]) if diff_ids else None)
            for i, layer in enumerate(layers)
        ),
    )


def _docker(blobs: Blobs, reference: str | None) -> Image:
    images = blobs.document("manifest.json")
    if not isinstance(images, list) or not all(isinstance(i, dict) for i in images):
        raise SpecError("manifest.json: must be a list of objects")
    if reference is not None:
        images = [i for i in images if reference in (i.get("RepoTags") or [])]
    if len(images) != 1:
        raise SpecError(
            f"the archive has {len(images)} images" + (f" named {reference!r}" if reference else ""), hint="use --ref"
        )
    config = blobs.document(str(images[0].get("Config")))
    names = images[0].get("Layers")
    if not isinstance(config, dict) or not isinstance(names, list):
        raise SpecError("manifest.json: names no config or no layers")
    diff_ids = (config.get("rootfs") or {}).get("diff_ids") or [None] * len(names)
    if len(diff_ids) != len(names):
        raise SpecError(f"the image has {len(names)} layers, its config names {len(diff_ids)}")
    return Image(config, tuple(Layer(str(n), None, d) for n, d in zip(names, diff_ids, strict=True)))


def _list(document: Any, key: str, where: str) -> list[dict[str, Any]]:
    found = document.get(key) if isinstance(document, dict) else None
    if not isinstance(found, list) or not all(isinstance(d, dict) for d in found):
        raise SpecError(f"{where}: /{key} must be a list of objects")
    return found
