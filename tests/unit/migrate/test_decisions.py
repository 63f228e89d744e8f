"""The pure part of the coordinator, and its formats."""

from __future__ import annotations

import os
import socket
import stat
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate import host, manifest, preflight, warm
from migrate.errors import EXIT_CODES, ConnectionLost, HostUnfit, Outcome, ProtocolError, Refused, TransferFailed, from_dict
from migrate.facts import BundleFacts, ContainerFacts, HostFacts, Needs, container_from_json, host_from_json, to_json
from migrate.incoming import TreeReceiver
from migrate.manifest import Item
from migrate.network import Address, Attachment, Interface, Network
from migrate.outgoing import TreeSender
from migrate.outlet import Outlet
from migrate.overlay import Layer, Overlay
from migrate.plan import Request, Route, can_pre_copy, make
from migrate.report import Report, human_bytes, sentence
from migrate.rootfs import scan
from migrate.transport.local import FdStream
from migrate.wire import Wire, greet
from migrate.wire_pb2 import EndOfFile, EndOfTree, Entry, Frame, Segment


def host_facts(name: str = "host1", **changes: Any) -> HostFacts:
    fields: dict[str, Any] = {
        "hostname": name, "boot_id": "b", "machine": "x86_64", "kernel": "6.1", "version": "1", "uid": 0, "runtime_error": "",
        "criu_version": "4.2.1", "criu_error": "", "criu_features": (), "images_on": "tmpfs", "memory_free_bytes": 1 << 40, "cgroup": "v2",
        "controllers": (), "lsm": (), "tools": ("ssh", "nft"), "missing_filesystems": (), "ports_in_use": (), "cpu": "AA==", "cpu_error": "", "container_exists": False, "bundle_exists": False, "images_free_bytes": 1 << 40,
        "bundle_free_bytes": 1 << 40, "bundle_free_inodes": 1 << 20, "missing_bind_sources": (), "existing_volumes": (), "full_volumes": (), "clock_ns": 0,
        "follows_memory": True, "open_files": 1 << 20, "bridges": ("br0",), "addresses": (), "network_exists": False, "cni": ("podman",), "layers": (), "fixed_downtime_ms": None,
    }  # fmt: skip
    return HostFacts(**{**fields, **changes})


def container_facts(**changes: Any) -> ContainerFacts:
    bundle = BundleFacts("/b", "/b/rootfs", False, (), 10, 1 << 20, (), (), ())
    for name in list(changes):
        if hasattr(bundle, name):
            bundle = BundleFacts(**{**_dict(bundle), name: changes.pop(name)})
    fields: dict[str, Any] = {
        "id": "c",
        "status": "running",
        "pid": 5,
        "memory_bytes": 1 << 20,
        "shared_bytes": 0,
        "moved_by": "",
        "unfinished": "",
        "needs": Needs(bind_sources=("/x",), ports=("tcp 00000000:0050",)),
        "sharers": (),
        "findings": (),
    }
    return ContainerFacts(**{**fields, **changes, "bundle": bundle})


def _dict(value: Any) -> dict[str, Any]:
    return {n: getattr(value, n) for n in value.__slots__}


WEB = Network("web", (Interface("eth0", "02:00:00:00:00:01", 1400, "web0", "br0", (Address("10.0.0.2/24"),)),))
# Its plugins make the bridge where there is none.
CNI = Network(
    "web", (Interface("eth0", "02:00:00:00:00:01", 1400, "veth0", "cni0"),), attachments=(Attachment("podman", "eth0", "c"),)
)


OVERLAY = Overlay("/b/rootfs", (Layer("/l/1", "1" * 40, 1 << 30), Layer("/l/2", "2" * 40, 10)), "/b/upper", "/b/work")


