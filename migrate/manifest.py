"""What a directory tree holds, entry by entry, and what differs between two looks at it. Pure."""

from __future__ import annotations

import stat
from dataclasses import dataclass

# A change within one tick of the file system's clock does not show in ctime: what changed this shortly before we
# looked is counted as changed next time, too. Coarse clocks tick every 4 to 10 ms.
RACY_NS = 50_000_000

Inode = tuple[int, int]  # device, number


@dataclass(frozen=True, slots=True)
class Item:
    """One entry. Units: times in nanoseconds since the epoch, sizes in bytes."""

    path: bytes
    mode: int
    uid: int
    gid: int
    size: int
    rdev: int
    mtime_ns: int
    ctime_ns: int
    inode: Inode
    links: int
    seen_ns: int  # when we looked

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def same_as(self, later: Item) -> bool:
        """Say whether nothing of the entry changed since this look at it; the kernel moves ctime at every change."""
        return (
            self.inode == later.inode
            and self.mode == later.mode
            and self.ctime_ns == later.ctime_ns
            and self.size == later.size
            and self.ctime_ns < self.seen_ns - RACY_NS
        )


Manifest = dict[bytes, Item]


@dataclass(frozen=True, slots=True)
class Delta:
    """`send` in the order of the walk (a directory before what is in it); `remove` deepest first."""

    send: tuple[Item, ...]
    remove: tuple[bytes, ...]

    @property
    def size_bytes(self) -> int:
        return sum(i.size for i in self.send if i.is_file)


def delta(before: Manifest, now: Manifest) -> Delta:
    """Return what makes a copy of `before` equal to `now`.

    All names of a file go together: when one of them changed, or joined or left, the receiver makes them all anew,
    so that no name keeps sharing its content with a file that it no longer is.
    """
    changed = {path for path, item in now.items() if path not in before or not before[path].same_as(item)}
    removed = {path for path in before if path not in now}
    inodes = {now[p].inode for p in changed if now[p].links > 1} | {
        before[p].inode for p in (changed | removed) if p in before and before[p].links > 1
    }
    if inodes:
        changed |= {p for p, i in now.items() if i.is_file and i.inode in inodes}
    # A directory that became something else, or the other way round, is removed first, with all below it.
    retyped = {p for p in changed if p in before and stat.S_IFMT(before[p].mode) != stat.S_IFMT(now[p].mode)}
    order = sorted(removed | retyped, key=lambda p: p.count(b"/"), reverse=True)
    return Delta(tuple(i for p, i in now.items() if p in changed), tuple(order))
