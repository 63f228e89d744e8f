"""Faults, and what must hold after each of them, wherever in a move it strikes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from tests.fault.oracle import BUNDLE, ENV, NAME, World
from tests.helpers.bed import ROOT, Bed
from tests.helpers.stopped import Running, Stopped


@dataclass
class Case:
    """One fault at one place. `source` and `target` are hosts; what the move had done before the place, the other fields say."""

    world: World
    source: str
    target: str
    place: str
    dumped: bool
    decided: bool
    released: bool
    pulled: bool = False  # the coordinator is on the target, and the data goes through it
    struck: bool = True
    lost: bool = False  # the host that it ran on went down
    heal: Callable[[], None] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def bed(self) -> Bed:
        return self.world.bed


def _kill(case: Case, host: str, *kinds: str) -> None:
    """Kill the processes of the first of these kinds that has any."""
    pids = next((found for kind in kinds if (found := case.world.processes(host, kind))), [])
    case.struck = bool(pids)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _coordinator(case: Case, move: Stopped) -> None:
    move.signal(signal.SIGKILL)


def _source_agent(case: Case, move: Stopped) -> None:
    _kill(case, case.source, "agent")


def _target_agent(case: Case, move: Stopped) -> None:
    _kill(case, case.target, "agent")


def _source_criu(case: Case, move: Stopped) -> None:
    _kill(case, case.source, "criu", "runtime")


def _source_holder(case: Case, move: Stopped) -> None:
    _kill(case, case.source, "runtime")


def _target_holder(case: Case, move: Stopped) -> None:
    _kill(case, case.target, "runtime")


def _target_criu(case: Case, move: Stopped) -> None:
    _kill(case, case.target, "criu", "runtime")


def _cut_for_a_while(case: Case, move: Stopped) -> None:
    case.bed.cut(case.target)
    subprocess.Popen(
        ["sh", "-c", f"sleep 1.5; exec {ROOT}/scripts/bed {case.bed.name} mend {case.target}"], stdin=subprocess.DEVNULL
    )


def _cut_for_good(case: Case, move: Stopped) -> None:
    case.bed.cut(case.target)
    case.heal = lambda: case.bed.mend(case.target)


def _reset(case: Case, move: Stopped) -> None:
    """Have the source's kernel reset every TCP connection to the target, as a firewall in between may."""
    done = case.bed.run(case.source, "ss", "-K", "dport", "=", "22")
    case.struck = "ESTAB" in done.stdout


def _fill(case: Case, host: str) -> None:
    """Fill the disk and the tmpfs of a host to the last byte.

    What the container itself writes has its place already: that its program ends on a full disk would be nobody's fault.
    """
    case.heal = lambda: _empty(case, host)
    script = f"for f in {case.world.files}/count {case.world.files}/ticks; do [ ! -e $f ] || fallocate -n -o $(stat -c %s $f) -l 1M $f; done\n"
    script += """for d in /var/lib /run; do
        fallocate -l $(df --output=avail -B1 $d | tail -n 1) $d/filler
        cat /dev/zero >>$d/filler 2>/dev/null
        df --output=avail -B1 $d | tail -n 1
    done"""
    case.struck = case.bed.ok(host, "sh", "-c", script).split() == ["0", "0"]


def _empty(case: Case, host: str) -> None:
    case.bed.ok(host, "rm", "-f", "/var/lib/filler", "/run/filler")


def _target_disk_full(case: Case, move: Stopped) -> None:
    _fill(case, case.target)


def _source_disk_full(case: Case, move: Stopped) -> None:
    _fill(case, case.source)


def _target_reboots(case: Case, move: Stopped) -> None:
    case.bed.crash(case.target)
    case.lost = case.released


def _source_reboots(case: Case, move: Stopped) -> None:
    case.bed.crash(case.source)
    case.lost = not case.released


def _interrupt(case: Case, move: Stopped) -> None:
    move.signal(signal.SIGINT)


CLASSES: dict[str, Callable[[Case, Stopped], None]] = {
    "coordinator-killed": _coordinator,
    "source-agent-killed": _source_agent,
    "target-agent-killed": _target_agent,
    "source-criu-killed": _source_criu,
    "target-criu-killed": _target_criu,
    "source-holder-killed": _source_holder,
    "target-holder-killed": _target_holder,
    "network-cut-for-a-while": _cut_for_a_while,
    "network-cut-for-good": _cut_for_good,
    "connection-reset": _reset,
    "target-disk-full": _target_disk_full,
    "source-disk-full": _source_disk_full,
    "target-reboots": _target_reboots,
    "source-reboots": _source_reboots,
    "interrupted": _interrupt,
}


def reached(place: str) -> list[bool]:
    """Say whether a move has dumped the container, decided, and released it, when it gets to a place."""
    order = ("plan", "prepare", "precopy", "freeze", "ship", "restore", "commit", "finish", "move")
    marks = ("made", "intent", "pass", "decided", "released", "result", "ended")

    def when(entry: str) -> tuple[int, int]:
        phase, mark = entry.split(".")
        return order.index(phase), marks.index(mark)

    entry, _ = place.split(":")
    return [when(entry) >= when(passed) for passed in ("freeze.result", "commit.decided", "commit.released")]


