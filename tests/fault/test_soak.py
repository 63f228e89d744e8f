"""Moves to and fro for a while, with faults at random: what, and where or when, comes from a seed that is printed."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import pytest

from runtime.memory.tracker import supported
from tests.fault.oracle import NETWORK, PRE_COPY, World, other
from tests.fault.strike import CLASSES, Case, reached, run

pytestmark = [pytest.mark.ferry, pytest.mark.timeout(0)]
# What hits a moment that nobody knows must not ask what had been done by then.
ANY_MOMENT = [name for name in CLASSES if not name.endswith("reboots")]
LONGEST_S = 12.0


def test_soak(world: World, places: Callable[[], list[str]], request: pytest.FixtureRequest) -> None:
    seed = request.config.getoption("--soak-seed")
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    print(f"\nsoak: seed {seed}")
    chance = random.Random(seed)
    until = time.monotonic() + 60 * float(request.config.getoption("--soak-minutes"))
    outcomes: Counter[str] = Counter()
    while time.monotonic() < until:
        pulled = chance.random() < 0.3
        ways = {PRE_COPY} if chance.random() < 0.5 and supported() else set()
        if chance.random() < 0.3:  # the container is made anew each time that this changes
            ways |= {NETWORK} - world.ways
        else:
            ways |= {NETWORK} & world.ways
        world.become(frozenset(ways))
        if chance.random() < 0.5:
            name, place, after_s = chance.choice(list(CLASSES)), chance.choice(places()), None
            case = Case(world, world.at, other(world.at), place, *reached(place), pulled=pulled)
        else:
            name, after_s = chance.choice(ANY_MOMENT), round(chance.uniform(0, LONGEST_S), 2)
            place = f"{after_s} s"
            case = Case(world, world.at, other(world.at), place, dumped=False, decided=False, released=False, pulled=pulled)
        said = f"soak: {sum(outcomes.values()) + 1} {'pulled' if pulled else 'moved'}{''.join(f' with {way}' for way in sorted(ways))} from {case.source}: {name} at {place}"
        try:
            outcome = run(case, CLASSES[name], after_s)
        except BaseException:
            print(f"{said}: FAILED with seed {seed}: {case.notes}", flush=True)
            raise
        print(f"{said}: {outcome}", flush=True)
        outcomes[outcome] += 1
    print(f"soak: {sum(outcomes.values())} moves with seed {seed}: {dict(outcomes)}")
    assert outcomes
