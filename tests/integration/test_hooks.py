"""Hooks: when they run, what they read, and what their failure does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci

ALL = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def test_every_hook_runs_with_the_state_on_stdin(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.mkdir()

    def change(c: Config) -> None:
        c["mounts"].append({"destination": "/log", "type": "bind", "source": str(log), "options": ["rbind"]})
        c["hooks"] = {n: [{"path": "/bin/sh", "args": ["sh", "-c", f"cat >{log}/{n}"]}] for n in ALL}
        c["hooks"]["startContainer"] = [{"path": "/bin/sh", "args": ["sh", "-c", "cat >/log/startContainer"]}]

    oci.ok("run", "--bundle", bundles("true", change=change), "c")
    states = {n: json.loads((log / n).read_text()) for n in ALL}
    assert {s["id"] for s in states.values()} == {"c"}
    assert states["poststart"]["status"] in ("running", "created") and states["poststart"]["pid"] > 0
    assert states["poststop"]["status"] == "stopped"
    assert states["createRuntime"]["pid"] > 0


@pytest.mark.parametrize("name", ["prestart", "createRuntime", "createContainer"])
def test_a_failing_hook_stops_the_creation(oci: Oci, bundles: BundleMaker, name: str) -> None:
    bundle = bundles(
        "true", change=lambda c: c.update(hooks={name: [{"path": "/bin/sh", "args": ["sh", "-c", "echo broken; exit 3"]}]})
    )
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode != 0 and "hook" in done.stderr
    assert "does not exist" in oci.run("state", "c").stderr


def test_a_hook_that_takes_too_long(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles(
        "true",
        change=lambda c: c.update(hooks={"createRuntime": [{"path": "/bin/sleep", "args": ["sleep", "30"], "timeout": 1}]}),
    )
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode != 0 and "hook" in done.stderr
