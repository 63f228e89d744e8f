"""Every fault at every entry of a move's journal, before and after it; then recovery, then the oracle.

The entries are those that a real move passes, read from one; nothing here lists them. FERRY_FAULTS names the classes to run (all, or
a comma-separated list); without it one class is run, which one goes round with the number of commits, and on a machine that is
short of time ($FERRY_SHARE) half of its places: those up to the middle of a move or those from there on. With +pre-copy behind its
name the memory is sent while the container runs, with +network it has a network of its own that moves along, with +overlay its
root is an overlay.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runtime.memory.tracker import supported
from tests.fault.oracle import NETWORK, OVERLAY, PRE_COPY, World, other
from tests.fault.strike import CLASSES, Case, reached, run
from tests.helpers.bed import commits

pytestmark = [pytest.mark.ferry, pytest.mark.timeout(7200)]


def _every() -> list[str]:
    ways = ["", f"+{NETWORK}", *([f"+{PRE_COPY}"] if supported() else []), f"+{OVERLAY}"]
    return [name + way for name in CLASSES for way in ways]


def _chosen() -> list[str]:
    asked = os.environ.get("FERRY_FAULTS", "")
    if asked == "all":
        return _every()
    if asked:
        return asked.split(",")
    return [_every()[commits() % len(_every())]]


def _of_this_turn(places: list[str]) -> list[str]:
    """Return the places to strike at: all, or a half of them, the other one when the classes have gone round."""
    if "FERRY_FAULTS" in os.environ or int(os.environ.get("FERRY_SHARE") or 1) < 3:
        return places
    middle = len(places) // 2
    return places[middle:] if commits() // len(_every()) % 2 else places[:middle]


@pytest.mark.parametrize("name", _chosen())
def test_every_entry(
    world: World, places: Callable[[], list[str]], name: str, record_property: Callable[[str, object], None]
) -> None:
    """Go on to the next place when one fails: the whole table is worth more than the first failure."""
    outcomes: dict[str, int] = {}
    failures = []
    fault, *ways = name.split("+")
    world.become(frozenset(ways))
    passed = _of_this_turn(places())
    for place in passed:
        case = Case(world, world.at, other(world.at), place, *reached(place))
        try:
            outcome = run(case, CLASSES[fault])
        except (AssertionError, subprocess.SubprocessError, OSError, ValueError, KeyError) as e:
            outcome = "FAILED"
            failures.append(f"{name} at {place}: {str(e).strip()[:1500]} {case.notes}")
            if case.heal:
                case.heal()
            world.begin()
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        print(f"{name:32} {place:26} {outcome}{': ' + failures[-1] if outcome == 'FAILED' else ''}", flush=True)
    words = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    print(f"fault cases: {name}: {len(passed)} run: {words}")
    Path(os.environ.get("FERRY_FAULT_TABLE", os.devnull)).open("a").write(f"{name}: {len(passed)} run: {words}\n")
    record_property("outcomes", json.dumps(outcomes))
    assert not failures, "\n\n".join(failures)