def test_layers_that_are_there_need_no_space() -> None:
    target = host_facts("host2", layers=("1" * 40,), bundle_free_bytes=1 << 30)
    findings = preflight.examine("c", host_facts(), container_facts(overlay=OVERLAY, rootfs_is_mount=True), target)
    assert preflight.refusals(findings) == []
    assert next(f.words for f in findings if f.code == "overlay").endswith("host2 has 1, 1 are sent")


@pytest.mark.parametrize("network", [None, WEB, replace(WEB, has_rules=True), CNI])
def test_a_good_move_has_no_refusals(network: Network | None) -> None:
    findings = preflight.examine("c", host_facts(), container_facts(network=network), host_facts("host2"))
    assert preflight.refusals(findings) == []
    codes = {f.code for f in findings}
    assert ("network" in codes, "network-rules" in codes) == (network in (WEB, CNI), network is not None and network.has_rules)


@pytest.mark.parametrize(
    ("code", "source", "container", "target"),
    [
        ("source-not-root", {"uid": 1}, {}, {}),
        ("target-not-root", {}, {}, {"uid": 1}),
        ("target-runtime", {}, {}, {"runtime_error": "x"}),
        ("target-criu", {}, {}, {"criu_error": "x"}),
        ("cpu", {}, {}, {"cpu_error": "x"}),
        ("file-locks", {}, {"findings": ({"code": "file-locks", "severity": "fail", "words": "w", "remedy": "r"},)}, {}),
        ("same-host", {}, {}, {"hostname": "host1"}),
        ("architecture", {}, {}, {"machine": "aarch64"}),
        ("container-unknown", {}, None, {}),
        ("container-paused", {}, {"status": "paused"}, {}),
        ("container-not-running", {}, {"status": "created"}, {}),
        ("container-moving", {}, {"moved_by": "m"}, {}),
        ("move-unfinished", {}, {"unfinished": "m"}, {}),
        ("criu-older", {}, {}, {"criu_version": "4.1.1"}),
        ("cgroup-controller", {}, {"needs": Needs(controllers=("memory",))}, {"controllers": ("pids",)}),
        ("lsm", {}, {"needs": Needs(lsm=("apparmor",))}, {"lsm": ("selinux",)}),
        ("tool-ssh", {"tools": ("nft",)}, {}, {}),
        ("target-network-lock", {}, {"needs": Needs(network_lock=True)}, {"tools": ("ssh",)}),
        ("filesystem", {}, {}, {"missing_filesystems": ("zfs",)}),
        ("network-bridge", {}, {"network": WEB}, {"bridges": ("br1",)}),
        ("network-exists", {}, {"network": WEB}, {"network_exists": True}),
        ("network-cni", {}, {"network": replace(WEB, attachments=(Attachment("other", "eth0", "c"),))}, {}),
        ("network-address", {}, {"network": WEB}, {"addresses": ("127.0.0.1", "10.0.0.2")}),
        ("network-shared", {}, {"network": replace(WEB, sharers=("7 (x)",))}, {}),
        ("network-unsupported", {}, {"network": replace(WEB, unsupported=("eth1",))}, {}),
        ("port-in-use", {}, {}, {"ports_in_use": ("tcp 00000000:0050",)}),
        ("target-memory", {}, {}, {"memory_free_bytes": 1}),
        ("container-exists", {}, {}, {"container_exists": True}),
        ("bundle-exists", {}, {}, {"bundle_exists": True}),
        ("bundle-shared", {}, {"sharers": ("d",)}, {}),
        ("rootfs-outside", {}, {"rootfs": "/elsewhere"}, {}),
        ("bundle-has-mounts", {}, {"mounts_inside": ("/b/rootfs/x",)}, {}),
        ("rootfs-mount", {}, {"rootfs_is_mount": True}, {}),
        ("overlay-unsupported", {}, {"overlay": replace(OVERLAY, unsupported=("the option index=on",))}, {}),
        ("overlay-unsupported", {}, {"overlay": replace(OVERLAY, layers=OVERLAY.layers * 99)}, {}),
        ("target-space-bundle", {}, {"overlay": OVERLAY}, {"bundle_free_bytes": 1 << 30}),
        ("namespace-path", {}, {"namespace_paths": ("/run/netns/x",)}, {}),
        ("bind-source-missing", {}, {"bind_sources": ("/s",)}, {"missing_bind_sources": ("/s",)}),
        ("source-space-images", {"images_free_bytes": 1}, {}, {}),
        ("target-space-images", {}, {}, {"images_free_bytes": 1}),
        ("target-space-images", {}, {"shared_bytes": 9 << 30}, {"images_free_bytes": 8 << 30}),
        ("target-memory", {}, {"shared_bytes": 9 << 30}, {"memory_free_bytes": 8 << 30}),
        ("target-space-bundle", {}, {}, {"bundle_free_bytes": 1}),
        ("target-space-inodes", {}, {}, {"bundle_free_inodes": 1}),
    ],
)
def test_each_refusal(code: str, source: Any, container: Any, target: Any) -> None:
    found = None if container is None else container_facts(**container)
    target = {"hostname": "host2", **target}
    findings = preflight.examine(
        "c",
        host_facts(**source),
        found,
        host_facts(**{k: v for k, v in target.items() if k != "hostname"}, name=target["hostname"]),
    )
    assert [f.code for f in preflight.refusals(findings)] == [code]