def run(case: Case, fault: Callable[[Case, Stopped], None], after_s: float | None = None) -> str:
    """Begin a move, strike at the case's place, or so many seconds after the beginning, and see what must hold.

    Returns where it runs. Raises: AssertionError for what does not hold.
    """
    world, reboots = case.world, "reboots" in fault.__name__
    # It is read when it has been deleted, too. But a busy file system cannot be unplugged.
    with contextlib.nullcontext() if reboots else world.bed.path(case.source, f"{world.files}/ticks").open("rb") as ticks:
        return _strike(case, fault, ticks, after_s)


def _strike(case: Case, fault: Callable[[Case, Stopped], None], ticks: BinaryIO | None, after_s: float | None) -> str:
    world = case.world
    verb, here, there = ("pull", case.target, case.source) if case.pulled else ("move", case.source, case.target)
    command = ("migrate", verb, "--json", *world.flags, NAME, there)
    if after_s is None:
        move = Stopped(world.bed, here, case.place, *command, env=ENV)
    else:
        move = Running(world.bed, here, *command, env=ENV)
        time.sleep(after_s)
    assert not move.ended, f"the move was over before {case.place}: {move.go_on()}"
    dumped_at = os.fstat(ticks.fileno()).st_size if ticks else 0
    try:
        fault(case, move)
        time.sleep(0.25)  # what now runs, and should not, has time to show it
    finally:
        status, out, err = move.go_on()
    case.notes.append(f"status {status}: {out[-700:]} {err[-300:]}")
    report = json.loads(out) if out.startswith("{") else None
    if ticks is None:
        return _after_a_reboot(case)
    assert len(world.running()) <= 1, "two copies run"
    ran_there = world.running() == [case.target]
    world.recover(case.source)
    if case.heal:
        # What was cut off is judged twice: as it stands now, and when it is connected again.
        assert len(world.running()) <= 1, "two copies run"
        case.heal()
        world.recover(case.source)
    _settle(case)
    running = world.running()
    assert len(running) == 1, f"{len(running)} copies run"
    if report is not None and report["settled"] and report["outcome"] in ("COMPLETED", "ROLLED_BACK", "REFUSED"):
        expected = case.target if report["outcome"] == "COMPLETED" else case.source
        assert running == [expected], f"{report['outcome']}, and it runs on {running}"
    assert not ran_there or running == [case.target], "it ran on the target, and then from before that on the source"
    if fault is _interrupt and after_s is None:
        assert (running == [case.target]) == case.decided, f"interrupted, and it runs on {running}"
    _holds(case, running[0])
    if case.dumped and running == [case.target]:
        last = os.fstat(ticks.fileno()).st_size
        assert last == dumped_at, f"the source went on to {last} after its dump at {dumped_at}, and it runs on the target"
    if not case.struck:
        return "nothing to strike"
    return "runs on the target" if running[0] == case.target else "runs on the source"


def _settle(case: Case) -> None:
    """Wait until the agents have ended by themselves, which they do when they hear nothing any more; recover what they left."""
    deadline = time.monotonic() + 30
    while any(case.world.processes(h, "agent") for h in (case.source, case.target)) and time.monotonic() < deadline:
        time.sleep(0.05)
    if any(case.world.unfinished(h) for h in (case.source, case.target)):
        case.world.recover(case.source)


def _holds(case: Case, at: str) -> None:
    case.world.at = at
    case.world.counts()
    case.world.nothing_is_left()


def _after_a_reboot(case: Case) -> str:
    world = case.world
    world.recover(case.source)
    if case.decided and NAME in world.containers(case.target):
        assert world.running() == [case.target], "it was decided, and does not run"
    if len(world.running()) == 0 and NAME in world.containers(case.target):
        # The source went down between the dump and the decision, and the only copy is held: a person's word is asked for.
        (move,) = world.unfinished(case.source)
        assert world.state_of_move(case.source).startswith("left behind")
        world.recover(case.source, move["migration_id"], "--run-on", "target")
    _settle(case)
    running = world.running()
    assert len(running) <= 1, "two copies run"
    if running:
        _holds(case, running[0])
        return "runs on the target" if running[0] == case.target else "runs on the source"
    assert case.lost, "no copy runs, and the host that it ran on did not go down"
    files = {h for h in (case.source, case.target) if world.bed.path(h, f"{BUNDLE}/config.json").exists()}
    for host in (case.source, case.target):
        assert world.unfinished(host) == [], world.unfinished(host)
        if not case.released:
            assert host in files or not world.bed.path(host, BUNDLE).exists(), f"a part of the bundle on {host}"
    # Its files are where it ran. The source keeps its own, too, until those of the target are known to be on disk.
    assert case.source in files if not case.released else files, f"its files are on {files}"
    assert case.released or case.target not in files, f"its files are on {files}"
    world.begin()
    return "went down with its host"
