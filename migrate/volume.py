"""What is bind-mounted into a container, and what a move is to do with it. Pure."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from typing import Any, Self

# As a name: every bind mount that is not named.
ALL = "*"


class Policy(StrEnum):
    COPY = "copy"  # it moves along, as the bundle does
    SHARED = "shared"  # it is the same storage on both hosts
    REFUSE = "refuse"  # the container is not moved with it


_STRICTNESS = [Policy.COPY, Policy.SHARED, Policy.REFUSE]


@dataclass(frozen=True, slots=True)
class Volume:
    """A directory of the host that a container sees. Units: bytes, of those that are copied. Facts are of those alone, too."""

    destination: str
    source: str
    policy: Policy
    is_plain: bool = True  # a directory that no symbolic link leads to, and no mount point
    size_bytes: int = 0
    mounts_inside: tuple[str, ...] = ()
    sharers: tuple[str, ...] = ()  # other containers that use it
    users: tuple[str, ...] = ()  # processes outside of the container that have its files open: "pid (name)"

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Self:
        """Read what another host sent. Raises: ValueError, TypeError, KeyError."""
        known = {f.name: document[f.name] for f in fields(cls)}
        lists = {k: tuple(map(str, v)) for k, v in known.items() if isinstance(v, list | tuple)}
        return cls(**{**known, **lists, "policy": Policy(document["policy"])})

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def read(text: str) -> tuple[str, Policy]:
    """Read NAME=POLICY. Raises: ValueError."""
    name, equals, policy = text.rpartition("=")
    if not equals or not name or policy not in list(Policy):
        raise ValueError(f"{text!r} is not NAME=copy, NAME=shared or NAME=refuse")
    return name, Policy(policy)


def choose(binds: list[tuple[str, str]], wanted: Mapping[str, str], bundle: str) -> tuple[list[Volume], list[str]]:
    """Return what is to be done with which bind mount, and the names that name none.

    `binds` are (destination, source as a normal path), `wanted` is the policy by a name, which is a destination or a source. What
    is in the bundle moves with it in any case. Of one that is spoken of twice, the strictest counts.
    """
    found: dict[str, Volume] = {}
    used = {ALL}
    for destination, source in binds:
        names = [n for n in wanted if posixpath.normpath(n) in (posixpath.normpath(destination), source)]
        used.update(names)
        if is_inside(source, bundle):
            continue
        for policy in [Policy(wanted[n]) for n in names or [ALL] if n in wanted]:
            before = found.get(source)
            if before is None or _STRICTNESS.index(policy) > _STRICTNESS.index(before.policy):
                found[source] = Volume(destination, source, policy)
    copied = [v.source for v in found.values() if v.policy == Policy.COPY]
    # With what it lies in it moves along.
    volumes = [v for v in found.values() if not any(v.source != c and is_inside(v.source, c) for c in copied)]
    return volumes, sorted(set(wanted) - used)


def is_inside(path: str, directory: str) -> bool:
    """Say whether a path is below a directory, or that directory."""
    return posixpath.normpath(path) == directory or posixpath.normpath(path).startswith(directory.rstrip("/") + "/")
