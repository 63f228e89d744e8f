"""linux.resources -> the files to write, for v1 and v2. Pure."""

from __future__ import annotations

from runtime.errors import SpecError, Unsupported
from runtime.spec.resources import DeviceValue, Resources
from runtime.values import Value


class Write(Value):
    """Write `value` to `file` in the directory of `controller`; `why` is the JSON pointer that asked for it.

    Kernels name some files differently: then `instead` is what to write where `file` is not there.
    """

    controller: str
    file: str
    value: str
    why: str
    instead: tuple[str, str] | None = None


_THROTTLES = {
    "read_bps": ("blkio.throttle.read_bps_device", "rbps"),
    "write_bps": ("blkio.throttle.write_bps_device", "wbps"),
    "read_iops": ("blkio.throttle.read_iops_device", "riops"),
    "write_iops": ("blkio.throttle.write_iops_device", "wiops"),
}


class _Writes(list[Write]):
    def add(self, controller: str, file: str, value: int | str | None, why: str, instead: tuple[str, str] | None = None) -> None:
        if value is not None:
            self.append(Write(controller, file, str(value), f"/linux/resources/{why}", instead))


def v1_writes(r: Resources) -> list[Write]:
    """Return the writes for v1 controllers, in order. Raises: SpecError."""
    if r.unified:
        raise SpecError("/linux/resources/unified: needs a cgroup v2 host", hint="this host has v1 controllers")
    w = _Writes()
    _v1_memory(w, r)
    cpu = r.cpu
    w.add("cpu", "cpu.shares", cpu.shares or None, "cpu/shares")
    w.add("cpu", "cpu.rt_period_us", cpu.realtime_period_us or None, "cpu/realtimePeriod")
    w.add("cpu", "cpu.rt_runtime_us", cpu.realtime_runtime_us or None, "cpu/realtimeRuntime")
    w.add("cpu", "cpu.cfs_period_us", cpu.period_us or None, "cpu/period")
    w.add("cpu", "cpu.cfs_quota_us", cpu.quota_us or None, "cpu/quota")
    w.add("cpu", "cpu.cfs_burst_us", cpu.burst_us, "cpu/burst")
    w.add("cpu", "cpu.idle", cpu.idle, "cpu/idle")
    w.add("cpuset", "cpuset.cpus", cpu.cpus, "cpu/cpus")
    w.add("cpuset", "cpuset.mems", cpu.mems, "cpu/mems")
    w.add("pids", "pids.max", _or_max(r.pids_limit), "pids/limit")
    io = r.block_io
    if io.weight:
        w.add("blkio", "blkio.weight", io.weight, "blockIO/weight", ("blkio.bfq.weight", str(io.weight)))
    w.add("blkio", "blkio.leaf_weight", io.leaf_weight or None, "blockIO/leafWeight")
    for d in io.weight_device:
        value = f"{d.major}:{d.minor} {d.value}"
        w.add("blkio", "blkio.weight_device", value, "blockIO/weightDevice", ("blkio.bfq.weight_device", value))
    for d in io.leaf_weight_device:
        w.add("blkio", "blkio.leaf_weight_device", f"{d.major}:{d.minor} {d.value}", "blockIO/weightDevice")
    for name, devices in io.throttle.items():
        for d in devices:
            w.add("blkio", _THROTTLES[name][0], f"{d.major}:{d.minor} {d.value}", f"blockIO/throttle ({name})")
    for size, limit in r.hugepage_limits:
        w.add("hugetlb", f"hugetlb.{size}.limit_in_bytes", limit, "hugepageLimits", (f"hugetlb.{size}.max", str(limit)))
    w.add("net_cls", "net_cls.classid", r.network_class_id, "network/classID")
    for interface, priority in r.network_priorities:
        w.add("net_prio", "net_prio.ifpriomap", f"{interface} {priority}", "network/priorities")
    _rdma(w, "rdma", r)
    return w


def _v1_memory(w: _Writes, r: Resources) -> None:
    memory = r.memory
    # The kernel refuses a limit above memory+swap's at every moment: raise that first when both grow.
    if memory.limit is not None and memory.swap is not None and memory.swap != -1:
        w.add("memory", "memory.limit_in_bytes", memory.limit, "memory/limit")
        w.add("memory", "memory.memsw.limit_in_bytes", memory.swap, "memory/swap")
    else:
        w.add("memory", "memory.memsw.limit_in_bytes", memory.swap, "memory/swap")
        w.add("memory", "memory.limit_in_bytes", memory.limit, "memory/limit")
    w.add("memory", "memory.soft_limit_in_bytes", memory.reservation, "memory/reservation")
    w.add("memory", "memory.kmem.limit_in_bytes", memory.kernel, "memory/kernel")
    w.add("memory", "memory.kmem.tcp.limit_in_bytes", memory.kernel_tcp, "memory/kernelTCP")
    w.add("memory", "memory.swappiness", memory.swappiness, "memory/swappiness")
    if memory.disable_oom_killer:
        w.add("memory", "memory.oom_control", 1, "memory/disableOOMKiller")


