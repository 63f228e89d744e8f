"""Frames, trees and names that lie, in both directions: an agent against a hostile coordinator and a hostile source, and they against it.

Whatever comes in: nothing outside the directories that a move was given is made or changed, nothing hangs, and what is raised is
one of Ferry's errors.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import stat
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from migrate import PROTOCOL, __version__, places
from migrate.agent.server import Agent
from migrate.agent.side import Permissions
from migrate.agent.table import VERBS
from migrate.errors import MigrateError, ProtocolError
from migrate.incoming import TreeReceiver
from migrate.session import Session
from migrate.ship import Shipper
from migrate.transport.local import FdStream
from migrate.tree import Tree
from migrate.wire import MAX_FRAME_BYTES, Wire
from migrate.wire_pb2 import Call, EndOfFile, EndOfTree, Entry, Event, Failure, Frame, Hello, Reply, Segment

pytestmark = pytest.mark.ferry
ID = "20260131-120000-abcdef"
MANY = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
FEW = settings(MANY, max_examples=25)


@pytest.fixture(autouse=True)
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for what a move has, beside one that nobody may touch."""
    monkeypatch.setattr(places, "RUN", tmp_path / "world/run")
    monkeypatch.setattr(places, "HISTORY", tmp_path / "world/history")
    (tmp_path / "world/bundles").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret\n")
    (outside / "secret").chmod(0o600)
    before = _picture(outside)
    yield tmp_path / "world"
    assert _picture(outside) == before, "something outside was changed"
    assert sorted(os.listdir(tmp_path)) == ["outside", "world"], "something was made outside"


def _picture(root: Path) -> list[tuple[str, int, int, int, bytes]]:
    found = []
    for base, directories, names in os.walk(root):
        for name in [".", *directories, *names]:
            path = Path(base, name)
            st_ = path.lstat()
            data = path.read_bytes() if stat.S_ISREG(st_.st_mode) else b""
            found.append((str(path), st_.st_mode, st_.st_uid, st_.st_nlink, data))
    return sorted(found)


class Other:
    """The other end of a socket: says bytes, and reads what is answered into nothing."""

    def __init__(self) -> None:
        self.mine, theirs = socket.socketpair()
        self.stream = FdStream(theirs.fileno(), os.dup(theirs.fileno()), "the other side")
        self._theirs = theirs
        self.stream.timeout_s = 5

    def says(self, data: bytes) -> None:
        def run() -> None:
            with contextlib.suppress(OSError):
                self.mine.sendall(data)
                self.mine.shutdown(socket.SHUT_WR)
                while self.mine.recv(1 << 16):
                    pass

        threading.Thread(target=run, daemon=True).start()

    def close(self) -> None:
        self._theirs.detach()
        self.stream.close()
        self.mine.close()


@contextlib.contextmanager
def hearing(data: bytes) -> Iterator[FdStream]:
    """Give a stream on which these bytes come in, and then nothing."""
    other = Other()
    other.says(data)
    try:
        yield other.stream
    finally:
        other.close()


def framed(frame: Frame) -> bytes:
    data = frame.SerializeToString()
    return struct.pack(">I", len(data)) + data


def raw(data: bytes) -> bytes:
    return struct.pack(">I", 1 << 31 | len(data)) + data


HELLO = framed(Frame(hello=Hello(protocol=PROTOCOL, version=__version__, dead_after_ms=3000)))

NAMES = st.sampled_from(
    [
        "c",
        "",
        ".",
        "..",
        "/",
        "../../outside/secret",
        "/etc/passwd",
        "a/../../outside",
        "a\0b",
        "-rf",
        "$(id)",
        ";id",
        "\n",
        "é" * 300,
        ID,
        "20260131-120000-ffffff",
        "-",
        "x" * 5000,
        "/var/lib/ferry/bundles/../../../../tmp/x",
    ]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | NAMES | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)
# Those that start nothing before they have looked at what they were given.
WORDS = [
    "migration_id",
    "container",
    "bundle",
    "origin",
    "coordinator",
    "plan",
    "flags",
    "address",
    "remote_command",
    "root",
    "phase",
    "mark",
    "fields",
    "outcome",
    "settled",
    "report",
    "word",
    "wait_s",
    "keep_bundle",
    "memory_bytes",
    "name",
    "cpu",
    "needs",
    "sync",
    "only_open",
    "container_id",
]
ARGUMENTS = st.fixed_dictionaries({}, optional=dict.fromkeys(WORDS, NAMES | JSON))


def _serve(data: bytes, permissions: Permissions) -> None:
    with hearing(data) as stream:
        agent = Agent(Wire(stream), permissions)
        done = threading.Thread(target=_quietly(agent.serve), daemon=True)
        done.start()
        done.join(60)
        assert not done.is_alive(), "the agent hangs"


