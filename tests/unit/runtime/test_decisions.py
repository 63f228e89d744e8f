"""The pure part of the runtime: documents, plans, tables."""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.cgroups import devices, layout, resources
from runtime.cgroups.manager import container_paths
from runtime.container.lifecycle import ALLOWED, Status, derive, require
from runtime.criu import advice, features, network, request
from runtime.criu.findings import REMEDY
from runtime.criu.options import CheckpointOptions, NetworkLock
from runtime.errors import SpecError, WrongStatus, from_dict
from runtime.linux import const, procfs
from runtime.setup import ops
from runtime.setup.plan import DEFAULT_DEVICE_RULES, bind_mounts, destination, plan
from runtime.spec import config, mount_options, parse, state, validate
from runtime.spec import resources as spec_resources
from runtime.spec.defaults import default_config, rootless_config
from runtime.spec.resources import DeviceRule


def spec(**linux: Any) -> config.Spec:
    document = default_config()
    document["linux"].update(linux)
    return parse.parse(document)[0]


def problems(document: Any) -> list[str]:
    parsed, found = parse.parse(document)
    return found + validate.check(parsed, document)


@pytest.mark.parametrize("document", [default_config(), rootless_config(1000, 1000)])
def test_the_default_configs_are_valid(document: Any) -> None:
    assert problems(document) == []


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c) | st.dictionaries(st.text(), c)))
def test_any_json_is_parsed_or_refused(document: Any) -> None:
    assert problems(document) != []


@given(
    st.sampled_from(["process", "root", "mounts", "linux", "hooks", "hostname", "annotations"]),
    st.integers() | st.text() | st.lists(st.integers(), min_size=1),
)
def test_a_member_of_another_type_is_named(member: str, value: Any) -> None:
    document = default_config()
    document[member] = value
    if member == "hostname" and isinstance(value, str):
        return
    assert any(p.startswith(f"/{member}") for p in problems(document))


def test_every_violation_is_told_at_once() -> None:
    document = default_config()
    document["process"].update(cwd="here", args=[], env=["X"], oomScoreAdj=5000)
    document["mounts"].append({"destination": "", "type": "bind"})
    document["linux"]["namespaces"].append({"type": "moon"})
    document["linux"].update(uidMappings=[{"containerID": 0, "hostID": 0, "size": 0}], rootfsPropagation="loud")
    document["linux"]["resources"]["memory"] = {"swappiness": 101}
    document["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_NOTIFY", "syscalls": [{"names": []}]}
    found = "\n".join(problems(document))
    for pointer in (
        "/process/cwd", "/process/args", "/process/env/0", "/process/oomScoreAdj", "/mounts/7/destination",
        "/linux/namespaces/6/type", "/linux/uidMappings/0/size", "/linux/uidMappings: need", "/linux/rootfsPropagation",
        "/linux/resources/memory/swappiness", "/linux/seccomp/defaultAction", "/linux/seccomp/syscalls/0/names",
        "/linux/seccomp/syscalls/0/action",
    ):  # fmt: skip
        assert f"{pointer}" in found, f"{pointer} is not in\n{found}"


@given(st.text(alphabet="/.ab", max_size=20))
def test_a_destination_never_climbs(path: str) -> None:
    found = destination(path)
    assert found.startswith("/") and not found.startswith("//") and ".." not in found.split("/")


def test_plan_order() -> None:
    setup = plan(parse.parse(default_config())[0], "/bundle")
    kinds = [type(op).__name__ for op in setup.after_hooks]
    assert kinds[0] == "PivotRoot"
    assert kinds.index("RemountReadonly") < kinds.index("ReadonlyPath") < kinds.index("MaskPath")
    assert isinstance(setup.before_hooks[0], ops.LoopbackUp)
    paths = [op.path for op in setup.before_hooks if isinstance(op, ops.MakeNode)]
    assert "/dev/null" in paths and len(paths) == 6


def test_dev_becomes_readonly_only_after_its_nodes() -> None:
    document = default_config()
    next(m for m in document["mounts"] if m["destination"] == "/dev")["options"].append("ro")
    setup = plan(parse.parse(document)[0], "/bundle")
    mount = next(op for op in setup.before_hooks if isinstance(op, ops.Mount) and op.destination == "/dev")
    assert not mount.flags & const.MS_RDONLY
    assert ops.RemountReadonly("/dev") in setup.after_hooks