@pytest.mark.parametrize(
    ("code", "source", "container", "target"),
    [
        ("clock-offset", {}, {}, {"clock_ns": 5_000_000_000}),
        ("source-images-on-disk", {"images_on": "ext4"}, {}, {}),
        ("target-images-on-disk", {}, {}, {"images_on": "xfs"}),
        ("kernel-older", {"kernel": "6.12.3"}, {}, {"kernel": "6.1.100"}),
        ("cgroup-version", {}, {}, {"cgroup": "hybrid"}),
        ("bind-source", {}, {"bind_sources": ("/s",)}, {}),
        ("bundle-in-use", {}, {"users": ("12 (tail)",)}, {}),
    ],
)
def test_each_warning(code: str, source: Any, container: Any, target: Any) -> None:
    findings = preflight.examine("c", host_facts(**source), container_facts(**container), host_facts("host2", **target))
    assert [f.code for f in findings if f.severity == "warn"] == [code]
    assert preflight.refusals(findings) == []


def test_what_the_user_wants_ignored() -> None:
    findings = preflight.examine("c", host_facts(), container_facts(), host_facts("host2", cpu_error="x"))
    ignored = preflight.ignore(findings, ("cpu",))
    assert preflight.refusals(ignored) == [] and ignored[0].code == "cpu" and "ignored" in ignored[0].words
    with pytest.raises(Refused, match="container-exists cannot be ignored"):
        preflight.ignore(findings, ("cpu", "container-exists"))


def test_the_way_of_the_data() -> None:
    assert preflight.route("a", "b", None) == []
    assert [f.code for f in preflight.route("a", "b", "")] == ["data-direct"]
    assert [f.code for f in preflight.route("a", "b", "no route")] == ["data-relayed"]


def test_facts_survive_json() -> None:
    import json

    assert host_from_json(json.loads(json.dumps(to_json(host_facts())))) == host_facts()
    assert container_from_json(json.loads(json.dumps(to_json(container_facts())))) == container_facts()
    layered = container_facts(overlay=OVERLAY)
    assert container_from_json(json.loads(json.dumps(to_json(layered)))) == layered


def test_plan_and_outcomes() -> None:
    route = Route("host1", {"destination": "host1", "port": 0}, {"destination": "h", "port": 0}, True)
    request = Request("c", "-", "h", tcp_established=True)
    decided = make(request, "id", host_facts(), container_facts(), host_facts("host2"), route)
    assert decided.criu_flags == ("--tcp-established",)
    assert len(set(EXIT_CODES.values())) == len(Outcome)
    for outcome in Outcome:
        report = Report("id", "c", "a", "b", outcome=outcome, downtime_ms=5)
        assert "c" in sentence(report)


