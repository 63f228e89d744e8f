"""Send trees to an agent on the target, over a connection of its own that is opened before anything is frozen."""

from __future__ import annotations

import os
import re
import select
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrate import manifest
from migrate.blocks import Blocks
from migrate.errors import ConnectionLost, ProtocolError, TransferFailed
from migrate.manifest import Inode, Item, Manifest
from migrate.outgoing import GrowingFile, StreamedFile, TreeSender
from migrate.outlet import Compress, Outlet
from migrate.transport.local import FdStream, ProcessStream
from migrate.transport.striped import Sending
from migrate.tree import Tree
from migrate.wire import PIECE_BYTES, Wire, answer, ask, greet, read_object, send_call
from migrate.wire_pb2 import EndOfTree, Entry, Frame

_PROGRESS_EVERY_S = 0.2
_ANSWER_TIMEOUT_S = 60.0
_LOOK_AGAIN_S, _SAYS_WHY_S = 0.001, 5.0
_SILENCE_S = 120.0

# (content bytes sent, content bytes in all)
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Shipped:
    """Units: bytes of content; seconds."""

    entries: int
    removed: int
    content_bytes: int
    seconds: float
    look_seconds: float = 0.0
    whole: str = ""  # why all of the tree was looked at, where it need not be

    def plus(self, other: Shipped) -> Shipped:
        """Return what both are together, one after the other."""
        return Shipped(
            self.entries + other.entries,
            self.removed + other.removed,
            self.content_bytes + other.content_bytes,
            self.seconds + other.seconds,
            self.look_seconds + other.look_seconds,
            self.whole or other.whole,
        )