def _quietly(run: Callable[[], None]) -> Callable[[], None]:
    def inner() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("signal.signal", lambda *_: None)  # which the main thread alone may call
            run()

    return inner


@MANY
@given(verb=st.sampled_from(sorted(VERBS)) | NAMES, arguments=ARGUMENTS)
def test_an_agent_and_calls_that_lie(world: Path, verb: str, arguments: dict[str, Any]) -> None:
    """Every verb with arguments of the wrong kind, of another move, or that lead elsewhere; out of turn, too."""
    call = Frame(call=Call(id=1, verb=verb, arguments=json.dumps(arguments)))
    _serve(HELLO + framed(call), Permissions((str(world / "bundles"),), restricted=True))


@MANY
@given(text=st.binary(max_size=300), kind=st.sampled_from(["raw", "call", "arguments"]))
def test_an_agent_and_frames_that_are_none(text: bytes, kind: str) -> None:
    data = {
        "raw": text,
        "call": HELLO + struct.pack(">I", len(text)) + text,
        "arguments": HELLO + framed(Frame(call=Call(id=1, verb="facts", arguments="[" * 5000 + text.decode(errors="replace")))),
    }[kind]
    _serve(data, Permissions())


PATHS = st.sampled_from(
    [
        b".",
        b"..",
        b"a",
        b"b",
        b"a/b",
        b"a/b/c",
        b"link",
        b"link/x",
        b"link/secret",
        b"../outside/secret",
        b"/etc/passwd",
        b"a/../../x",
        b"",
        b"a//b",
        b"a/.",
        b"x\0y",
        b"\xff\xfe",
        b"n" * 300,
        b"restore.log",
        b"pages-1.img",
        b"pages-x.img",
        b"parent",
    ]
)
TARGETS = st.sampled_from([b"../../outside/secret", b"/etc/passwd", b"..", b"../../outside", b"a", b"", b"x" * 5000])
MODES = st.sampled_from(
    [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, 0, 0xFFFFFFFF]
).flatmap(lambda kind: st.sampled_from([kind | 0o644, kind | 0o6777, kind]))
SIZES = st.sampled_from([0, 1, 4096, 1 << 40, 2**63, 2**64 - 1])
ENTRIES = st.builds(
    Entry,
    path=PATHS,
    mode=MODES,
    uid=st.sampled_from([0, 1000, 2**32 - 1]),
    gid=st.sampled_from([0, 2**32 - 1]),
    mtime_ns=st.sampled_from([0, -(2**63), 2**63 - 1]),
    size=SIZES,
    rdev=st.sampled_from([0, 0x103, 2**64 - 1]),
    link_target=TARGETS,
    hard_link_to=st.sampled_from([b"", b"", b"a", b"link/secret", b"../outside/secret", b"link", b"."]),
    removed=st.booleans(),
    patch=st.booleans(),
    xattrs=st.dictionaries(
        st.sampled_from(["user.x", "security.capability", "trusted.overlay.opaque", "", "x"]), st.binary(max_size=8), max_size=2
    ),
)
CONTENT = st.one_of(
    st.builds(lambda o, n, p: framed(Frame(segment=Segment(offset=o, length=n, packed=p))), SIZES, SIZES, st.booleans()),
    st.builds(raw, st.binary(min_size=1, max_size=20)),
    st.builds(lambda d: framed(Frame(end_of_file=EndOfFile(digest=d))), st.binary(max_size=16)),
    st.builds(lambda: framed(Frame(end_of_tree=EndOfTree(entries=1)))),
)
# A file's content as it should be, so that what comes after it is read, too.
EMPTY = framed(Frame(end_of_file=EndOfFile(digest=bytes.fromhex("99aa06d3014798d86001c324468d497f"))))
TREES = st.lists(
    ENTRIES.map(lambda e: framed(Frame(entry=e)) + (EMPTY if stat.S_ISREG(e.mode) and not e.hard_link_to and not e.removed else b"")) | CONTENT,
    max_size=8,
).map(b"".join)  # fmt: skip


@MANY
@given(data=TREES, flat=st.booleans(), end=st.booleans())
def test_a_receiver_and_trees_that_lie(world: Path, data: bytes, flat: bool, end: bool) -> None:
    root = Path(tempfile.mkdtemp(dir=world))
    (root / "link").symlink_to("../../outside")
    with hearing(data + (framed(Frame(end_of_tree=EndOfTree(entries=0))) if end else b"")) as stream:
        receiver = TreeReceiver(root, flat)
        try:
            with contextlib.suppress(MigrateError):
                receiver.receive(Wire(stream))
        finally:
            receiver.close()
    if flat:
        for name in set(os.listdir(root)) - {"link"}:
            assert stat.S_ISREG((root / name).lstat().st_mode), f"{name} among the images is no file"


