"""What a container uses, read from its cgroups: the document that `events --stats` prints."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""


def _number(path: Path) -> int:
    """Read one number; `max`, and a file that is not there, read as the greatest and as 0."""
    text = _text(path).strip()
    return (1 << 64) - 1 if text == "max" else int(text) if text.lstrip("-").isdigit() else 0


def _table(path: Path) -> dict[str, int]:
    """Read lines of a name and a number."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {p[0]: int(p[1]) for p in pairs if len(p) == 2 and p[1].isdigit()}


def v1(cpu: Path, cpuacct: Path, memory: Path, pids: Path, blkio: Path) -> dict[str, Any]:
    """Return the statistics from v1 directories. Units: nanoseconds, bytes."""
    throttling, ticks = _table(cpu / "cpu.stat"), _table(cpuacct / "cpuacct.stat")
    limit = _number(memory / "memory.limit_in_bytes")
    nanoseconds_per_tick = 10_000_000
    return {
        "cpu": {
            "usage": {
                "total": _number(cpuacct / "cpuacct.usage"),
                "percpu": [int(n) for n in _text(cpuacct / "cpuacct.usage_percpu").split()],
                "kernel": ticks.get("system", 0) * nanoseconds_per_tick,
                "user": ticks.get("user", 0) * nanoseconds_per_tick,
            },
            "throttling": {
                "periods": throttling.get("nr_periods", 0),
                "throttledPeriods": throttling.get("nr_throttled", 0),
                "throttledTime": throttling.get("throttled_time", 0),
            },
        },
        "memory": {
            "cache": _table(memory / "memory.stat").get("cache", 0),
            "usage": {
                "limit": limit,
                "usage": _number(memory / "memory.usage_in_bytes"),
                "max": _number(memory / "memory.max_usage_in_bytes"),
                "failcnt": _number(memory / "memory.failcnt"),
            },
            "swap": {
                "limit": _number(memory / "memory.memsw.limit_in_bytes"),
                "usage": _number(memory / "memory.memsw.usage_in_bytes"),
                "max": _number(memory / "memory.memsw.max_usage_in_bytes"),
                "failcnt": _number(memory / "memory.memsw.failcnt"),
            },
            "raw": _table(memory / "memory.stat"),
        },
        "pids": {"current": _number(pids / "pids.current"), "limit": _limit(pids / "pids.max")},
        "blkio": {"ioServiceBytesRecursive": _v1_io(blkio / "blkio.throttle.io_service_bytes_recursive")},
    }


def v2(directory: Path) -> dict[str, Any]:
    """Return the statistics from a v2 directory. Units: nanoseconds, bytes."""
    cpu = _table(directory / "cpu.stat")
    return {
        "cpu": {
            "usage": {
                "total": cpu.get("usage_usec", 0) * 1000,
                "kernel": cpu.get("system_usec", 0) * 1000,
                "user": cpu.get("user_usec", 0) * 1000,
            },
            "throttling": {
                "periods": cpu.get("nr_periods", 0),
                "throttledPeriods": cpu.get("nr_throttled", 0),
                "throttledTime": cpu.get("throttled_usec", 0) * 1000,
            },
        },
        "memory": {
            "cache": _table(directory / "memory.stat").get("file", 0),
            "usage": {
                "limit": _number(directory / "memory.max"),
                "usage": _number(directory / "memory.current"),
                "max": _number(directory / "memory.peak"),
                "failcnt": _table(directory / "memory.events").get("max", 0),
            },
            "swap": {
                "limit": _number(directory / "memory.swap.max"),
                "usage": _number(directory / "memory.swap.current"),
            },
            "raw": _table(directory / "memory.stat"),
        },
        "pids": {"current": _number(directory / "pids.current"), "limit": _limit(directory / "pids.max")},
        "blkio": {"ioServiceBytesRecursive": _v2_io(directory / "io.stat")},
    }


def _limit(path: Path) -> int:
    """Read a limit of processes; 0 is none, as in the documents of other runtimes."""
    number = _number(path)
    return 0 if number == (1 << 64) - 1 else number


def _v1_io(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in _text(path).splitlines():
        fields = line.split()
        if len(fields) == 3:
            major, _, minor = fields[0].partition(":")
            found.append({"major": int(major), "minor": int(minor), "op": fields[1], "value": int(fields[2])})
    return found


def _v2_io(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in _text(path).splitlines():
        device, *values = line.split()
        major, _, minor = device.partition(":")
        for name, number in (v.split("=", 1) for v in values):
            if name in ("rbytes", "wbytes") and major.isdigit():
                op = {"rbytes": "Read", "wbytes": "Write"}[name]
                found.append({"major": int(major), "minor": int(minor), "op": op, "value": int(number)})
    return found


def v2_cpu_used_ns(directory: Path) -> int:
    """Return the processors' time that a v2 cgroup has taken. Raises: OSError, KeyError."""
    return _table(directory / "cpu.stat")["usage_usec"] * 1000


def oom_kills(v1_memory: Path | None, v2_directory: Path | None) -> int:
    """Return how often the kernel killed a process of the container for want of memory."""
    if v1_memory is not None:
        return _table(v1_memory / "memory.oom_control").get("oom_kill", 0)
    return _table(v2_directory / "memory.events").get("oom_kill", 0) if v2_directory is not None else 0