def test_bind_mounts_are_found_with_absolute_sources() -> None:
    document = default_config()
    document["mounts"] += [
        {"destination": "data", "source": "here", "options": ["rbind"]},
        {"destination": "/x", "type": "bind", "source": "/y"},
    ]
    assert bind_mounts(parse.parse(document)[0], "/bundle") == {"/data": "/bundle/here", "/x": "/y"}


def test_mount_options() -> None:
    parsed = mount_options.parse(("ro", "nosuid", "rslave", "size=1k", "rw", "mode=755"))
    assert (parsed.flags, parsed.propagation, parsed.data) == (
        const.MS_NOSUID,
        (const.MS_SLAVE | const.MS_REC,),
        "size=1k,mode=755",
    )
    parsed = mount_options.parse(("tmpcopyup", "rro", "rnoexec", "rexec", "rnoatime", "ridmap"))
    assert (parsed.copy_up, parsed.idmap, parsed.data) == (True, "ridmap", "")
    assert parsed.recursive_set == const.MOUNT_ATTR_RDONLY | const.MOUNT_ATTR_NOATIME
    assert parsed.recursive_clear == const.MOUNT_ATTR_NOEXEC | const.MOUNT_ATTR__ATIME


@given(st.lists(st.sampled_from(mount_options.ALL)))
def test_recursive_attributes_never_contradict(options: list[str]) -> None:
    parsed = mount_options.parse(tuple(options))
    one_bit = parsed.recursive_set & parsed.recursive_clear & ~const.MOUNT_ATTR__ATIME
    assert not one_bit and not (parsed.recursive_set & const.MOUNT_ATTR__ATIME and not parsed.recursive_clear)


@pytest.mark.parametrize(("verb", "status"), list(product(ALLOWED, Status)))
def test_lifecycle_table(verb: str, status: Status) -> None:
    if status in ALLOWED[verb]:
        require(verb, "c", status)
    else:
        with pytest.raises(WrongStatus):
            require(verb, "c", status)


@pytest.mark.parametrize(
    ("pid", "alive", "waits", "frozen", "creating", "expected"),
    [
        (0, False, False, False, True, Status.CREATING),
        (9, True, True, False, False, Status.CREATED),
        (9, True, False, False, False, Status.RUNNING),
        (9, True, False, True, False, Status.PAUSED),
        (9, False, False, False, False, Status.STOPPED),
        (9, False, False, True, False, Status.STOPPED),
    ],
)
def test_status_is_derived(pid: int, alive: bool, waits: bool, frozen: bool, creating: bool, expected: Status) -> None:
    assert derive(pid=pid, alive=alive, waits_for_start=waits, frozen=frozen, being_created=creating) == expected


