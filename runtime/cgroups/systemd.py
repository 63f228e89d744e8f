"""The systemd driver: a container's cgroup is a transient scope, made by systemd over D-Bus and delegated to us.

systemd makes the cgroup, puts the first process into it, and keeps what it was told of limits over its own reloads.
Everything else is written to the cgroup's files as without it; that is what Delegate= is for.
Source: org.freedesktop.systemd1(5), systemd.resource-control(5), systemd.scope(5).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

from runtime.cgroups.resources import shares_to_weight
from runtime.errors import ContainerError, SpecError, Unsupported
from runtime.spec.resources import Resources

_TIMEOUT_S = 30.0
_INFINITY = (1 << 64) - 1


def available() -> bool:
    """Say whether systemd runs this host. Source: sd_booted(3)."""
    return Path("/run/systemd/system").is_dir()


def names(cgroups_path: str | None, container_id: str) -> tuple[str, str]:
    """Return slice and unit of `SLICE:PREFIX:NAME`. Pure. Raises: SpecError."""
    slice_, prefix, name = "", "ferry", container_id
    if cgroups_path:
        parts = cgroups_path.split(":")
        if len(parts) != 3 or not parts[2]:
            raise SpecError(f"/linux/cgroupsPath: {cgroups_path!r} is not SLICE:PREFIX:NAME, as the systemd driver wants it")
        slice_, prefix, name = parts
    slice_ = slice_ or ("system.slice" if os.geteuid() == 0 else "user.slice")
    if not slice_.endswith(".slice") or "/" in slice_:
        raise SpecError(f"/linux/cgroupsPath: {slice_!r} is no slice")
    unit = f"{prefix}-{name}" if prefix else name
    return slice_, f"{unit}.scope"


def expand(slice_: str) -> str:
    """Return a slice's path: `a-b.slice` lies in `a.slice`. Pure. Raises: SpecError. Source: systemd.slice(5)."""
    if slice_ == "-.slice":
        return "/"
    path, prefix = "", ""
    for part in slice_.removesuffix(".slice").split("-"):
        if not part:
            raise SpecError(f"/linux/cgroupsPath: {slice_!r} is no slice")
        prefix += part
        path += f"/{prefix}.slice"
        prefix += "-"
    return path


def cgroup_of(slice_: str, unit: str) -> str:
    """Return the path of a unit's cgroup below the root of the tree (an ordinary user's: below the user's manager). Pure."""
    return f"{expand(slice_).rstrip('/')}/{unit}"


