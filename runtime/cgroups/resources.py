"""linux.resources -> the files to write, for v1 and v2. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import SpecError
from runtime.spec.config import Resources


@dataclass(frozen=True, slots=True)
class Write:
    """Write `value` to `file` in the directory of `controller`; `why` is the JSON pointer that asked for it."""

    controller: str
    file: str
    value: str
    why: str


def v1_writes(r: Resources) -> list[Write]:
    """Return the writes for v1 controllers, in order. Raises: SpecError."""
    if r.unified:
        raise SpecError("/linux/resources/unified: needs a cgroup v2 host", hint="this host has v1 controllers")
    writes = []
    memory, cpu = r.memory, r.cpu

    def add(controller: str, file: str, value: int | str | None, why: str) -> None:
        if value is not None:
            writes.append(Write(controller, file, str(value), f"/linux/resources/{why}"))

    # The kernel refuses a limit above memory+swap's at every moment: raise that first when both grow.
    if memory.limit is not None and memory.swap is not None and memory.swap != -1:
        add("memory", "memory.limit_in_bytes", memory.limit, "memory/limit")
        add("memory", "memory.memsw.limit_in_bytes", memory.swap, "memory/swap")
    else:
        add("memory", "memory.memsw.limit_in_bytes", memory.swap, "memory/swap")
        add("memory", "memory.limit_in_bytes", memory.limit, "memory/limit")
    add("memory", "memory.soft_limit_in_bytes", memory.reservation, "memory/reservation")
    add("cpu", "cpu.shares", cpu.shares or None, "cpu/shares")
    add("cpu", "cpu.cfs_period_us", cpu.period_us or None, "cpu/period")
    add("cpu", "cpu.cfs_quota_us", cpu.quota_us or None, "cpu/quota")
    add("cpuset", "cpuset.cpus", cpu.cpus, "cpu/cpus")
    add("cpuset", "cpuset.mems", cpu.mems, "cpu/mems")
    add("pids", "pids.max", _or_max(r.pids_limit), "pids/limit")
    return writes


def v2_writes(r: Resources) -> list[Write]:
    """Return the writes for the v2 tree, in order. Raises: SpecError."""
    writes = []
    memory, cpu = r.memory, r.cpu

    def add(file: str, value: int | str | None, why: str) -> None:
        if value is not None:
            writes.append(Write("", file, str(value), f"/linux/resources/{why}"))

    add("memory.max", _or_max(memory.limit, zero_is_unset=True), "memory/limit")
    add("memory.low", _or_max(memory.reservation, zero_is_unset=True), "memory/reservation")
    if memory.swap == -1:
        add("memory.swap.max", "max", "memory/swap")
    elif memory.swap:
        if memory.limit is None or memory.limit < 0 or memory.swap < memory.limit:
            raise SpecError("/linux/resources/memory/swap: must be memory and swap together, at least /limit")
        add("memory.swap.max", memory.swap - memory.limit, "memory/swap")
    add("cpu.weight", shares_to_weight(cpu.shares) if cpu.shares else None, "cpu/shares")
    if cpu.quota_us or cpu.period_us:
        quota = str(cpu.quota_us) if cpu.quota_us and cpu.quota_us > 0 else "max"
        add("cpu.max", f"{quota} {cpu.period_us or 100_000}", "cpu/quota")
    add("cpuset.cpus", cpu.cpus, "cpu/cpus")
    add("cpuset.mems", cpu.mems, "cpu/mems")
    add("pids.max", _or_max(r.pids_limit), "pids/limit")
    for file, value in (r.unified or {}).items():
        if "/" in file:
            raise SpecError(f"/linux/resources/unified/{file}: is no file name")
        add(file, value, f"unified/{file}")
    return writes


def shares_to_weight(shares: int) -> int:
    """Map v1's cpu.shares (2 to 262144, usually 1024) onto v2's cpu.weight (1 to 10000, usually 100).

    Source: the linear mapping that runc 1.2 and crun 1.8 use.
    """
    clamped = min(max(shares, 2), 262144)
    return 1 + (clamped - 2) * 9999 // 262142


def _or_max(value: int | None, zero_is_unset: bool = False) -> str | None:
    if value is None or (value == 0 and zero_is_unset):
        return None
    return "max" if value < 0 or (value == 0 and not zero_is_unset) else str(value)


def v1_device_writes(rules: list[tuple[bool, str]]) -> list[Write]:
    """Return the writes to devices.allow and devices.deny for rules as (allow, text)."""
    return [
        Write("devices", "devices.allow" if allow else "devices.deny", text, "/linux/resources/devices") for allow, text in rules
    ]
