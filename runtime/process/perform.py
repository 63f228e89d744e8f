"""Carry out the operations of a SetupPlan, inside the container's new mount namespace.

Until pivot_root the host's tree is still there, and a hostile rootfs may hold links that point at it. Therefore a
destination is opened with openat2(RESOLVE_IN_ROOT) below the root's descriptor and mounted on through
/proc/self/fd, never by its name.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import posixpath
import socket
import stat
import struct
from collections.abc import Iterator

from runtime.cgroups.layout import Layout
from runtime.errors import ContainerError, KernelError
from runtime.linux import const as c
from runtime.linux import mount as m
from runtime.linux import namespace
from runtime.setup import ops

_BIND_FLAGS = c.MS_RDONLY | c.MS_NOSUID | c.MS_NODEV | c.MS_NOEXEC | c.MS_NOATIME | c.MS_NODIRATIME | c.MS_RELATIME
_NODE_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_STATVFS_FLAGS = (
    (os.ST_NOSUID, c.MS_NOSUID), (os.ST_NODEV, c.MS_NODEV), (os.ST_NOEXEC, c.MS_NOEXEC),
    (os.ST_NOATIME, c.MS_NOATIME), (os.ST_NODIRATIME, c.MS_NODIRATIME), (os.ST_RELATIME, c.MS_RELATIME),
)  # fmt: skip


class Performer:
    """Carries out operations on the rootfs at `root`; the caller has unshared its mount namespace."""

    def __init__(self, root: str, layout: Layout, cgroup_paths: dict[str, str], no_pivot: bool) -> None:
        self.root, self.layout, self.cgroup_paths, self.no_pivot = root, layout, cgroup_paths, no_pivot
        # From here on nothing mounted inside is seen outside; what the host mounts arrives, until pivot_root.
        m.mount(None, "/", None, c.MS_SLAVE | c.MS_REC)
        m.mount(root, root, None, c.MS_BIND | c.MS_REC)
        m.mount(None, root, None, c.MS_PRIVATE)
        self.root_fd = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def run(self, operations: tuple[ops.Op, ...]) -> None:
        """Carry out operations in order. Raises: ContainerError naming the operation and its path."""
        for op in operations:
            try:
                getattr(self, f"_{type(op).__name__}")(op)
            except OSError as e:
                subject = getattr(op, "destination", getattr(op, "path", getattr(op, "name", "")))
                raise KernelError(f"cannot carry out {type(op).__name__} {subject}".rstrip(), e.errno or errno.EIO) from e

    @contextlib.contextmanager
    def _opened(self, path: str, flags: int = os.O_PATH) -> Iterator[str]:
        """Open a path inside the root and give its name below /proc/self/fd."""
        fd = m.openat2(self.root_fd, path, flags)
        try:
            yield f"/proc/self/fd/{fd}"
        finally:
            os.close(fd)

    def _parent(self, path: str) -> int:
        """Make the directories above `path` inside the root and return the last one's descriptor."""
        fd = os.dup(self.root_fd)
        walked = ""
        for part in [p for p in posixpath.dirname(path).split("/") if p]:
            walked += "/" + part
            os.close(fd)
            fd = self._directory(walked)
        return fd

    def _directory(self, path: str) -> int:
        flags = os.O_PATH | os.O_DIRECTORY
        try:
            return m.openat2(self.root_fd, path, flags)
        except FileNotFoundError:
            above = m.openat2(self.root_fd, posixpath.dirname(path), flags)
            try:
                os.mkdir(posixpath.basename(path), 0o755, dir_fd=above)
            finally:
                os.close(above)
            return m.openat2(self.root_fd, path, flags)

    def _ensure(self, path: str, directory: bool) -> None:
        """Make the place that something is mounted on, unless it is there."""
        with contextlib.suppress(FileNotFoundError):
            os.close(m.openat2(self.root_fd, path, os.O_PATH))
            return
        parent = self._parent(path)
        try:
            name = posixpath.basename(path)
            if directory:
                os.mkdir(name, 0o755, dir_fd=parent)
            else:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=parent))
        finally:
            os.close(parent)

    def _Mount(self, op: ops.Mount) -> None:
        bind = op.flags & c.MS_BIND
        if bind and not os.path.exists(op.source):
            raise ContainerError(f"cannot bind {op.source} on {op.destination}: the source does not exist")
        self._ensure(op.destination, directory=not bind or os.path.isdir(op.source))
        with self._opened(op.destination) as target:
            m.mount(
                op.source,
                target,
                None if bind else op.fstype,
                op.flags & (~_BIND_FLAGS if bind else -1),
                op.data or None,
            )
        # Flags of a bind mount take effect by a remount only.
        if bind and op.flags & _BIND_FLAGS:
            self._remount(op.destination, op.flags & _BIND_FLAGS)
        for propagation in op.propagation:
            with self._opened(op.destination) as target:
                m.mount(None, target, None, propagation)

    def _remount(self, path: str, flags: int) -> None:
        """Add flags to a mount, keeping those that it has: a user namespace may not drop them."""
        with self._opened(path) as target:
            have = os.statvfs(target).f_flag
            kept = sum(ours for theirs, ours in _STATVFS_FLAGS if have & theirs)
            if flags & (c.MS_NOATIME | c.MS_RELATIME):
                kept &= ~(c.MS_NOATIME | c.MS_RELATIME)
            m.mount(None, target, None, c.MS_REMOUNT | c.MS_BIND | kept | flags)

    def _MountCgroup(self, op: ops.MountCgroup) -> None:
        self._ensure(op.destination, directory=True)
        if self.layout.mode == "v2":
            self._mount_hierarchy(op, op.destination, "cgroup2", "", self.cgroup_paths[""], op.flags)
            return
        with self._opened(op.destination) as target:
            m.mount("tmpfs", target, "tmpfs", op.flags & ~c.MS_RDONLY, "mode=755")
        for hierarchy in self.layout.hierarchies:
            path = f"{op.destination}/{hierarchy.name}"
            self._ensure(path, directory=True)
            self._mount_hierarchy(op, path, hierarchy.fstype, hierarchy.mount_data, self.cgroup_paths[hierarchy.key], op.flags)
            for alias in hierarchy.aliases:
                self._Symlink(ops.Symlink(hierarchy.name, f"{op.destination}/{alias}"))
        if op.flags & c.MS_RDONLY:
            self._remount(op.destination, c.MS_RDONLY)

    def _mount_hierarchy(self, op: ops.MountCgroup, path: str, fstype: str, data: str, own: str, flags: int) -> None:
        with self._opened(path) as target:
            if op.own_namespace:
                m.mount(fstype, target, fstype, flags, data or None)
                return
            m.mount(own, target, None, c.MS_BIND)
        if flags & _BIND_FLAGS:
            self._remount(path, flags & _BIND_FLAGS)

    def _MakeNode(self, op: ops.MakeNode) -> None:
        parent = self._parent(op.path)
        name = posixpath.basename(op.path)
        mask = os.umask(0)
        try:
            os.mknod(name, _NODE_TYPES[op.type] | op.mode, os.makedev(op.major, op.minor), dir_fd=parent)
            os.chown(name, op.uid, op.gid, dir_fd=parent, follow_symlinks=False)
        except FileExistsError:
            found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            if stat.S_IFMT(found.st_mode) != _NODE_TYPES[op.type] or found.st_rdev != os.makedev(op.major, op.minor):
                raise
        finally:
            os.umask(mask)
            os.close(parent)

    def _Symlink(self, op: ops.Symlink) -> None:
        parent = self._parent(op.path)
        try:
            with contextlib.suppress(FileExistsError):
                os.symlink(op.target, posixpath.basename(op.path), dir_fd=parent)
        finally:
            os.close(parent)

    def _PivotRoot(self, op: ops.PivotRoot) -> None:
        os.fchdir(self.root_fd)
        os.chdir(self.root)  # the mount on top of what root_fd was opened on
        if self.no_pivot:
            m.mount(self.root, "/", None, c.MS_MOVE)
            os.chroot(".")
        else:
            # The new root is put on top of the old one in one place, so no directory for the old one is needed.
            m.pivot_root(".", ".")
            m.mount(None, ".", None, c.MS_SLAVE | c.MS_REC)
            m.umount2(".", c.MNT_DETACH)
        os.chdir("/")
        os.close(self.root_fd)
        self.root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _RemountReadonly(self, op: ops.RemountReadonly) -> None:
        self._remount(op.path, c.MS_RDONLY)

    def _ReadonlyPath(self, op: ops.ReadonlyPath) -> None:
        try:
            with self._opened(op.path) as path:
                m.mount(path, path, None, c.MS_BIND | c.MS_REC)
        except FileNotFoundError:
            return
        self._remount(op.path, c.MS_RDONLY)

    def _MaskPath(self, op: ops.MaskPath) -> None:
        try:
            with self._opened(op.path) as path, self._opened("/dev/null") as null:
                device = os.stat(null)
                if not stat.S_ISCHR(device.st_mode) or device.st_rdev != os.makedev(1, 3):
                    raise ContainerError(f"cannot mask {op.path}: /dev/null of the container is not the null device")
                if stat.S_ISDIR(os.stat(path).st_mode):
                    m.mount("tmpfs", path, "tmpfs", c.MS_RDONLY)
                else:
                    m.mount(null, path, None, c.MS_BIND)
        except (FileNotFoundError, NotADirectoryError):
            return

    def _SetPropagation(self, op: ops.SetPropagation) -> None:
        m.mount(None, "/", None, op.flags)

    def _Sysctl(self, op: ops.Sysctl) -> None:
        path = "/proc/sys/" + (op.name if "/" in op.name else op.name.replace(".", "/"))
        fd = m.openat2(self.root_fd, path, os.O_WRONLY)
        try:
            where = os.readlink(f"/proc/self/fd/{fd}")
            if not where.startswith("/proc/sys/") or os.fstat(fd).st_dev != os.stat("/proc/self").st_dev:
                raise ContainerError(f"cannot set {op.name}: /proc/sys of the container is not procfs")
            os.write(fd, op.value.encode())
        finally:
            os.close(fd)

    def _Hostname(self, op: ops.Hostname) -> None:
        namespace.sethostname(op.name)

    def _Domainname(self, op: ops.Domainname) -> None:
        namespace.setdomainname(op.name)

    def _LoopbackUp(self, op: ops.LoopbackUp) -> None:
        loopback_up()


def loopback_up() -> None:
    """Bring this network namespace's loopback interface up. Raises: OSError. Source: netdevice(7)."""
    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack_from("16sH", fcntl.ioctl(s, siocgifflags, request))[1]
        fcntl.ioctl(s, siocsifflags, struct.pack("16sH14x", b"lo", flags | iff_up))