def properties(r: Resources, *, unified: bool) -> list[tuple[str, tuple[str, Any]]]:
    """Return what systemd is to know of the limits, as D-Bus variants. Pure."""
    found: list[tuple[str, tuple[str, Any]]] = []

    def limit(name: str, value: int | None) -> None:
        if value:
            found.append((name, ("t", _INFINITY if value < 0 else value)))

    memory, cpu = r.memory, r.cpu
    limit("MemoryMax" if unified else "MemoryLimit", memory.limit)
    if unified:
        limit("MemoryLow", memory.reservation)
        if memory.swap and memory.swap > 0 and memory.limit and memory.limit > 0:
            found.append(("MemorySwapMax", ("t", memory.swap - memory.limit)))
        elif memory.swap == -1:
            found.append(("MemorySwapMax", ("t", _INFINITY)))
    if cpu.shares:
        found.append(("CPUWeight", ("t", shares_to_weight(cpu.shares))) if unified else ("CPUShares", ("t", cpu.shares)))
    if cpu.quota_us is not None and cpu.quota_us < 0:
        found.append(("CPUQuotaPerSecUSec", ("t", _INFINITY)))
    if cpu.period_us:
        found.append(("CPUQuotaPeriodUSec", ("t", cpu.period_us)))
    if cpu.quota_us and cpu.quota_us > 0:
        # As systemd reckons: processor time for each second, in whole 10 ms.
        per_second = cpu.quota_us * 1_000_000 // (cpu.period_us or 100_000)
        found.append(("CPUQuotaPerSecUSec", ("t", -(-per_second // 10_000) * 10_000)))
    limit("TasksMax", r.pids_limit)
    return found


class Scope:
    """The transient scope of one container."""

    def __init__(self, slice_: str, unit: str) -> None:
        self.slice, self.unit = slice_, unit

    def start(self, pid: int, container_id: str, limits: list[tuple[str, tuple[str, Any]]]) -> None:
        """Have systemd make the scope with this process in it. Raises: ContainerError, Unsupported."""
        known = [
            ("Description", ("s", f"container {container_id}")),
            ("Slice", ("s", self.slice)),
            ("PIDs", ("au", [pid])),
            ("Delegate", ("b", True)),
            ("DefaultDependencies", ("b", False)),
            ("CollectMode", ("s", "inactive-or-failed")),
            ("MemoryAccounting", ("b", True)),
            ("CPUAccounting", ("b", True)),
            ("IOAccounting", ("b", True)),
            ("TasksAccounting", ("b", True)),
        ]
        with _Bus() as bus:
            bus.job("StartTransientUnit", "ssa(sv)a(sa(sv))", (self.unit, "replace", [*known, *limits], []), self.unit)

    def update(self, limits: list[tuple[str, tuple[str, Any]]]) -> None:
        """Tell systemd of changed limits. Raises: ContainerError, Unsupported."""
        if limits:
            with _Bus() as bus:
                bus.call("SetUnitProperties", "sba(sv)", (self.unit, True, limits))

    def stop(self) -> None:
        """Have systemd forget the scope; one that is gone is no error."""
        with contextlib.suppress(ContainerError), _Bus() as bus:
            with contextlib.suppress(ContainerError):
                bus.job("StopUnit", "ss", (self.unit, "replace"), self.unit)
            with contextlib.suppress(ContainerError):
                bus.call("ResetFailedUnit", "s", (self.unit,))


class _Bus:
    """A conversation with systemd: the system's, or for an ordinary user the user's own manager."""

    def __enter__(self) -> _Bus:
        try:
            from jeepney import DBusAddress
            from jeepney.io.blocking import open_dbus_connection
        except ImportError:
            raise Unsupported("--systemd-cgroup: needs the Python package jeepney", hint="pip install jeepney") from None
        bus = "SYSTEM" if os.geteuid() == 0 else "SESSION"
        try:
            self._connection = open_dbus_connection(bus)
        except (OSError, KeyError, ValueError) as e:
            raise ContainerError(f"--systemd-cgroup: cannot reach the {bus.lower()} bus: {e}", hint="is dbus running?") from e
        self._manager = DBusAddress(
            "/org/freedesktop/systemd1", bus_name="org.freedesktop.systemd1", interface="org.freedesktop.systemd1.Manager"
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._connection.close()

    def call(self, method: str, signature: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        """Call a method of systemd's manager. Raises: ContainerError with systemd's own words."""
        from jeepney import HeaderFields, MessageType, new_method_call

        try:
            reply = self._connection.send_and_get_reply(
                new_method_call(self._manager, method, signature, arguments), timeout=_TIMEOUT_S
            )
        except (OSError, TimeoutError) as e:
            raise ContainerError(f"systemd does not answer {method}: {e}") from e
        if reply.header.message_type == MessageType.error:
            name = reply.header.fields.get(HeaderFields.error_name, "")
            raise ContainerError(f"systemd refuses {method}: {' '.join(str(b) for b in reply.body) or name}")
        return tuple(reply.body)

    def job(self, method: str, signature: str, arguments: tuple[Any, ...], unit: str) -> None:
        """Call a method that starts a job, and wait for the job's end. Raises: ContainerError."""
        from jeepney import MatchRule
        from jeepney.bus_messages import message_bus

        rule = MatchRule(type="signal", interface="org.freedesktop.systemd1.Manager", member="JobRemoved")
        self._connection.send_and_get_reply(message_bus.AddMatch(rule), timeout=_TIMEOUT_S)
        self.call("Subscribe", "", ())
        with self._connection.filter(rule) as queue:
            (job,) = self.call(method, signature, arguments)
            deadline = time.monotonic() + _TIMEOUT_S
            while True:
                try:
                    message = self._connection.recv_until_filtered(queue, timeout=max(0.01, deadline - time.monotonic()))
                except TimeoutError:
                    raise ContainerError(f"systemd does not end its job for {unit} in {_TIMEOUT_S:.0f} s") from None
                _, path, _, result = message.body
                if path == job:
                    if result != "done":
                        raise ContainerError(f"systemd's job for {unit} ended with {result}")
                    return
