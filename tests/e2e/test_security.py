"""A key that may do what a move needs, and nothing else; and names and links of a container that lead out of it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrate import PROTOCOL, __version__
from migrate.wire_pb2 import Call, Frame, Hello
from tests.e2e.test_move import BUNDLE, NAME, make, runs_on
from tests.helpers.bed import BUNDLES, Bed

REFUSED = 3


@pytest.fixture
def limited(bed: Bed, tmp_path: Path) -> Iterator[Bed]:
    """host1 knows host2 as `limited`, too: with a key that may start an agent there that is a target, and do nothing else."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "key"], check=True)
    here, there = (bed.path(host, "/var/lib/root/.ssh") for host in ("host1", "host2"))
    (here / "limited").write_bytes((tmp_path / "key").read_bytes())
    (here / "limited").chmod(0o600)
    (here / "config").write_text(
        "Host limited\n  HostName host2\n  HostKeyAlias host2\n  IdentityFile ~/.ssh/limited\n  IdentitiesOnly yes\n"
    )
    forced = f'command="migrate agent --as target --only-below {BUNDLES}",restrict'
    (there / "authorized_keys").write_text(f"{forced} {(tmp_path / 'key.pub').read_text()}")
    yield bed
    for path in (here / "limited", here / "config", there / "authorized_keys"):
        path.unlink()


def test_a_forced_command_is_enough_for_a_move(limited: Bed) -> None:
    make(limited)
    report = limited.move("host1", NAME, "limited")
    assert report["target"] == "host2"
    runs_on(limited, "host2")


def test_a_forced_command_runs_nothing_else(limited: Bed) -> None:
    for command in (
        ("id",),
        ("cat", "/etc/shadow"),
        ("sh", "-c", "id >/tmp/was-here"),
        ("migrate", "agent", "--only-below", "/"),
    ):
        done = limited.run("host1", "ssh", "-o", "BatchMode=yes", "limited", *command, errors="replace")
        assert "uid=" not in done.stdout and "root:" not in done.stdout
    assert limited.run("host2", "test", "-e", "/tmp/was-here").returncode == 1
    assert limited.run(
        "host1", "ssh", "-o", "BatchMode=yes", "-o", "ExitOnForwardFailure=yes", "-N", "-R", "0:127.0.0.1:22", "limited"
    ).returncode


def test_a_forced_command_takes_bundles_to_its_directory_alone(limited: Bed) -> None:
    make(limited, at="/var/lib/elsewhere/c")
    done = limited.run("host1", "migrate", "move", "--json", NAME, "limited")
    assert done.returncode != 0 and f"below {BUNDLES} only" in json.loads(done.stdout)["error"]["message"], done.stdout
    assert limited.status("host1", NAME) == "running" and limited.status("host2", NAME) is None
    assert limited.run("host2", "test", "-e", "/var/lib/elsewhere").returncode == 1


def _framed(frame: Frame) -> bytes:
    data = frame.SerializeToString()
    return len(data).to_bytes(4, "big") + data


def test_a_target_is_no_source(limited: Bed) -> None:
    """What would read a container's memory there, or stop one, is refused to that key."""
    make(limited, host="host2")
    words = Frame(hello=Hello(protocol=PROTOCOL, version=__version__, dead_after_ms=3000))
    calls = [
        Call(
            id=1,
            verb="begin",
            arguments=json.dumps({"migration_id": "20260131-120000-abcdef", "container": NAME, "plan": {}, "coordinator": ""}),
        ),
        Call(id=2, verb="freeze_now", arguments="{}"),
        Call(id=3, verb="open_data", arguments=json.dumps({"address": {}, "remote_command": "sh", "name": ""})),
    ]
    said = b"".join(_framed(f) for f in (words, *(Frame(call=c) for c in calls)))
    argv = limited.argv("host1", "ssh", "-o", "BatchMode=yes", "limited", "anything")
    answer = subprocess.run(argv, input=said, capture_output=True, timeout=60, check=False).stdout
    frames = []
    while answer:
        size = int.from_bytes(answer[:4], "big")
        frames.append(Frame.FromString(answer[4 : 4 + size]))
        answer = answer[4 + size :]
    assert [f.WhichOneof("body") for f in frames] == ["hello", "failure", "failure", "failure"]
    assert all("the target of a move only" in f.failure.error for f in frames[1:])
    assert limited.status("host2", NAME) == "running"


def test_links_in_a_rootfs_lead_nowhere(bed: Bed) -> None:
    """Absolute and relative links to the host's files go as links; nothing behind them is read or written, on either host."""
    make(bed)
    rootfs = bed.path("host1", BUNDLE) / "rootfs"
    (rootfs / "shadow").symlink_to("/etc/shadow")
    (rootfs / "up").symlink_to("../../../../../../tmp")
    (rootfs / "etc").mkdir(exist_ok=True)
    (rootfs / "etc/through").symlink_to("/tmp")
    bed.ok("host2", "sh", "-c", "echo untouched >/tmp/file")
    bed.move("host1", NAME, "host2")
    there = bed.path("host2", BUNDLE) / "rootfs"
    assert os.readlink(there / "shadow") == "/etc/shadow" and os.readlink(there / "up") == "../../../../../../tmp"
    assert bed.ok("host2", "cat", "/tmp/file") == "untouched\n"
    runs_on(bed, "host2")
