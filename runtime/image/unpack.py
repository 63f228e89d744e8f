"""Apply layers to a directory. A layer is hostile: every path is opened beneath the directory's descriptor.

Whiteouts: `.wh.NAME` removes NAME of the layers below, `.wh..wh..opq` all that the layers below have in its directory.
For overlayfs a layer is unpacked by itself: then they become what overlayfs wants in their place.
Source: OCI image specification 1.1, layer.md; the kernel's Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterator
from decimal import Decimal, InvalidOperation
from typing import IO

from runtime.errors import ContainerError, KernelError
from runtime.files import write_all
from runtime.linux.const import RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS
from runtime.linux.mount import openat2

_WHITEOUT, _OPAQUE = ".wh.", ".wh..wh..opq"
_XATTR = "SCHILY.xattr."
_STRICT = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS


class Unpacker:
    """Writes into one directory. `overlay` keeps whiteouts for overlayfs; an ordinary user's files are all the user's.

    Without `layer` a tar is no layer but a tree, and a name that looks like a whiteout's is a file's.
    """

    def __init__(self, root: str, *, overlay: bool = False, layer: bool = True) -> None:
        self._layer = layer
        self._root = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._overlay = overlay
        self._privileged = os.geteuid() == 0

    def close(self) -> None:
        os.close(self._root)

    def apply(self, stream: IO[bytes]) -> None:
        """Apply one layer. Raises: ContainerError naming the entry; what was written stays."""
        made: set[str] = set()
        directories: list[tuple[str, tarfile.TarInfo]] = []
        try:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                for entry in tar:
                    name = self._name(entry.name)
                    if name == ".":
                        continue
                    try:
                        self._entry(tar, entry, name, made, directories)
                    except OSError as e:
                        raise KernelError(f"cannot unpack {entry.name}", e.errno or errno.EIO) from e
        except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, InvalidOperation) as e:
            raise ContainerError(f"the layer is no tar archive, or damaged: {e}") from e
        # Last: what is made in a directory changes its times, and a read-only one would take nothing.
        for name, entry in reversed(directories):
            # A later entry may have taken its place.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), _no_link():
                fd = openat2(self._root, name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, resolve=_STRICT)
                try:
                    self._attributes(fd, entry)
                finally:
                    os.close(fd)

    @staticmethod
    def _name(name: str) -> str:
        """Return an entry's path below the root. Raises: ContainerError for one that climbs out."""
        cleaned = posixpath.normpath(name.lstrip("/"))
        if cleaned.startswith("../") or cleaned == ".." or "\0" in name:
            raise ContainerError(f"the layer has an entry outside the rootfs: {name}")
        return cleaned

    def _entry(
        self,
        tar: tarfile.TarFile,
        entry: tarfile.TarInfo,
        name: str,
        made: set[str],
        directories: list[tuple[str, tarfile.TarInfo]],
    ) -> None:
        base = posixpath.basename(name)
        parent = self._parent(posixpath.dirname(name))
        try:
            if self._layer and base.startswith(_WHITEOUT):
                self._whiteout(parent, base, posixpath.dirname(name), made)
                return
            made.add(name)
            if entry.isdir():
                self._directory(parent, base)
                directories.append((self._within(parent, base), entry))
                return
            self._remove(parent, base)
            if entry.isreg():
                self._file(tar, entry, parent, base)
            elif entry.issym():
                os.symlink(entry.linkname, base, dir_fd=parent)
                self._link_attributes(parent, base, entry)
            elif entry.islnk():
                self._hard_link(entry, parent, base)
            elif entry.ischr() or entry.isblk() or entry.isfifo():
                self._node(entry, parent, base)
            else:
                raise ContainerError(f"the layer has an entry of unknown type {entry.type!r}: {entry.name}")
        finally:
            os.close(parent)

    def _parent(self, path: str) -> int:
        """Open a directory, making what is missing of it. Links in the rootfs are resolved as if it were the root."""
        try:
            return openat2(self._root, path or ".", os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            pass
        fd = os.dup(self._root)
        walked = ""
        for part in path.split("/"):
            walked = posixpath.join(walked, part)
            try:
                inner = openat2(self._root, walked, os.O_RDONLY | os.O_DIRECTORY)
            except FileNotFoundError:
                os.mkdir(part, 0o755, dir_fd=fd)
                inner = openat2(self._root, walked, os.O_RDONLY | os.O_DIRECTORY)
            os.close(fd)
            fd = inner
        return fd

    def _within(self, parent: int, base: str) -> str:
        """Return the path of an entry below the root, with the links on its way resolved."""
        root, directory = (os.readlink(f"/proc/self/fd/{fd}") for fd in (self._root, parent))
        return posixpath.join(posixpath.relpath(directory, root), base)

    def _remove(self, parent: int, base: str) -> None:
        """Remove what is there of a name, a whole tree if it is one. Never follows a link."""
        try:
            found = os.stat(base, dir_fd=parent, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(base, dir_fd=parent)
            return
        fd = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        try:
            for name in os.listdir(fd):
                self._remove(fd, name)
        finally:
            os.close(fd)
        os.rmdir(base, dir_fd=parent)

    def _whiteout(self, parent: int, base: str, path: str, made: set[str]) -> None:
        if base == _OPAQUE:
            if self._overlay:
                os.setxattr(parent, "trusted.overlay.opaque" if self._privileged else "user.overlay.opaque", b"y")
                return
            for name in os.listdir(parent):
                # An opaque directory hides what is below, not what its own layer puts there.
                if not any(m == posixpath.join(path, name) or m.startswith(posixpath.join(path, name) + "/") for m in made):
                    self._remove(parent, name)
            return
        hidden = base.removeprefix(_WHITEOUT)
        if hidden in ("", ".", ".."):
            raise ContainerError(f"the layer has a whiteout of no name: {posixpath.join(path, base)}")
        self._remove(parent, hidden)
        if self._overlay:
            os.mknod(hidden, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)

    def _directory(self, parent: int, base: str) -> None:
        try:
            os.mkdir(base, 0o755, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(base, dir_fd=parent, follow_symlinks=False).st_mode):
                self._remove(parent, base)
                os.mkdir(base, 0o755, dir_fd=parent)

    def _file(self, tar: tarfile.TarFile, entry: tarfile.TarInfo, parent: int, base: str) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(base, flags, 0o600, dir_fd=parent)
        try:
            source = tar.extractfile(entry)
            assert source is not None
            while data := source.read(1 << 20):
                if entry.issparse() and data.count(0) == len(data):
                    os.lseek(fd, len(data), os.SEEK_CUR)
                else:
                    write_all(fd, data)
            os.ftruncate(fd, entry.size)  # a hole at the end
            self._attributes(fd, entry)
        finally:
            os.close(fd)

    def _hard_link(self, entry: tarfile.TarInfo, parent: int, base: str) -> None:
        target = self._name(entry.linkname)
        above = openat2(self._root, posixpath.dirname(target) or ".", os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.link(posixpath.basename(target), base, src_dir_fd=above, dst_dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(above)

    def _node(self, entry: tarfile.TarInfo, parent: int, base: str) -> None:
        kind = stat.S_IFIFO if entry.isfifo() else stat.S_IFCHR if entry.ischr() else stat.S_IFBLK
        if kind != stat.S_IFIFO and not self._privileged:
            return  # an ordinary user's container gets the host's devices bound; it could use no others
        os.mknod(base, kind | 0o600, os.makedev(entry.devmajor, entry.devminor), dir_fd=parent)
        self._owner(lambda: os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False))
        # No descriptor of a node can be had without opening the device; the name is ours alone in this directory.
        os.chmod(f"/proc/self/fd/{parent}/{base}", stat.S_IMODE(entry.mode))
        os.utime(base, ns=(_ns(entry), _ns(entry)), dir_fd=parent, follow_symlinks=False)

    def _link_attributes(self, parent: int, base: str, entry: tarfile.TarInfo) -> None:
        self._owner(lambda: os.chown(base, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False))
        os.utime(base, ns=(_ns(entry), _ns(entry)), dir_fd=parent, follow_symlinks=False)

    def _attributes(self, fd: int, entry: tarfile.TarInfo) -> None:
        self._owner(lambda: os.fchown(fd, entry.uid, entry.gid))
        os.fchmod(fd, stat.S_IMODE(entry.mode))  # after the owner, whose change takes set-user-id away
        for key, value in entry.pax_headers.items():
            if key.startswith(_XATTR):
                try:
                    os.setxattr(fd, key.removeprefix(_XATTR), value.encode("utf-8", "surrogateescape"))
                except OSError as e:
                    if self._privileged and e.errno not in (errno.ENOTSUP,):
                        raise
        os.utime(fd, ns=(_ns(entry), _ns(entry)))

    def _owner(self, change: Callable[[], None]) -> None:
        if self._privileged:
            change()


@contextlib.contextmanager
def _no_link() -> Iterator[None]:
    """Pass over a path that is a link by now."""
    try:
        yield
    except OSError as e:
        if e.errno != errno.ELOOP:
            raise


def _ns(entry: tarfile.TarInfo) -> int:
    # As a float it would be right to some hundred nanoseconds only.
    return int(Decimal(entry.pax_headers.get("mtime", entry.mtime)) * 1_000_000_000)