V1_MOUNTS = """30 20 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
V1_OWN = "3:cpu,cpuacct:/user\n1:name=systemd:/user/session\n0::/user\n"


def test_layout_hybrid() -> None:
    found = layout.detect(procfs.parse_mountinfo(V1_MOUNTS), V1_OWN)
    assert found.mode == "hybrid"
    cpu = found.of("cpuacct")
    assert cpu is not None and (cpu.key, cpu.aliases, cpu.mount_data) == ("cpu", ("cpu", "cpuacct"), "cpu,cpuacct")
    assert container_paths(found, None, "c")["cpu"] == "/sys/fs/cgroup/cpu,cpuacct/user/c"
    assert container_paths(found, "/a/b", "c")[""] == "/sys/fs/cgroup/unified/a/b"


def test_layout_v2_is_beside_the_caller() -> None:
    found = layout.detect(procfs.parse_mountinfo("33 20 0:29 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), "0::/user/session\n")
    assert found.mode == "v2"
    assert container_paths(found, None, "c") == {"": "/sys/fs/cgroup/user/c"}
    assert container_paths(found, "../../x", "c")[""].startswith("/sys/fs/cgroup/")


def _limits(**r: Any) -> spec_resources.Resources:
    return spec(resources=r).linux.resources


def test_limits_of_v1_and_v2() -> None:
    r = _limits(memory={"limit": 100, "swap": 300}, cpu={"shares": 1024, "quota": 5, "period": 10}, pids={"limit": -1})
    v1 = {w.file: w.value for w in resources.v1_writes(r)}
    assert v1["memory.memsw.limit_in_bytes"] == "300" and v1["pids.max"] == "max" and v1["cpu.cfs_quota_us"] == "5"
    v2 = {w.file: w.value for w in resources.v2_writes(r)}
    assert v2 == {"memory.max": "100", "memory.swap.max": "200", "cpu.weight": "39", "cpu.max": "5 10", "pids.max": "max"}
    with pytest.raises(SpecError, match="unified"):
        resources.v1_writes(_limits(unified={"memory.high": "1"}))
    with pytest.raises(SpecError, match="swap"):
        resources.v2_writes(_limits(memory={"limit": 100, "swap": 50}))


@given(st.integers(0, 1 << 20))
def test_weights_are_in_range(shares: int) -> None:
    assert 1 <= resources.shares_to_weight(shares) <= 10000


def _interpret(program: bytes, kind: int, access: int, major: int, minor: int) -> bool:
    """Run a device program: an eBPF interpreter of the instructions that it uses."""
    code = [struct.unpack("<BBhI", program[i : i + 8]) for i in range(0, len(program), 8)]
    memory = struct.pack("<III", access << 16 | kind, major, minor)
    r, pc = [0] * 11, 0
    while True:
        op, regs, off, imm = code[pc]
        dst, src = regs & 15, regs >> 4
        pc += 1
        if op == 0x61:
            r[dst] = struct.unpack_from("<I", memory, off)[0]
        elif op == 0x57:
            r[dst] &= imm
        elif op == 0x77:
            r[dst] >>= imm
        elif op == 0xB7:
            r[dst] = imm
        elif op == 0xBF:
            r[dst] = r[src]
        elif op == 0x56:
            pc += off if r[dst] != imm else 0
        elif op == 0x16:
            pc += off if r[dst] == imm else 0
        elif op == 0x5E:
            pc += off if r[dst] != r[src] else 0
        elif op == 0x95:
            return bool(r[0])
        else:
            raise AssertionError(f"unknown instruction {op:#x}")


def _model(rules: tuple[DeviceRule, ...], kind: str, access: set[str], major: int, minor: int) -> bool:
    for rule in reversed(rules):
        same = rule.type in ("a", kind) and rule.major in (None, major) and rule.minor in (None, minor)
        if same and (access <= set(rule.access) if rule.allow else access & set(rule.access)):
            return rule.allow
    return False


_RULES = st.builds(
    DeviceRule, st.booleans(), st.sampled_from("abc"), st.none() | st.integers(0, 3), st.none() | st.integers(0, 3),
    st.sampled_from(["r", "w", "m", "rw", "rwm"]),
)  # fmt: skip


@given(
    st.lists(_RULES, max_size=6),
    st.sampled_from("bc"),
    st.sets(st.sampled_from("rwm"), min_size=1),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_device_program_says_what_the_rules_say(
    rules: list[DeviceRule], kind: str, access: set[str], major: int, minor: int
) -> None:
    bits = sum({"m": 1, "r": 2, "w": 4}[a] for a in access)
    answer = _interpret(devices.v2_program(tuple(rules)), {"b": 1, "c": 2}[kind], bits, major, minor)
    assert answer == _model(tuple(devices.merged(tuple(rules))), kind, access, major, minor)


def test_device_text_of_v1() -> None:
    assert devices.v1_text(DeviceRule(False, "a", None, None, "rwm")) == "a"
    assert devices.v1_text(DeviceRule(True, "c", 136, None, "rw")) == "c 136:* rw"
    assert devices.v1_text(DEFAULT_DEVICE_RULES[2]) == "c 1:3 rwm"


def criu_facts(**changes: Any) -> request.ContainerFacts:
    facts = {"only_loopback": False, "has_nft": True, "has_iptables": True, "rebuild_network": False, "ghost_bytes": 0}
    return request.ContainerFacts(7, "/r", {"/d": "/s"}, ("net[1]:k",), ("file[a:b]",), "/f", **{**facts, **changes})


def test_network_lock(tmp_path: Any) -> None:
    def lock(chosen: NetworkLock | None = None, tcp: bool = False, **changes: Any) -> NetworkLock:
        options = CheckpointOptions(tmp_path, tmp_path, tcp_established=tcp, network_lock=chosen)
        return request.network_lock(options, criu_facts(**changes))

    assert lock() == NetworkLock.NFTABLES
    assert lock(has_nft=False) == NetworkLock.IPTABLES
    assert lock(has_nft=False, has_iptables=False) == NetworkLock.SKIP
    assert lock(only_loopback=True) == NetworkLock.SKIP
    assert lock(only_loopback=True, tcp=True) == NetworkLock.NFTABLES
    assert lock(NetworkLock.IPTABLES) == NetworkLock.IPTABLES


def test_dump_request(tmp_path: Any) -> None:
    options = CheckpointOptions(tmp_path, tmp_path, tcp_established=True)
    fields = request.dump(options, criu_facts())
    assert (fields["pid"], fields["freeze_cgroup"], fields["tcp_established"]) == (7, "/f", True)
    assert fields["external"] == ["mnt[/d]:/d", "net[1]:k", "file[a:b]"]
    assert fields["ghost_limit"] == 1 << 20 and fields["ps"] is None and fields["track_mem"] is None
    assert request.dump(options, criu_facts(ghost_bytes=5 << 20))["ghost_limit"] > 5 << 20
    with_parent = criu_facts(parent_image="../1")
    assert (request.dump(options, with_parent)["parent_img"], request.dump(options, with_parent)["track_mem"]) == ("../1", True)
    assert request.dump(options, request.without_parent(with_parent))["parent_img"] is None
    pre = request.pre_dump(options, with_parent)
    assert pre["track_mem"] and "freeze_cgroup" not in pre


def test_a_network_is_rebuilt_only_when_the_container_cannot_change_it() -> None:
    assert network.can_rebuild(parse.parse(default_config())[0])
    document = default_config()
    document["process"]["capabilities"]["bounding"].append("CAP_NET_ADMIN")
    assert not network.can_rebuild(parse.parse(document)[0])
    assert not network.can_rebuild(spec(namespaces=[{"type": "network", "path": "/run/netns/x"}]))


def test_every_advice_has_a_remedy() -> None:
    assert {code for _, code in advice._CODES} <= set(REMEDY)


def test_advice() -> None:
    log = (
        "(00.1) Error (criu/util.c:1534): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
        "(00.2) Warn  (x): y\n(00.3) Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.\n"
    )
    lines = advice.error_lines(log)
    assert lines == ("Error (criu/sk-inet.c:200): inet: Connected TCP socket, consider using --tcp-established option.",)
    assert "--tcp-established" in (advice.advise(lines) or "")
    assert advice.advise(("Error (x): something new",)) is None


@pytest.mark.parametrize(
    ("kernel", "expected"), [("6.1.0-18-amd64", (4, 1, 0)), ("6.13.2", (4, 1, 1)), ("6.18.44", (4, 2, 0)), ("x", (4, 1, 0))]
)
def test_the_criu_that_a_kernel_needs(kernel: str, expected: tuple[int, int, int]) -> None:
    assert features.needed(kernel) == expected


def test_state_survives_json() -> None:
    s = state.State("c", "/b", "/b/rootfs", "now", "root", 5, 99, {"": "/x"}, ("a", "b", "c"))
    assert state.from_json(state.to_json(s)) == s
    with pytest.raises(SpecError):
        state.from_json({"version": 1})
    with pytest.raises(SpecError):
        state.from_json([])


def test_errors_cross_a_pipe() -> None:
    error = WrongStatus("no", hint="yes")
    again = from_dict(error.as_dict())
    assert (type(again), str(again)) == (WrongStatus, "no (yes)")


def test_stat_with_a_hostile_name() -> None:
    text = "7 (a) S 9 (b)) R 3 " + " ".join(str(n) for n in range(5, 60))
    assert procfs.parse_stat(text).ppid == 3


def test_what_two_rules_allow_of_a_device_can_be_asked_for_at_once() -> None:
    read, write = (DeviceRule(True, "c", 7, 2**31, a) for a in "rw")
    assert _interpret(devices.v2_program((read, write)), 2, 6, 7, 2**31)
    assert not _interpret(devices.v2_program((read, DeviceRule(False, "c", 7, 2**31, "r"), write)), 2, 6, 7, 2**31)
