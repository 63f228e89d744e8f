"""The phases of a move, in order. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Phase(StrEnum):
    PREFLIGHT = "preflight"
    PREPARE = "prepare"
    PRECOPY = "precopy"
    FREEZE = "freeze"
    SHIP = "ship"
    RESTORE = "restore"
    COMMIT = "commit"
    FINISH = "finish"


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a phase while it goes on, and of its place in the promise."""

    doing: str
    downtime: bool
    undo: str


WORDS: dict[Phase, Words] = {
    Phase.PREFLIGHT: Words("look at both hosts", False, "-"),
    Phase.PREPARE: Words("lock, and make directories on the target", False, "discard"),
    Phase.PRECOPY: Words("copy files while the container runs; start CRIU on both sides", False, "discard"),
    Phase.FREEZE: Words(
        "freeze and dump the container; copy its memory and what changed in its files", True, "let go: it runs on"
    ),
    Phase.SHIP: Words("copy the rest of the images", True, "discard"),
    Phase.RESTORE: Words("restore on the target, held", True, "let go: it is killed there"),
    Phase.COMMIT: Words("decide; release the target, kill the source", True, "none: only forward"),
    Phase.FINISH: Words("delete the source's container and files", False, "retry"),
}