@pytest.mark.parametrize(
    ("asked", "mib", "source", "target", "planned", "reason"),
    [
        ("never", 4096, {}, {}, False, ""),
        ("auto", 4, {}, {}, False, ""),
        ("auto", 64, {}, {}, True, ""),
        ("always", 4, {}, {}, True, ""),
        ("auto", 64, {"follows_memory": False}, {}, False, "Linux 6.7"),
        ("auto", 64, {}, {"criu_features": ()}, False, "userfaultfd"),
        ("auto", 4096, {"open_files": 4096}, {}, False, "ulimit -Hn"),
    ],
)
def test_pre_copy(asked: str, mib: int, source: Any, target: Any, planned: bool, reason: str) -> None:
    here = host_facts(**source)
    container = container_facts(memory_bytes=mib << 20)
    there = host_facts("host2", **{"criu_features": ("lazy_pages",), **target})
    route = Route("host1", {"destination": "host1", "port": 0}, {"destination": "h", "port": 0}, True)
    assert make(Request("c", "-", "h", pre_copy=asked), "id", here, container, there, route).pre_copy is planned
    found = can_pre_copy(here, container, there)
    assert (reason in found) if reason else not found


def test_human_bytes() -> None:
    assert [human_bytes(n) for n in (5, 2048, 3 << 20, 5 << 40)] == ["5 B", "2.0 KiB", "3.0 MiB", "5120.0 GiB"]


def item(path: bytes, inode: int = 1, links: int = 1, ctime: int = 0, mode: int = stat.S_IFREG | 0o644) -> Item:
    return Item(path, mode, 0, 0, 5, 0, 0, ctime, (1, inode), links, 1_000_000_000)


def _manifest(*items: Item) -> manifest.Manifest:
    return {i.path: i for i in items}


def test_delta() -> None:
    before = _manifest(item(b"a", 1), item(b"b", 2), item(b"c", 3))
    now = _manifest(item(b"a", 1), item(b"b", 2, ctime=9), item(b"d", 4))
    found = manifest.delta(before, now)
    assert [i.path for i in found.send] == [b"b", b"d"] and found.remove == (b"c",)


def test_delta_takes_all_names_of_a_file_together() -> None:
    before = _manifest(item(b"a", 1, 2), item(b"b", 1, 2))
    now = _manifest(item(b"a", 1, 1, ctime=9), item(b"b", 7, 1, ctime=9))
    assert [i.path for i in manifest.delta(before, now).send] == [b"a", b"b"]
    now = _manifest(item(b"a", 1, 3, ctime=9), item(b"b", 1, 3, ctime=9), item(b"c", 1, 3, ctime=9))
    assert [i.path for i in manifest.delta(before, now).send] == [b"a", b"b", b"c"]


def test_delta_sends_again_what_changed_just_before_the_look() -> None:
    racy = Item(b"a", stat.S_IFREG, 0, 0, 5, 0, 0, 999_990_000, (1, 1), 1, 1_000_000_000)
    assert [i.path for i in manifest.delta(_manifest(racy), _manifest(racy)).send] == [b"a"]


def test_delta_removes_what_became_something_else() -> None:
    before = _manifest(item(b"a", 1, mode=stat.S_IFDIR | 0o755), item(b"a/b", 2))
    now = _manifest(item(b"a", 3))
    assert manifest.delta(before, now).remove == (b"a/b", b"a")


