"""A directory tree as it is now: looked at once as a whole, and then only where it changed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from migrate.manifest import RACY_NS, Inode, Item, Manifest
from migrate.rootfs import look_at, scan
from migrate.watch import Change, Watch


class Tree:
    """What is below a directory, kept up to date by `look`.

    `reason` tells why all of it is looked at each time, "" when it is not. What is below `leave_out` is none of it.
    """

    def __init__(self, root: Path, watched: bool = True, leave_out: Iterable[bytes] = (), reason: str = "") -> None:
        self.root = root
        self.items: Manifest = {}
        self.reason = reason
        self._leave_out = frozenset(leave_out)
        self._watch: Watch | None = None
        try:
            self._watch = Watch(root) if watched else None
        except OSError as e:
            self.reason = f"the kernel does not tell what changes there: {e.strerror}"
        self._names: dict[Inode, set[bytes]] = {}
        # What changed so shortly before it was looked at that another change may not have shown.
        self._recent: set[bytes] = set()

    def close(self) -> None:
        """Stop watching. Idempotent."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def look(self, doubtful: Iterable[Inode] = ()) -> set[bytes] | None:
        """Look again; return the paths that may be other than at the last look, None for all of them.

        `doubtful` are files that may be changed without anybody being told of it.

        Raises: TransferFailed.
        """
        changed = self._take()
        if changed is None:
            self._look_at_all()
            return None
        for path in self._recent | self.names_of(doubtful):
            changed.setdefault(path, Change())
        touched: set[bytes] = set()
        files: set[Inode] = set()
        for path in sorted(changed):
            paths, inodes = self._look_at(path, changed[path].is_new)
            touched |= paths
            files |= inodes
        # All names of a file change together, also when one of them went.
        for path in self.names_of(files) - touched:
            touched |= self._look_at(path, False)[0]
        self._recent = {p for p in touched if p in self.items and _is_recent(self.items[p])}
        return touched

    def _take(self) -> dict[bytes, Change] | None:
        """Return what is known to have changed, None when that is not all of it."""
        if self._watch is None or not self.items:
            return None
        changed = self._watch.take()
        if changed is None:
            return None
        try:
            # A file may have been changed by a name that it had only meanwhile.
            inodes = {self._watch.inode_of(h) for change in changed.values() for h in change.handles if h}
        except OSError:
            return None
        for path in self.names_of(i for i in inodes if i is not None):
            changed.setdefault(path, Change())
        return changed

    def names_of(self, inodes: Iterable[Inode]) -> set[bytes]:
        """Return the paths of files."""
        return {name for inode in inodes for name in self._names.get(inode, ())}

    def _look_at_all(self) -> None:
        self.items = scan(self.root, self._on_directory, self._leave_out)
        self._names = {}
        for path, item in self.items.items():
            if item.is_file:
                self._names.setdefault(item.inode, set()).add(path)
        self._recent = {p for p, i in self.items.items() if _is_recent(i)}

    def _on_directory(self, fd: int, path: bytes) -> None:
        if self._watch is None:
            return
        try:
            self._watch.directory(fd, path)
        except OSError as e:
            self.reason = f"the kernel does not tell what changes there: {e.strerror}"
            self.close()

    def _look_at(self, path: bytes, is_new: bool) -> tuple[set[bytes], set[Inode]]:
        """Look at one path, and below it where it is a directory of which nothing is known.

        Return the paths that were touched, and the files that are there, or were.
        """
        before = self.items.get(path)
        known = before is not None and before.is_directory and not is_new
        now = look_at(self.root, path, not known, self._on_directory, self._leave_out)
        still = known and path in now and now[path].is_directory
        gone = {p for p in self.items if p.startswith(path + b"/")} if before and before.is_directory and not still else set()
        files = {self._forget(old) for old in gone | ({path} if before else set())}
        for new, item in now.items():
            self.items[new] = item
            if item.is_file:
                self._names.setdefault(item.inode, set()).add(new)
        return gone | set(now) | {path}, files | {item.inode for item in now.values()}

    def _forget(self, path: bytes) -> Inode:
        inode = self.items.pop(path).inode
        names = self._names.get(inode, set())
        names.discard(path)
        if not names:
            self._names.pop(inode, None)
        return inode


def _is_recent(item: Item) -> bool:
    return item.ctime_ns >= item.seen_ns - RACY_NS
