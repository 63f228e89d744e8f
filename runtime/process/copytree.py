"""Copy a tree by descriptors, as a tmpfs with `tmpcopyup` begins with one."""

from __future__ import annotations

import contextlib
import os
import stat


def copy_tree(source: int, target: int) -> None:
    """Copy what a directory holds into another, with owners, modes, attributes and times. Never follows a link.

    Raises: OSError.
    """
    for name in os.listdir(source):
        found = os.stat(name, dir_fd=source, follow_symlinks=False)
        kind = stat.S_IFMT(found.st_mode)
        if kind == stat.S_IFDIR:
            os.mkdir(name, 0o700, dir_fd=target)
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            inner, copy = os.open(name, flags, dir_fd=source), os.open(name, flags, dir_fd=target)
            try:
                copy_tree(inner, copy)
                _copy_attributes(inner, copy, found)
            finally:
                os.close(inner)
                os.close(copy)
        elif kind == stat.S_IFREG:
            inner = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=source)
            copy = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=target)
            try:
                while os.sendfile(copy, inner, None, 1 << 24):
                    pass
                _copy_attributes(inner, copy, found)
            finally:
                os.close(inner)
                os.close(copy)
        else:
            if kind == stat.S_IFLNK:
                os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
            else:
                os.mknod(name, found.st_mode, found.st_rdev, dir_fd=target)
            os.chown(name, found.st_uid, found.st_gid, dir_fd=target, follow_symlinks=False)
            times = (found.st_atime_ns, found.st_mtime_ns)
            os.utime(name, ns=times, dir_fd=target, follow_symlinks=False)


def _copy_attributes(source: int, target: int, found: os.stat_result) -> None:
    os.fchown(target, found.st_uid, found.st_gid)
    os.fchmod(target, stat.S_IMODE(found.st_mode))
    for attribute in os.listxattr(source):
        with contextlib.suppress(OSError):  # one that a tmpfs cannot hold
            os.setxattr(target, attribute, os.getxattr(source, attribute))
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))