def v2_writes(r: Resources) -> list[Write]:
    """Return the writes for the v2 tree, in order. Raises: SpecError; Unsupported for what only v1 has."""
    memory, cpu = r.memory, r.cpu
    for name, unknown in (
        ("memory/kernel", memory.kernel), ("memory/kernelTCP", memory.kernel_tcp), ("memory/swappiness", memory.swappiness),
        ("memory/disableOOMKiller", memory.disable_oom_killer or None),
        ("cpu/realtimeRuntime", cpu.realtime_runtime_us or None), ("cpu/realtimePeriod", cpu.realtime_period_us or None),
        ("blockIO/leafWeight", r.block_io.leaf_weight or None), ("network/classID", r.network_class_id or None),
        ("network/priorities", r.network_priorities or None),
    ):  # fmt: skip
        if unknown is not None:
            raise Unsupported(f"/linux/resources/{name}: cgroup v2 has no such limit", hint="remove it from config.json")
    w = _Writes()
    w.add("", "memory.max", _or_max(memory.limit, zero_is_unset=True), "memory/limit")
    w.add("", "memory.low", _or_max(memory.reservation, zero_is_unset=True), "memory/reservation")
    if memory.swap == -1:
        w.add("", "memory.swap.max", "max", "memory/swap")
    elif memory.swap:
        if memory.limit is None or memory.limit < 0 or memory.swap < memory.limit:
            raise SpecError("/linux/resources/memory/swap: must be memory and swap together, at least /limit")
        w.add("", "memory.swap.max", memory.swap - memory.limit, "memory/swap")
    w.add("", "cpu.idle", cpu.idle, "cpu/idle")
    if cpu.shares and not cpu.idle:  # an idle group has no weight
        w.add("", "cpu.weight", shares_to_weight(cpu.shares), "cpu/shares")
    if cpu.quota_us or cpu.period_us:
        quota = str(cpu.quota_us) if cpu.quota_us and cpu.quota_us > 0 else "max"
        w.add("", "cpu.max", f"{quota} {cpu.period_us or 100_000}", "cpu/quota")
    w.add("", "cpu.max.burst", cpu.burst_us, "cpu/burst")
    w.add("", "cpuset.cpus", cpu.cpus, "cpu/cpus")
    w.add("", "cpuset.mems", cpu.mems, "cpu/mems")
    w.add("", "pids.max", _or_max(r.pids_limit), "pids/limit")
    io = r.block_io
    if io.weight:
        w.add("", "io.bfq.weight", io.weight, "blockIO/weight", ("io.weight", str(blkio_to_io_weight(io.weight))))
    for d in io.weight_device:
        value = f"{d.major}:{d.minor} {d.value}"
        other = f"{d.major}:{d.minor} {blkio_to_io_weight(d.value)}"
        w.add("", "io.bfq.weight", value, "blockIO/weightDevice", ("io.weight", other))
    for name, devices in io.throttle.items():
        for d in devices:
            w.add("", "io.max", _io_max(d, name), f"blockIO/throttle ({name})")
    for size, limit in r.hugepage_limits:
        w.add("", f"hugetlb.{size}.max", limit, "hugepageLimits")
    _rdma(w, "", r)
    for file, text in r.unified.items():
        w.add("", file, text, f"unified/{file}")
    return w


def _io_max(d: DeviceValue, name: str) -> str:
    return f"{d.major}:{d.minor} {_THROTTLES[name][1]}={d.value or 'max'}"


def _rdma(w: _Writes, controller: str, r: Resources) -> None:
    for device, limits in r.rdma.items():
        values = [f"{k}={v}" for k, v in (("hca_handle", limits.handles), ("hca_object", limits.objects)) if v is not None]
        w.add(controller, "rdma.max", " ".join([device, *values]), f"rdma/{device}")


def shares_to_weight(shares: int) -> int:
    """Map v1's cpu.shares (2 to 262144, usually 1024) onto v2's cpu.weight (1 to 10000, usually 100).

    Source: the linear mapping that runc 1.2 and crun 1.8 use.
    """
    clamped = min(max(shares, 2), 262144)
    return 1 + (clamped - 2) * 9999 // 262142


def blkio_to_io_weight(weight: int) -> int:
    """Map v1's blkio.weight (10 to 1000) onto v2's io.weight (1 to 10000). Source: as runc and crun."""
    return 1 + (max(weight, 10) - 10) * 9999 // 990


def _or_max(value: int | None, zero_is_unset: bool = False) -> str | None:
    if value is None or (value == 0 and zero_is_unset):
        return None
    return "max" if value < 0 or (value == 0 and not zero_is_unset) else str(value)


def v1_device_writes(rules: list[tuple[bool, str]]) -> list[Write]:
    """Return the writes to devices.allow and devices.deny for rules as (allow, text)."""
    return [
        Write("devices", "devices.allow" if allow else "devices.deny", text, "/linux/resources/devices") for allow, text in rules
    ]
