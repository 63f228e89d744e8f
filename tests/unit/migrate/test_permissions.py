"""What an agent does for whom: a key with a forced command has a bundle's directory, and no command to run."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrate.agent.side import DEFAULT_ROOT, Permissions
from migrate.agent.table import VERBS
from migrate.errors import ProtocolError


def test_a_forced_command_has_the_usual_directory_alone() -> None:
    assert Permissions.of([], "", forced=False) == Permissions((), restricted=False)
    assert Permissions.of([], "", forced=True) == Permissions((DEFAULT_ROOT,), restricted=True)
    assert Permissions.of(["/srv"], "", forced=True) == Permissions(("/srv",), restricted=True)
    assert Permissions.of(["/srv"], "", forced=False).restricted
    assert Permissions.of([], "target", forced=False) == Permissions((DEFAULT_ROOT,), restricted=True, role="target")


def test_a_role_does_the_other_ones_part_not_at_all() -> None:
    for permissions, refused in ((Permissions(role="target"), "source"), (Permissions(role="source"), "target")):
        permissions.require_role("")
        permissions.require_role(permissions.role)
        with pytest.raises(ProtocolError, match=f"the {permissions.role} of a move only"):
            permissions.require_role(refused)
    assert {verb.role for verb in VERBS.values()} == {"", "source", "target"}


@pytest.mark.parametrize(
    "path", ["", "c", "./c", "/", "/srv/../etc", "/srv/./c", "/srv//c", "/srv/c/", "/srv/c\0", None, 5, ["/srv/c"]]
)
def test_what_is_no_bundle(path: object) -> None:
    with pytest.raises(ProtocolError):
        Permissions().require_bundle(path)  # type: ignore[arg-type]


def test_bundles_go_below_the_roots_only(tmp_path: Path) -> None:
    (tmp_path / "srv").mkdir()
    (tmp_path / "srv/out").symlink_to("/etc")
    (tmp_path / "in").symlink_to("srv")
    allowed = Permissions((str(tmp_path / "srv"),), restricted=True)
    for path in ("srv/c", "srv/new/c", "in/c"):
        assert allowed.require_bundle(str(tmp_path / path)) == tmp_path / path
    for path in ("srv", "c", "srv2/c", "srv/out/c", "in"):
        with pytest.raises(ProtocolError, match="only"):
            allowed.require_bundle(str(tmp_path / path))
    assert Permissions().require_bundle("/anywhere/c") == Path("/anywhere/c")
