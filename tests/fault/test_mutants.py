"""Builds that are broken on purpose: the proof must find each of them. Run by `make test-fault-mutants`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers.bed import ROOT

pytestmark = [pytest.mark.ferry, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Mutant:
    """What is replaced in which file, the faults that find it, where, and what the oracle says then."""

    file: str
    old: str
    new: str
    fault: str
    place: str
    finding: str


MUTANTS = {
    "commit-order-reversed": Mutant(
        "migrate/commit.py",
        '    source.call("decide")\n    log.append(Phase.COMMIT, "decided")\n    target.call("release")\n',
        '    target.call("release")\n    log.append(Phase.COMMIT, "decided")\n    source.call("decide")\n',
        "coordinator-killed",
        "commit.decided:after",
        "two copies run",
    ),
    "decision-not-synced": Mutant(
        "migrate/agent/source.py",
        "durable.write(places.decision(migration), durable.COMMIT)",
        "durable.write(places.decision(migration), durable.COMMIT, sync=False)",
        "source-reboots",
        "commit.decided:after",
        "it was decided, and does not run",
    ),
    "freezer-belt-removed": Mutant(
        "runtime/criu/checkpoint.py",
        "        self._manager.freeze_soon()\n        self._compare()\n",
        "        self._compare()\n",
        "source-criu-killed",
        "restore.result:after",
        "the source went on",
    ),
}


@pytest.fixture
def code() -> Iterator[Path]:
    """A copy of the code, where a bed's hosts see it."""
    directory = Path(f"/var/tmp/ferry-code-{os.getpid()}")
    for package in ("migrate", "runtime"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    yield directory
    shutil.rmtree(directory)


def prove(code: Path, fault: str, place: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "FERRY_CODE": str(code), "FERRY_FAULTS": fault, "FERRY_FAULT_PLACES": place}
    argv = [sys.executable, "-m", "pytest", "-s", "tests/fault/test_every_entry.py"]
    return subprocess.run(
        argv, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.parametrize("name", MUTANTS)
def test_the_proof_finds(code: Path, name: str) -> None:
    mutant = MUTANTS[name]
    whole = prove(code, mutant.fault, mutant.place)
    assert whole.returncode == 0, f"it fails without the mutation: {whole.stdout[-2000:]}"
    path = code / mutant.file
    text = path.read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} is not what the mutant is made for"
    path.write_text(text.replace(mutant.old, mutant.new))
    broken = prove(code, mutant.fault, mutant.place)
    assert broken.returncode == 1 and mutant.finding in broken.stdout, broken.stdout[-3000:]
    print(f"mutant {name}: found by {mutant.fault} at {mutant.place}: {mutant.finding}")