def test_the_digest_of_nothing_is_right(tmp_path: Path) -> None:
    """Otherwise the trees above would all end at their first file."""
    (tmp_path / "world/root").mkdir()
    entry = Frame(entry=Entry(path=b"a", mode=stat.S_IFREG | 0o644))
    with hearing(framed(entry) + EMPTY + framed(Frame(end_of_tree=EndOfTree(entries=1)))) as stream:
        receiver = TreeReceiver(tmp_path / "world/root")
        receiver.receive(Wire(stream))
        receiver.close()
    assert (tmp_path / "world/root/a").exists()


ANSWERS = st.one_of(
    st.builds(lambda i, t: framed(Frame(reply=Reply(id=i, result=t))), st.integers(0, 3), st.sampled_from(["", "{}", "[]", "{", "1", "null", "[" * 9000])),
    st.builds(lambda i, d: framed(Frame(reply=Reply(id=i, result=json.dumps(d)))), st.integers(0, 3), JSON),
    st.builds(lambda i, d: framed(Frame(failure=Failure(id=i, error=json.dumps(d)))), st.integers(0, 3), JSON),
    st.builds(
        lambda c, m: framed(Frame(failure=Failure(id=1, error=json.dumps({"code": c, "message": m, "hint": m})))),
        NAMES | st.sampled_from(["refused", "connection-lost"]), JSON,
    ),
    st.builds(lambda i, n, d: framed(Frame(event=Event(id=i, name=n, fields=json.dumps(d)))), st.integers(0, 3), NAMES.map(lambda n: n.replace("\0", "")), JSON),
    st.builds(lambda: framed(Frame(call=Call(id=1, verb="stop", arguments="{}")))),
    st.builds(lambda n: struct.pack(">I", n), st.sampled_from([0, 1, MAX_FRAME_BYTES + 1, 2**32 - 1])),
    st.binary(max_size=40),
)  # fmt: skip


@MANY
@given(data=st.lists(ANSWERS, max_size=4).map(b"".join))
def test_a_coordinator_and_answers_that_lie(data: bytes) -> None:
    with hearing(HELLO + data) as stream, contextlib.suppress(MigrateError):
        session = Session(stream, "host2")
        try:
            assert isinstance(session.call("facts"), dict)
        finally:
            session.close()


@FEW
@given(data=st.lists(ANSWERS, max_size=4).map(b"".join))
def test_a_source_and_answers_that_lie(world: Path, data: bytes) -> None:
    tree = world / "tree"
    tree.mkdir(exist_ok=True)
    (tree / "file").write_bytes(b"x" * 100_000)
    with hearing(HELLO + data) as stream, contextlib.suppress(MigrateError):
        shipper = Shipper(stream, "host2")
        shipper.send_tree(Tree(tree, watched=False), "/anywhere", lambda sent, total: None)


@pytest.mark.parametrize("frame", [Frame(hello=Hello(protocol=PROTOCOL + 1)), Frame(call=Call(id=1, verb="ping")), Frame()])
def test_whoever_does_not_greet_is_no_agent(frame: Frame) -> None:
    with hearing(framed(frame)) as stream, pytest.raises(MigrateError):
        Session(stream, "host2")


def test_a_frame_is_never_read_beyond_its_limit() -> None:
    with hearing(struct.pack(">I", MAX_FRAME_BYTES + 1)) as stream, pytest.raises(ProtocolError, match="too large"):
        Wire(stream).receive()


@MANY
@given(root=NAMES | st.sampled_from(["bundle", "images"]), data=TREES)
def test_a_target_and_trees_for_a_move_that_lie(world: Path, root: str, data: bytes) -> None:
    """The second agent of a target that is prepared: it takes a tree into the move's two directories, and into no other."""
    bundle, images = world / "bundles/c", places.images(ID)
    for directory in (bundle, images):
        directory.mkdir(parents=True, exist_ok=True)
    (places.working(ID) / "receives").write_text(str(bundle))
    named = {"bundle": str(bundle), "images": str(images)}.get(root, root)
    calls = [Call(id=1, verb="attach", arguments=json.dumps({"migration_id": ID}))]
    calls.append(Call(id=2, verb="receive_tree", arguments=json.dumps({"root": named})))
    _serve(HELLO + b"".join(framed(Frame(call=call)) for call in calls) + data, Permissions())
    assert all(stat.S_ISREG((images / name).lstat().st_mode) for name in os.listdir(images))
    shutil.rmtree(bundle)
    shutil.rmtree(places.working(ID))
