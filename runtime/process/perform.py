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
from runtime.errors import ContainerError, KernelError, Unsupported
from runtime.linux import const as c
from runtime.linux import mount as m
from runtime.linux import namespace
from runtime.linux.procfs import read_mountinfo
from runtime.process import places
from runtime.process.copytree import copy_tree
from runtime.setup import ops
from runtime.values import replace

_BIND_FLAGS = (
    c.MS_RDONLY | c.MS_NOSUID | c.MS_NODEV | c.MS_NOEXEC | c.MS_NOSYMFOLLOW | c.MS_NOATIME | c.MS_NODIRATIME | c.MS_RELATIME
    | c.MS_STRICTATIME
)  # fmt: skip
_ATIME_FLAGS = c.MS_NOATIME | c.MS_RELATIME | c.MS_STRICTATIME
_NODE_TYPES = {"c": stat.S_IFCHR, "u": stat.S_IFCHR, "b": stat.S_IFBLK, "p": stat.S_IFIFO}
_ST_NOSYMFOLLOW = 0x2000
_STATVFS_FLAGS = (
    (os.ST_RDONLY, c.MS_RDONLY), (os.ST_NOSUID, c.MS_NOSUID), (os.ST_NODEV, c.MS_NODEV), (os.ST_NOEXEC, c.MS_NOEXEC),
    (os.ST_NOATIME, c.MS_NOATIME), (os.ST_NODIRATIME, c.MS_NODIRATIME), (os.ST_RELATIME, c.MS_RELATIME),
    (_ST_NOSYMFOLLOW, c.MS_NOSYMFOLLOW),
)  # fmt: skip


