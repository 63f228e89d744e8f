"""`runtime update`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from runtime.cli.main import Globals
from runtime.container.container import Container
from runtime.errors import SpecError

_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}

# option -> (member of resources, its member, reads bytes with a unit)
_MEMBERS = {
    "blkio_weight": ("blockIO", "weight", False),
    "cpu_period": ("cpu", "period", False),
    "cpu_quota": ("cpu", "quota", False),
    "cpu_burst": ("cpu", "burst", False),
    "cpu_share": ("cpu", "shares", False),
    "cpu_rt_period": ("cpu", "realtimePeriod", False),
    "cpu_rt_runtime": ("cpu", "realtimeRuntime", False),
    "cpu_idle": ("cpu", "idle", False),
    "kernel_memory": ("memory", "kernel", True),
    "kernel_memory_tcp": ("memory", "kernelTCP", True),
    "memory": ("memory", "limit", True),
    "memory_reservation": ("memory", "reservation", True),
    "memory_swap": ("memory", "swap", True),
    "pids_limit": ("pids", "limit", False),
}


@click.command(help="Change the resources of a container.")
@click.option("-r", "--resources", "path", metavar="FILE", help="Resources document to apply; - reads standard input.")
@click.option("--blkio-weight", help="Weight of block I/O, 10 to 1000.")
@click.option("--cpu-period", help="CPU period in microseconds.")
@click.option("--cpu-quota", help="CPU time for each period in microseconds.")
@click.option("--cpu-burst", help="CPU time saved up, in microseconds.")
@click.option("--cpu-share", help="CPU shares, relative to other containers.")
@click.option("--cpu-rt-period", help="Realtime period in microseconds.")
@click.option("--cpu-rt-runtime", help="Realtime runtime in microseconds.")
@click.option("--cpu-idle", help="1 makes it run only when nothing else does.")
@click.option("--cpuset-cpus", help="Processors to use.")
@click.option("--cpuset-mems", help="Memory nodes to use.")
@click.option("--kernel-memory", help="Kernel memory limit (cgroup v1 of old kernels).")
@click.option("--kernel-memory-tcp", help="TCP buffer limit (cgroup v1).")
@click.option("--memory", help="Memory limit, such as 64m.")
@click.option("--memory-reservation", help="Memory soft limit.")
@click.option("--memory-swap", help="Memory and swap together; -1 is no limit.")
@click.option("--pids-limit", help="Most processes.")
@click.argument("container_id")
@click.pass_obj
def command(
    g: Globals, /, path: str | None, cpuset_cpus: str | None, cpuset_mems: str | None, container_id: str, **values: str | None
) -> None:
    changes = _read(path) if path else {}
    for option, (group, member, has_unit) in _MEMBERS.items():
        text = values[option]
        if text is not None:
            changes.setdefault(group, {})[member] = _number(option, text, has_unit)
    for member, text in (("cpus", cpuset_cpus), ("mems", cpuset_mems)):
        if text is not None:
            changes.setdefault("cpu", {})[member] = text
    Container(g.store, container_id).update(changes)


def _read(path: str) -> dict[str, Any]:
    try:
        document = json.loads(sys.stdin.read() if path == "-" else Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise SpecError(f"cannot read resources {path}: {e}") from e
    if not isinstance(document, dict):
        raise SpecError(f"resources {path}: must be an object")
    return document


def _number(option: str, text: str, has_unit: bool) -> int:
    number, unit = text, ""
    if has_unit:
        lowered = text.lower().removesuffix("ib") if text.lower().endswith("ib") else text.lower()
        number = lowered.rstrip("bkmgt")
        unit = lowered[len(number) :].rstrip("b") if len(lowered[len(number) :]) > 1 else lowered[len(number) :]
    try:
        return int(float(number) * _UNITS[unit]) if has_unit else int(number)
    except (ValueError, KeyError):
        raise SpecError(f"--{option.replace('_', '-')}: {text!r} is no number") from None
