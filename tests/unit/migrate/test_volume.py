"""What is to be done with which bind mount."""

from __future__ import annotations

import pytest

from migrate.volume import Policy, Volume, choose, is_inside, read

BINDS = [("/data", "/srv/data"), ("/logs", "/srv/logs"), ("/own", "/b/own")]


@pytest.mark.parametrize(
    ("wanted", "found", "unknown"),
    [
        ({}, [], []),
        ({"/data": "copy"}, [("/srv/data", Policy.COPY)], []),
        ({"/srv/data/": "copy"}, [("/srv/data", Policy.COPY)], []),
        ({"*": "copy", "/logs": "refuse"}, [("/srv/data", Policy.COPY), ("/srv/logs", Policy.REFUSE)], []),
        ({"/own": "copy"}, [], []),
        ({"/srv": "copy", "*": "shared"}, [("/srv/data", Policy.SHARED), ("/srv/logs", Policy.SHARED)], ["/srv"]),
    ],
)
def test_choice(wanted: dict[str, str], found: list[tuple[str, Policy]], unknown: list[str]) -> None:
    volumes, names = choose(BINDS, wanted, "/b")
    assert ([(v.source, v.policy) for v in volumes], names) == (found, unknown)


def test_one_source_at_two_places_is_one_volume() -> None:
    volumes, _ = choose([("/a", "/srv"), ("/b", "/srv")], {"*": "copy"}, "/bundle")
    assert volumes == [Volume("/a", "/srv", Policy.COPY)]


def test_words() -> None:
    assert read("/a=b=copy") == ("/a=b", Policy.COPY)
    for wrong in ("/a", "=copy", "/a=", "/a=move"):
        with pytest.raises(ValueError, match="NAME=copy"):
            read(wrong)


def test_json() -> None:
    volume = Volume("/data", "/srv", Policy.COPY, size_bytes=5, users=("7 (cat)",))
    assert Volume.from_json({**volume.as_dict(), "users": ["7 (cat)"], "policy": "copy"}) == volume
    with pytest.raises(ValueError, match="move"):
        Volume.from_json({**volume.as_dict(), "policy": "move"})


def test_inside() -> None:
    assert is_inside("/srv/data", "/srv") and is_inside("/srv", "/srv") and is_inside("/srv/../srv/x", "/srv")
    assert not is_inside("/srvx", "/srv") and not is_inside("/", "/srv") and is_inside("/x", "/")