class Performer:
    """Carries out operations on the rootfs at `root`; the caller has a mount namespace of its own.

    `trees` are the detached mounts that the verb opened, by the numbers that the operations have for them.
    """

    def __init__(
        self,
        root: str,
        layout: Layout,
        cgroup_paths: dict[str, str],
        *,
        no_pivot: bool,
        propagation: int,
        trees: dict[int, int],
    ) -> None:
        self.root, self.layout, self.cgroup_paths, self.no_pivot, self.trees = root, layout, cgroup_paths, no_pivot, trees
        # By default nothing mounted inside is seen outside, and what the host mounts arrives until pivot_root.
        m.mount(None, "/", None, propagation or c.MS_SLAVE | c.MS_REC)
        # Whatever is shared with the host, the rootfs's own mount must not appear there.
        m.mount(None, _mount_point_of(root), None, c.MS_PRIVATE)
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
        return places.parent(self.root_fd, path)

    def _ensure(self, path: str, directory: bool) -> None:
        places.ensure(self.root_fd, path, directory)

    def _Mount(self, op: ops.Mount) -> None:
        bind = op.flags & c.MS_BIND
        if op.tree is not None:
            is_directory = stat.S_ISDIR(os.stat(f"/proc/self/fd/{self.trees[op.tree]}").st_mode)
        elif bind and not os.path.exists(op.source):
            raise ContainerError(f"cannot bind {op.source} on {op.destination}: the source does not exist")
        else:
            is_directory = not bind or os.path.isdir(op.source)
        if op.fstype == "tmpfs" and not bind and "mode=" not in op.data:
            op = self._with_mode(op)
        if not op.flags & c.MS_REMOUNT:
            self._ensure(op.destination, is_directory)
        if op.tree is not None:
            fd = m.openat2(self.root_fd, op.destination, os.O_PATH)
            try:
                m.move_mount(self.trees[op.tree], fd)
            finally:
                os.close(fd)
        elif op.copy_up:
            self._mount_copy(op)
        elif op.fstype in ("proc", "sysfs"):
            self._mount_kernel(op)
        else:
            with self._opened(op.destination) as target:
                flags = op.flags if not bind or op.flags & c.MS_REMOUNT else op.flags & ~_BIND_FLAGS
                m.mount(op.source, target, None if bind else op.fstype, flags, op.data or None)
        # Flags of a bind mount take effect by a remount only.
        if bind and (op.flags | op.cleared) & _BIND_FLAGS and not op.flags & c.MS_REMOUNT:
            self._remount(op.destination, op.flags & _BIND_FLAGS, op.cleared)
        for propagation in op.propagation:
            with self._opened(op.destination) as target:
                m.mount(None, target, None, propagation)
        if op.recursive_set or op.recursive_clear:
            fd = m.openat2(self.root_fd, op.destination, os.O_PATH)
            try:
                m.mount_setattr(fd, op.recursive_set, op.recursive_clear, recursive=True)
            finally:
                os.close(fd)

    def _with_mode(self, op: ops.Mount) -> ops.Mount:
        """Give a tmpfs the mode of the directory that it covers, instead of one that everybody may write to."""
        with contextlib.suppress(FileNotFoundError):
            fd = m.openat2(self.root_fd, op.destination, os.O_PATH)
            try:
                mode = f"mode={stat.S_IMODE(os.fstat(fd).st_mode):o}"
            finally:
                os.close(fd)
            return replace(op, data=",".join(filter(None, (op.data, mode))))
        return op

    def _mount_kernel(self, op: ops.Mount) -> None:
        """Mount a file system of the kernel's, never through a link.

        What masks its files goes by its path later; a link that somebody changes meanwhile would lead that elsewhere.
        """
        strict = c.RESOLVE_IN_ROOT | c.RESOLVE_NO_SYMLINKS
        try:
            fd = m.openat2(self.root_fd, op.destination, os.O_PATH | os.O_DIRECTORY, resolve=strict)
        except OSError as e:
            if e.errno not in (errno.ELOOP, errno.ENOTDIR):
                raise
            raise ContainerError(f"cannot mount {op.fstype} on {op.destination}: it must be an ordinary directory") from None
        try:
            m.mount(op.source, f"/proc/self/fd/{fd}", op.fstype, op.flags, op.data or None)
        finally:
            os.close(fd)

    def _mount_copy(self, op: ops.Mount) -> None:
        """Mount a tmpfs that begins with what the directory beneath it holds."""
        beneath = m.openat2(self.root_fd, op.destination, os.O_RDONLY | os.O_DIRECTORY)
        try:
            with self._opened(op.destination) as target:
                m.mount(op.source, target, op.fstype, op.flags & ~c.MS_RDONLY, op.data or None)
            above = m.openat2(self.root_fd, op.destination, os.O_RDONLY | os.O_DIRECTORY)
            try:
                copy_tree(beneath, above)
            finally:
                os.close(above)
        finally:
            os.close(beneath)
        if op.flags & c.MS_RDONLY:
            self._remount(op.destination, c.MS_RDONLY)

    def _remount(self, path: str, flags: int, cleared: int = 0) -> None:
        """Change flags of a mount, keeping the others that it has.

        In a user namespace those of the host's own mount are locked: they stay, also where the document has them off.
        """
        with self._opened(path) as target:
            have = os.statvfs(target).f_flag
            locked = sum(ours for theirs, ours in _STATVFS_FLAGS if have & theirs)
            kept = locked & ~cleared
            if flags & _ATIME_FLAGS:
                kept &= ~_ATIME_FLAGS
            try:
                m.mount(None, target, None, c.MS_REMOUNT | c.MS_BIND | kept | flags)
            except PermissionError:
                if not flags and not cleared & locked:
                    raise
                if flags & _ATIME_FLAGS:
                    flags &= ~_ATIME_FLAGS
                m.mount(None, target, None, c.MS_REMOUNT | c.MS_BIND | locked | flags)

    def _MountCgroup(self, op: ops.MountCgroup) -> None:
        self._ensure(op.destination, directory=True)
        if self.layout.mode == "v2":
            self._mount_hierarchy(op, op.destination, "cgroup2", "", self._own_cgroup(""), op.flags)
            return
        with self._opened(op.destination) as target:
            m.mount("tmpfs", target, "tmpfs", op.flags & ~c.MS_RDONLY, "mode=755")
        for hierarchy in self.layout.hierarchies:
            path = f"{op.destination}/{hierarchy.name}"
            self._ensure(path, directory=True)
            self._mount_hierarchy(op, path, hierarchy.fstype, hierarchy.mount_data, self._own_cgroup(hierarchy.key), op.flags)
            for alias in hierarchy.aliases:
                self._Symlink(ops.Symlink(hierarchy.name, f"{op.destination}/{alias}"))
        if op.flags & c.MS_RDONLY:
            self._remount(op.destination, c.MS_RDONLY)

    def _own_cgroup(self, key: str) -> str:
        """Return the container's directory in a tree; without cgroups of its own, the one that it was started in."""
        if key in self.cgroup_paths:
            return self.cgroup_paths[key]
        hierarchy = next(h for h in self.layout.hierarchies if h.key == key)
        return hierarchy.mount_point + hierarchy.own_path

    def _mount_hierarchy(self, op: ops.MountCgroup, path: str, fstype: str, data: str, own: str, flags: int) -> None:
        with self._opened(path) as target:
            if op.own_namespace:
                try:
                    m.mount(fstype, target, fstype, flags, data or None)
                    return
                except OSError as e:
                    # In a user namespace that does not own the cgroup namespace the tree can only be bound.
                    if e.errno not in (errno.EPERM, errno.EBUSY):
                        raise
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
        except PermissionError:
            self._bind_node(op)
        finally:
            os.umask(mask)
            os.close(parent)

    def _bind_node(self, op: ops.MakeNode) -> None:
        """Bind the host's node: in a user namespace nobody may make one that works."""
        found = os.stat(op.path)
        if stat.S_IFMT(found.st_mode) != _NODE_TYPES[op.type] or found.st_rdev != os.makedev(op.major, op.minor):
            raise ContainerError(
                f"cannot make {op.path} in a user namespace: the host has no {op.type} {op.major}:{op.minor} of that path"
            )
        self._ensure(op.path, directory=False)
        with self._opened(op.path, os.O_PATH | os.O_NOFOLLOW) as target:
            m.mount(op.path, target, None, c.MS_BIND)

    def _Symlink(self, op: ops.Symlink) -> None:
        parent = self._parent(op.path)
        try:
            with contextlib.suppress(FileExistsError):
                os.symlink(op.target, posixpath.basename(op.path), dir_fd=parent)
        finally:
            os.close(parent)

    def _PivotRoot(self, op: ops.PivotRoot) -> None:
        os.fchdir(self.root_fd)
        if self.no_pivot:
            self._hide_kernel_mounts()
            m.mount(".", "/", None, c.MS_MOVE)
            os.chroot(".")
        else:
            # The old root comes to lie on the new one in one place, so no directory for it is needed. It is made a slave
            # by its own descriptor: the new root's mounts keep the propagation that they were given.
            old = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                m.pivot_root(".", ".")
                os.fchdir(old)
            finally:
                os.close(old)
            m.mount(None, ".", None, c.MS_SLAVE | c.MS_REC)
            m.umount2(".", c.MNT_DETACH)
        os.chdir("/")
        os.close(self.root_fd)
        self.root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)

    def _hide_kernel_mounts(self) -> None:
        """Unmount every proc and sysfs of the host: without pivot_root they would stay in this namespace, out of sight.

        The kernel lets a user namespace mount its own unmasked proc as long as one unmasked is there (mount_too_revealing).
        """
        for mount in reversed(read_mountinfo()):
            inside = mount.mount_point == self.root or mount.mount_point.startswith(self.root + "/")
            if mount.fstype not in ("proc", "sysfs") or inside:
                continue
            try:
                m.umount2(mount.mount_point, c.MNT_DETACH)
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.EPERM):
                    raise
                m.mount("tmpfs", mount.mount_point, "tmpfs", c.MS_RDONLY)  # locked: cover it

    # After pivot_root /proc is the container's, and may be anything: from here on nothing goes by a path in it.

    def _RemountReadonly(self, op: ops.RemountReadonly) -> None:
        fd = m.openat2(self.root_fd, op.path, os.O_PATH)
        try:
            m.mount_setattr(fd, c.MOUNT_ATTR_RDONLY, 0, recursive=False)
        finally:
            os.close(fd)

    def _ReadonlyPath(self, op: ops.ReadonlyPath) -> None:
        try:
            fd = m.openat2(self.root_fd, op.path, os.O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            tree = m.open_tree(fd, recursive=True)
            try:
                m.mount_setattr(tree, c.MOUNT_ATTR_RDONLY, 0, recursive=False)
                m.move_mount(tree, fd)
            finally:
                os.close(tree)
        finally:
            os.close(fd)

    def _MaskPath(self, op: ops.MaskPath) -> None:
        try:
            fd = m.openat2(self.root_fd, op.path, os.O_PATH)
        except (FileNotFoundError, NotADirectoryError):
            return
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                os.fchdir(fd)
                try:
                    m.mount("tmpfs", ".", "tmpfs", c.MS_RDONLY)
                finally:
                    os.chdir("/")
                return
            null = m.openat2(self.root_fd, "/dev/null", os.O_PATH)
            try:
                device = os.fstat(null)
                if not stat.S_ISCHR(device.st_mode) or device.st_rdev != os.makedev(1, 3):
                    raise ContainerError(f"cannot mask {op.path}: /dev/null of the container is not the null device")
                tree = m.open_tree(null, recursive=False)
                try:
                    m.move_mount(tree, fd)
                finally:
                    os.close(tree)
            finally:
                os.close(null)
        finally:
            os.close(fd)

    def _SetPropagation(self, op: ops.SetPropagation) -> None:
        m.mount(None, "/", None, op.flags)

    def _Sysctl(self, op: ops.Sysctl) -> None:
        path = "/proc/sys/" + (op.name if "/" in op.name else op.name.replace(".", "/"))
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, op.value.encode())
            finally:
                os.close(fd)
        except FileNotFoundError:
            raise Unsupported(f"/linux/sysctl/{op.name}: this kernel has no such parameter") from None

    def _Hostname(self, op: ops.Hostname) -> None:
        namespace.sethostname(op.name)

    def _Domainname(self, op: ops.Domainname) -> None:
        namespace.setdomainname(op.name)

    def _LoopbackUp(self, op: ops.LoopbackUp) -> None:
        loopback_up()


def _mount_point_of(path: str) -> str:
    """Return the mount point that a path is on."""
    points = [mount.mount_point for mount in read_mountinfo()]
    real = os.path.realpath(path)
    return max((p for p in points if real == p or real.startswith(p.rstrip("/") + "/")), key=len)


def loopback_up() -> None:
    """Bring this network namespace's loopback interface up. Raises: OSError. Source: netdevice(7)."""
    siocgifflags, siocsifflags, iff_up = 0x8913, 0x8914, 1
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack_from("16sH", fcntl.ioctl(s, siocgifflags, request))[1]
        fcntl.ioctl(s, siocsifflags, struct.pack("16sH14x", b"lo", flags | iff_up))