class Shipper:
    """The source's end of the bulk connection, whose stream it closes. Raises (constructor): HostUnfit.

    `connections` is how many there will be, with those that `widen` adds.
    """

    def __init__(
        self,
        stream: FdStream,
        name: str,
        compress: Compress = Compress.NONE,
        bandwidth_limit: float = 0.0,
        connections: int = 1,
    ) -> None:
        self._stream = stream
        self._wire = Wire(self._stream)
        self._outlet = Outlet(self._wire, compress, bandwidth_limit, connections)
        self._connections = connections
        self._stream.timeout_s = _ANSWER_TIMEOUT_S
        self._calls = 0
        self._lanes: list[ProcessStream] = []
        try:
            greet(self._wire, name, self._stream.noise)
        except BaseException:
            self._stream.close()
            raise
        self._known: dict[str, Manifest] = {}
        self._blocks: dict[str, dict[bytes, Blocks]] = {}  # of large files
        self._again: dict[str, set[bytes]] = {}
        self._streamed: dict[str, set[bytes]] = {}

    @property
    def wire_bytes(self) -> int:
        return self._wire.sent_bytes + self._wire.received_bytes

    @property
    def link_rate(self) -> float | None:
        """See Outlet."""
        return self._outlet.link_rate

    def hurry(self) -> None:
        """See Outlet."""
        self._outlet.hurry()

    def close(self) -> None:
        for stream in (self._stream, *self._lanes):
            stream.forsake()  # all of them, before one is waited for: the other side ends when it finds an end
        for stream in (self._stream, *self._lanes):
            stream.close()

    def break_off(self) -> None:
        """End the connection, so that who waits for it does so no longer."""
        if isinstance(self._stream, ProcessStream):
            self._stream.process.kill()

    def _call(self, verb: str, arguments: dict[str, Any]) -> None:
        self._calls += 1
        send_call(self._wire, self._calls, verb, arguments)

    def _answer(self, but_words: bool = False) -> dict[str, Any]:
        return answer(self._wire, "the target", skip="event" if but_words else "")

    def call(self, verb: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make a call that takes no content. Raises: MigrateError."""
        self._call(verb, arguments)
        return self._answer()

    def widen(self, argv: list[str], name: str, migration_id: str) -> None:
        """Send over the other connections, too, which this command makes; they end with the first. Raises: MigrateError."""
        if self._connections == 1:
            return
        for _ in range(1, self._connections):
            self._lanes.append(ProcessStream(argv, name))
        for number, lane in enumerate(self._lanes, 1):
            lane.timeout_s = _ANSWER_TIMEOUT_S
            wire = Wire(lane)
            greet(wire, "the target", lane.noise)
            ask(wire, 1, "lane", {"migration_id": migration_id, "number": number}, "the target")
        self.call("widen", {"count": len(self._lanes)})
        self._wire.stream = Sending((self._stream, *self._lanes))

    def send_tree(
        self,
        tree: Tree,
        target_root: str,
        on_progress: OnProgress,
        mapped: Collection[Inode] = (),
        opened: Collection[Inode] = (),
        patches: bool = True,
    ) -> Shipped:
        """Make the target's copy of a tree equal to what it is now; from the second time on only differences go.

        With `patches` these are changed blocks of large files. What is `mapped` may be written to without a trace, and is gone
        through in any case; what is `opened` is looked at again.

        Raises: TransferFailed, ConnectionLost; the target says why it cannot write.
        """
        started = time.monotonic()
        touched = tree.look({*mapped, *opened})
        known = self._known.setdefault(target_root, {})
        written = {path: known.pop(path) for path in tree.names_of(mapped) if path in known}
        left_out = self._streamed.get(target_root, set())
        if touched is None or not known:
            difference = manifest.delta(known, {p: i for p, i in tree.items.items() if p not in left_out})
        else:
            touched |= self._again.get(target_root, set())
            before = {p: known[p] for p in touched if p in known}
            difference = manifest.delta(before, {p: tree.items[p] for p in sorted(touched - left_out) if p in tree.items})
        looked = time.monotonic()
        if known and not difference.send and not difference.remove:
            return Shipped(0, 0, 0, looked - started, looked - started, tree.reason)
        self._call("receive_tree", {"root": target_root})
        told, total = started, difference.size_bytes

        def on_bytes() -> None:
            nonlocal told
            if time.monotonic() - told > _PROGRESS_EVERY_S:
                told = time.monotonic()
                on_progress(sender.done_bytes, total)

        # Should this fail, it is not known what the target has.
        del self._known[target_root]
        blocks = self._blocks.pop(target_root, {}) if patches else {}
        sender = TreeSender(self._outlet, tree.root, on_bytes, blocks)
        try:
            for path in difference.remove:
                sender.remove(path)
            vanished = self._send(sender, difference)
            self._wire.send(Frame(end_of_tree=EndOfTree(entries=len(difference.send) + len(difference.remove))))
        except ConnectionLost:
            self._answer()  # the target may have said why before it closed
            raise
        finally:
            sender.close()
        answer = self._answer()
        if answer["content_bytes"] != sender.sent_bytes:
            raise TransferFailed(f"the target got {answer['content_bytes']} of the {sender.sent_bytes} bytes of {tree.root}")
        for path in difference.remove:
            known.pop(path, None)
        # What vanished before it could be sent may be back, unchanged, at the next look; the target has what was sent before.
        self._again[target_root] = {item.path for item in vanished}
        known.update((path, item) for path, item in written.items() if path in self._again[target_root])
        known.update((item.path, item) for item in difference.send if item.path not in self._again[target_root])
        self._known[target_root], self._blocks[target_root] = known, blocks
        seconds = time.monotonic() - started
        return Shipped(len(difference.send), len(difference.remove), sender.sent_bytes, seconds, looked - started, tree.reason)

    def stream_pages(self, images: Path, target_root: str, wait_end: Callable[[float], bool]) -> Shipped:
        """Send the memory of a checkpoint while CRIU writes it: the files pages-N.img, one after the other.

        `wait_end` waits that many seconds for the checkpoint to be whole, and says whether it is. CRIU only ever
        appends to these files, and begins the next one when one is done.

        Raises: TransferFailed, ConnectionLost.
        """
        started = time.monotonic()
        self._call("receive_tree", {"root": target_root})
        sender = TreeSender(self._outlet, images, lambda: None)
        streamed: dict[bytes, GrowingFile] = {}
        current: GrowingFile | None = None
        try:
            whole = False
            while not whole:
                whole = wait_end(_LOOK_AGAIN_S)
                for name in _page_files(images):
                    if name not in streamed:
                        if current is not None:
                            current.end()
                        current = streamed[name] = sender.grow(name)
                    if current is not None:
                        current.send_new()
            if current is not None:
                current.end()
            self._wire.send(Frame(end_of_tree=EndOfTree(entries=len(streamed))))
        except OSError as e:
            raise TransferFailed(f"cannot read the images in {images}: {e.strerror}") from e
        except ConnectionLost:
            self._answer()  # the target may have said why before it closed
            raise
        finally:
            sender.close()
        self._answer()
        self._streamed[target_root] = set(streamed)
        return Shipped(len(streamed), 0, sum(f.sent_bytes for f in streamed.values()), time.monotonic() - started)

    def stream_memory(
        self,
        fd: int,
        target_root: str,
        name: str,
        wait_end: Callable[[float], int | None],
        on_bytes: Callable[[int], None],
        on_words: Callable[[list[str]], None] | None = None,
        reserve_bytes: int = 0,
    ) -> Shipped:
        """Send what comes out of a pipe as one file.

        `wait_end` waits that many seconds, and returns how many bytes there are in all once that is known, or raises what went
        wrong there; `on_bytes` is told how many went, `on_words` what the target asks for meanwhile, which
        keeps so much space for it.

        Raises: TransferFailed when the pipe ends before, ConnectionLost.
        """
        started = time.monotonic()
        self._call("receive_tree", {"root": target_root, **({"asks": True, "reserve_bytes": reserve_bytes} if on_words else {})})
        watched = [fd, self._stream.fds[0]] if on_words else [fd]
        buffer = memoryview(bytearray(PIECE_BYTES))
        total: int | None = None
        try:
            file = StreamedFile(self._outlet, Entry(path=name.encode(), mode=stat.S_IFREG | 0o600))
            heard = time.monotonic()
            while total is None or file.sent_bytes < total:
                ready = select.select(watched, [], [], 0 if total is None else _LOOK_AGAIN_S)[0]
                if on_words and watched[1] in ready:
                    on_words(self._words())
                if fd not in ready:
                    if time.monotonic() - heard > _SILENCE_S:
                        raise TransferFailed("the memory stopped on its way out of the container")
                    on_bytes(file.sent_bytes)
                    if total is None:
                        total = wait_end(_LOOK_AGAIN_S)
                    continue
                heard = time.monotonic()
                count = os.readv(fd, [buffer])
                if not count:
                    wait_end(_SAYS_WHY_S)
                    raise TransferFailed("the memory ended on its way out of the container")
                file.send(buffer[:count])
                on_bytes(file.sent_bytes)
            file.end()
            self._wire.send(Frame(end_of_tree=EndOfTree(entries=1)))
        except ConnectionLost:
            self._answer()  # the target may have said why before it closed
            raise
        self._answer(but_words=on_words is not None)
        return Shipped(1, 0, file.sent_bytes, time.monotonic() - started)

    def _words(self) -> list[str]:
        """Return what the target asks for. Raises: MigrateError when it says something else."""
        frame = self._wire.receive()
        if frame.WhichOneof("body") != "event":
            raise TransferFailed("the target does not want the rest of the memory any more")
        return _read_words(frame)

    @staticmethod
    def _send(sender: TreeSender, difference: manifest.Delta) -> list[Item]:
        vanished: list[Item] = []
        first: dict[tuple[int, int], bytes] = {}
        for item in difference.send:
            linked = item.is_file and item.links > 1
            if not sender.send(item, first.get(item.inode) if linked else None):
                vanished.append(item)
            elif linked:
                first.setdefault(item.inode, item.path)
        return vanished


def _read_words(frame: Frame) -> list[str]:
    words = read_object(frame.event.fields, "the target")["words"]
    if not isinstance(words, list) or not all(isinstance(w, str) and re.fullmatch(r"[a-z]+( [0-9a-f]+)*", w) for w in words):
        raise ProtocolError("the target asks for what is no memory")
    return words


def _page_files(images: Path) -> list[bytes]:
    """Return the names of the files that hold memory, in the order in which CRIU writes them."""
    names = [n for n in os.listdir(images) if n.startswith("pages-") and n.endswith(".img")]
    return [os.fsencode(n) for n in sorted(names, key=lambda n: int(n[6:-4]))]
