"""linux.resources as frozen values, and their reading.

Source: OCI runtime specification 1.2, config-linux.md, Control groups.
"""

from __future__ import annotations

from collections.abc import Mapping

from runtime.spec.reader import Reader
from runtime.values import Value


class DeviceRule(Value):
    allow: bool
    type: str  # a, b, c
    major: int | None
    minor: int | None
    access: str


class Memory(Value):
    """Units: bytes; -1 is no limit; swappiness in percent."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None  # memory and swap together, as on cgroup v1
    kernel: int | None = None
    kernel_tcp: int | None = None
    swappiness: int | None = None
    disable_oom_killer: bool = False
    check_before_update: bool = False


class Cpu(Value):
    """Units: shares are relative; quota, burst and periods in microseconds."""

    shares: int | None = None
    quota_us: int | None = None
    burst_us: int | None = None
    period_us: int | None = None
    realtime_runtime_us: int | None = None
    realtime_period_us: int | None = None
    cpus: str | None = None
    mems: str | None = None
    idle: int | None = None


class DeviceValue(Value):
    """A value for one block device: a rate, or a weight."""

    major: int
    minor: int
    value: int


class BlockIO(Value):
    """Units: weights from 10 to 1000; rates in bytes or operations per second."""

    weight: int | None = None
    leaf_weight: int | None = None
    weight_device: tuple[DeviceValue, ...] = ()
    leaf_weight_device: tuple[DeviceValue, ...] = ()
    throttle: Mapping[str, tuple[DeviceValue, ...]] = {}  # read_bps write_bps read_iops write_iops


class Rdma(Value):
    handles: int | None
    objects: int | None


class Resources(Value):
    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    pids_limit: int | None = None
    devices: tuple[DeviceRule, ...] = ()
    block_io: BlockIO = BlockIO()
    hugepage_limits: tuple[tuple[str, int], ...] = ()  # page size such as 2MB -> bytes
    network_class_id: int | None = None
    network_priorities: tuple[tuple[str, int], ...] = ()  # interface -> priority
    rdma: Mapping[str, Rdma] = {}
    unified: Mapping[str, str] = {}


THROTTLES = {
    "read_bps": "throttleReadBpsDevice",
    "write_bps": "throttleWriteBpsDevice",
    "read_iops": "throttleReadIOPSDevice",
    "write_iops": "throttleWriteIOPSDevice",
}


def read(r: Reader) -> Resources:
    """Read linux.resources, or the document that `update --resources` takes; violations are noted in the reader."""
    network = r.object("network")
    hugepages = r.objects("hugepageLimits")
    rdma = r.object("rdma")
    priorities = network.objects("priorities")
    unified = r.text_map("unified")
    for name in unified:
        if "/" in name or name in ("", ".", ".."):
            r.object("unified").wrong(name, "is no name of a cgroup file")
    return Resources(
        memory=_memory(r.object("memory")),
        cpu=_cpu(r.object("cpu")),
        pids_limit=r.object("pids").integer_or_none("limit"),
        devices=tuple(_device_rule(d) for d in r.objects("devices")),
        block_io=_block_io(r.object("blockIO")),
        hugepage_limits=tuple((h.text("pageSize"), h.integer("limit", 0)) for h in hugepages),
        network_class_id=network.integer_or_none("classID", 0, 0xFFFFFFFF),
        network_priorities=tuple((p.text("name"), p.integer("priority", 0, 0xFFFFFFFF)) for p in priorities),
        rdma={
            name: Rdma(*(rdma.object(name).integer_or_none(n, 0, 0xFFFFFFFF) for n in ("hcaHandles", "hcaObjects")))
            for name in rdma.keys()  # noqa: SIM118 - a reader is no mapping
        },
        unified=unified,
    )


def _memory(r: Reader) -> Memory:
    return Memory(
        limit=r.integer_or_none("limit", -1),
        reservation=r.integer_or_none("reservation", -1),
        swap=r.integer_or_none("swap", -1),
        kernel=r.integer_or_none("kernel", -1),
        kernel_tcp=r.integer_or_none("kernelTCP", -1),
        swappiness=r.integer_or_none("swappiness", 0, 100),
        disable_oom_killer=r.flag("disableOOMKiller"),
        check_before_update=r.flag("checkBeforeUpdate"),
    )


def _cpu(r: Reader) -> Cpu:
    return Cpu(
        shares=r.integer_or_none("shares", 0),
        quota_us=r.integer_or_none("quota"),
        burst_us=r.integer_or_none("burst", 0),
        period_us=r.integer_or_none("period", 0),
        realtime_runtime_us=r.integer_or_none("realtimeRuntime"),
        realtime_period_us=r.integer_or_none("realtimePeriod", 0),
        cpus=r.text_or_none("cpus") or None,
        mems=r.text_or_none("mems") or None,
        idle=r.integer_or_none("idle", 0, 1),
    )


def _block_io(r: Reader) -> BlockIO:
    def devices(key: str, member: str) -> tuple[DeviceValue, ...]:
        return tuple(
            DeviceValue(d.integer("major", 0), d.integer("minor", 0), d.integer(member, 0))
            for d in r.objects(key)
            if d.has(member)
        )

    return BlockIO(
        weight=r.integer_or_none("weight", 0, 1000),
        leaf_weight=r.integer_or_none("leafWeight", 0, 1000),
        weight_device=devices("weightDevice", "weight"),
        leaf_weight_device=devices("weightDevice", "leafWeight"),
        throttle={name: devices(key, "rate") for name, key in THROTTLES.items() if r.has(key)},
    )


def _device_rule(r: Reader) -> DeviceRule:
    """Read one entry of resources.devices; a missing or negative number means any."""
    access = r.text_or_none("access") or "rwm"
    if set(access) - set("rwm"):
        r.wrong("access", f"{access!r} is not made of r, w and m")
    numbers = [r.integer_or_none(n, -1, 0xFFFFFFFF) for n in ("major", "minor")]
    major, minor = (None if n is None or n < 0 else n for n in numbers)
    return DeviceRule(r.flag("allow"), r.choice("type", ("a", "b", "c"), "a"), major, minor, access)