def test_ssh_g() -> None:
    config = {
        "hostname": ["h.example"],
        "port": ["2222"],
        "user": ["u"],
        "proxyjump": ["j1,j2"],
        "identityfile": ["~/.ssh/a", "~/.ssh/b"],
    }
    config["userknownhostsfile"] = ["/a /b"]
    found = host.parse("h", config)
    assert found.proxy_command == "ssh -J j1 -o BatchMode=yes -W [h.example]:2222 j2"
    assert found.known_hosts == ("/a", "/b") and found.identity_files == ("~/.ssh/a", "~/.ssh/b")
    assert found.address(seen_from_here=True).as_dict() == {"destination": "h", "port": 0}
    assert found.address(seen_from_here=False).as_dict() == {"destination": "u@h.example", "port": 2222}
    command = host.bulk_command(found.address(seen_from_here=False), "migrate agent")
    assert command[0] == "ssh" and command[-2:] == ["u@h.example", "migrate agent"] and "StrictHostKeyChecking=yes" in command
    assert command[command.index("-p") + 1] == "2222" and any("aes128-gcm" in c for c in command)


@pytest.mark.parametrize(
    "address",
    [
        {},
        {"destination": "-oProxyCommand=x", "port": 0},
        {"destination": "h; reboot", "port": 0},
        {"destination": "h", "port": "22"},
        {"destination": "h", "port": 70000},
        {"destination": 5, "port": 0},
    ],
)
def test_an_address_that_is_none(address: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        host.Address.from_json(address)


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 40))
def test_warming_leaves_memory_to_others(wanted: int, available: int) -> None:
    assert 0 <= warm.bytes_to_warm(wanted, available) <= min(wanted, available // 3 if available else 0, warm.MAX_BYTES)


def test_errors_cross_the_wire() -> None:
    again = from_dict(TransferFailed("x", hint="y").as_dict())
    assert (type(again), str(again)) == (TransferFailed, "x (y)")


def _pipe(data: bytes) -> Wire:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return Wire(FdStream(read, os.open("/dev/null", os.O_WRONLY), "the other side"))


@given(st.binary(max_size=2000))
def test_a_hostile_stream_is_an_error(data: bytes) -> None:
    wire = _pipe(data)
    try:
        with pytest.raises((ConnectionLost, ProtocolError)):
            while True:
                wire.receive()
    finally:
        wire.stream.close()


def test_a_shell_that_prints_is_no_agent() -> None:
    wire = _pipe(b"Welcome to host2!\n")
    with pytest.raises(HostUnfit, match="no Ferry agent"):
        greet(wire, "host2")
    wire.stream.close()


def test_a_command_that_is_gone_before_it_was_greeted_is_no_agent() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    wire = Wire(FdStream(ours.fileno(), ours.fileno(), "host2"))
    with ours, pytest.raises(HostUnfit, match="no Ferry agent could be started there: not found"):
        greet(wire, "host2", lambda: "not found\n")


def _frames(*frames: Frame | bytes) -> bytes:
    out = b""
    for frame in frames:
        out += struct.pack(">I", 1 << 31 | len(frame)) + frame if isinstance(frame, bytes) else _framed(frame)
    return out


def _framed(frame: Frame) -> bytes:
    data = frame.SerializeToString()
    return struct.pack(">I", len(data)) + data


def _receive(tmp_path: Path, *frames: Frame | bytes) -> None:
    (tmp_path / "root").mkdir(exist_ok=True)
    wire = _pipe(_frames(*frames))
    receiver = TreeReceiver(tmp_path / "root")
    try:
        receiver.receive(wire)
    finally:
        receiver.close()
        wire.stream.close()


FILE = stat.S_IFREG | 0o644
END = Frame(end_of_tree=EndOfTree(entries=1))


@pytest.mark.parametrize("path", [b"../x", b"/x", b"a/../../x", b"", b"a//b", b"./x", b".."])
def test_a_path_that_leads_out_is_refused(tmp_path: Path, path: bytes) -> None:
    with pytest.raises(ProtocolError):
        _receive(tmp_path, Frame(entry=Entry(path=path, mode=stat.S_IFIFO | 0o600)), END)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["root"]


def test_a_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    link = Frame(
        entry=Entry(
            path=b"link",
            mode=stat.S_IFLNK | 0o777,
            link_target=os.fsencode(tmp_path / "outside"),
            uid=os.geteuid(),
            gid=os.getegid(),
        )
    )
    through = Frame(entry=Entry(path=b"link/x", mode=stat.S_IFIFO | 0o600))
    with pytest.raises(TransferFailed):
        _receive(tmp_path, link, through, END)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_hard_link_does_not_lead_out(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    for target in (b"../secret", os.fsencode(tmp_path / "secret")):
        with pytest.raises(ProtocolError):
            _receive(tmp_path, Frame(entry=Entry(path=b"x", mode=FILE, hard_link_to=target)), END)


def test_content_that_differs_from_its_digest_is_refused(tmp_path: Path) -> None:
    entry = Frame(entry=Entry(path=b"x", mode=FILE, size=3, uid=os.geteuid(), gid=os.getegid()))
    segment = Frame(segment=Segment(offset=0, length=3))
    with pytest.raises(TransferFailed, match="digest"):
        _receive(tmp_path, entry, segment, b"abc", Frame(end_of_file=EndOfFile(digest=b"0" * 16)), END)


def test_a_segment_of_another_length_is_refused(tmp_path: Path) -> None:
    entry = Frame(entry=Entry(path=b"x", mode=FILE, size=3))
    with pytest.raises(ProtocolError):
        _receive(tmp_path, entry, Frame(segment=Segment(offset=0, length=9)), b"abc", Frame(end_of_file=EndOfFile()), END)


@pytest.mark.parametrize("size", [0, 1, 5000, 700_000])
def test_a_tree_survives_the_wire(tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/file").write_bytes(os.urandom(size))
    with (source / "holes").open("wb") as f:
        f.seek(3 << 20)
        f.write(b"x" * size)
    (source / "link").symlink_to("d/file")
    pipe = tmp_path / "stream"
    out = os.open(pipe, os.O_WRONLY | os.O_CREAT)
    sender = TreeSender(Outlet(Wire(_File(out))), source, lambda: None)
    for entry in scan(source).values():
        assert sender.send(entry)
    sender.close()
    (tmp_path / "root").mkdir()
    receiver = TreeReceiver(tmp_path / "root")
    receiver.receive(_pipe_file(pipe))
    receiver.close()
    assert (tmp_path / "root/d/file").read_bytes() == (source / "d/file").read_bytes()
    assert (tmp_path / "root/holes").read_bytes() == (source / "holes").read_bytes()
    assert os.readlink(tmp_path / "root/link") == "d/file"


class _File:
    """A stream over plain files, which poll(2) does not know."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read_into(self, buffer: memoryview) -> None:
        while buffer:
            buffer = buffer[self.read_some(buffer) :]

    def read_some(self, buffer: memoryview) -> int:
        return os.readv(self._fd, [buffer])

    def write(self, data: bytes | memoryview) -> None:
        os.write(self._fd, data)

    def close(self) -> None:
        os.close(self._fd)


def _pipe_file(path: Path) -> Wire:
    with path.open("ab") as f:
        f.write(_framed(END))
    return Wire(_File(os.open(path, os.O_RDONLY)))


def test_the_generated_messages_are_those_of_the_proto_file(tmp_path: Path) -> None:
    from grpc_tools import protoc

    from migrate import wire_pb2

    root = Path(host.__file__).parent
    assert protoc.main(["protoc", f"-I{root}", f"--descriptor_set_out={tmp_path}/set", str(root / "wire.proto")]) == 0
    from google.protobuf.descriptor_pb2 import FileDescriptorSet

    built = FileDescriptorSet.FromString((tmp_path / "set").read_bytes()).file[0]
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    for message in built.message_type:
        for part in (message, *message.nested_type):
            for field in part.field:
                field.ClearField("json_name")  # derived from the name; generated code leaves it out
    assert FileDescriptorProto.FromString(wire_pb2.DESCRIPTOR.serialized_pb) == built
