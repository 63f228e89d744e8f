"""Mounts with every kind of option, looked at from inside."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import Oci, wait_for


def mounting(*mounts: dict[str, Any]) -> Any:
    def change(config: dict[str, Any]) -> None:
        config["mounts"] += mounts

    return change


def options_of(mountinfo: str, point: str) -> str:
    """Return the per-mount options of the last mount on a path."""
    return [line.split()[5] for line in mountinfo.splitlines() if line.split()[4] == point][-1]


@pytest.fixture
def nested(tmp_path: Path) -> Iterator[Path]:
    """A directory with another mount below it."""
    source = tmp_path / "nested"
    (source / "below").mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "below"], check=True)
    yield source
    subprocess.run(["umount", source / "below"], check=True)


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("ro", "ro"), ("nosuid", "nosuid"), ("nodev", "nodev"), ("noexec", "noexec"), ("noatime", "noatime"),
        ("nodiratime", "nodiratime"), ("relatime", "relatime"),
    ],
)  # fmt: skip
def test_flags_of_bind_and_tmpfs(oci: Oci, bundles: BundleMaker, tmp_path: Path, option: str, expected: str) -> None:
    (tmp_path / "src").mkdir()
    mounts = [
        {"destination": "/b", "type": "bind", "source": str(tmp_path / "src"), "options": ["bind", option]},
        {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": [option]},
    ]
    info = oci.inside(bundles("cat", "/proc/self/mountinfo", change=mounting(*mounts)))
    assert expected in options_of(info, "/b").split(",") and expected in options_of(info, "/t").split(",")


@pytest.mark.ferry
def test_nosymfollow(oci: Oci, bundles: BundleMaker) -> None:
    mount = {"destination": "/t", "type": "tmpfs", "source": "tmpfs", "options": ["nosymfollow"]}
    out = oci.inside(bundles("sh", "-c", "ln -s /etc/passwd /t/l; cat /t/l 2>&1; true", change=mounting(mount)))
    assert "Too many levels of symbolic links" in out or "Symbolic link loop" in out


@pytest.mark.parametrize(("options", "below"), [(["rbind", "ro"], "rw"), (["rbind", "rro"], "ro")])
def test_recursive_readonly(oci: Oci, bundles: BundleMaker, nested: Path, options: list[str], below: str) -> None:
    mount = {"destination": "/n", "type": "bind", "source": str(nested), "options": options}
    info = oci.inside(bundles("cat", "/proc/self/mountinfo", change=mounting(mount)))
    assert options_of(info, "/n").startswith("ro")
    assert options_of(info, "/n/below").startswith(below)


def test_recursive_attributes(oci: Oci, bundles: BundleMaker, nested: Path) -> None:
    options = ["rbind", "rnosuid", "rnodev", "rnoexec", "rnoatime"]
    mount = {"destination": "/n", "type": "bind", "source": str(nested), "options": options}
    info = oci.inside(bundles("cat", "/proc/self/mountinfo", change=mounting(mount)))
    for point in ("/n", "/n/below"):
        assert {"nosuid", "nodev", "noexec", "noatime"} <= set(options_of(info, point).split(","))


def test_bind_without_rbind_leaves_out_what_is_below(oci: Oci, bundles: BundleMaker, nested: Path) -> None:
    mount = {"destination": "/n", "type": "bind", "source": str(nested), "options": ["bind"]}
    info = oci.inside(bundles("cat", "/proc/self/mountinfo", change=mounting(mount)))
    assert " /n " in info and " /n/below " not in info


def test_a_bind_mounted_file(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("content\n")
    mount = {"destination": "/etc/deep/file", "type": "bind", "source": str(tmp_path / "file"), "options": ["bind", "ro"]}
    assert oci.inside(bundles("cat", "/etc/deep/file", change=mounting(mount))) == "content\n"


def test_tmpfs_with_what_was_beneath(oci: Oci, bundles: BundleMaker) -> None:
    mount = {"destination": "/data", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup", "mode=755", "noexec"]}
    script = "cat /data/d/f; stat -c %u:%g:%a /data/d/f; readlink /data/l; cat /proc/self/mountinfo; echo new >/data/d/f"
    bundle = bundles("sh", "-c", script, change=mounting(mount))
    (bundle / "rootfs/data/d").mkdir(parents=True)
    (bundle / "rootfs/data/d/f").write_text("old\n")
    os.chown(bundle / "rootfs/data/d/f", 0, 6)
    (bundle / "rootfs/data/d/f").chmod(0o640)
    (bundle / "rootfs/data/l").symlink_to("/nowhere")
    content, owner, link, *info = oci.inside(bundle).splitlines()
    assert (content, owner, link) == ("old", "0:6:640", "/nowhere")
    assert "noexec" in options_of("\n".join(info), "/data")
    assert (bundle / "rootfs/data/d/f").read_text() == "old\n"


def test_proc_with_hidepid(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        next(m for m in config["mounts"] if m["destination"] == "/proc")["options"] = ["hidepid=2", "nosuid"]

    oci.detached(bundles("sleep", "60", change=change), "c")
    assert "hidepid=" in next(m for m in oci.ok("exec", "c", "cat", "/proc/self/mountinfo").splitlines() if " /proc " in m)
    assert oci.run("exec", "--user", "1000:1000", "c", "ls", "-d", "/proc/1").returncode != 0


def test_mqueue_and_sysfs(oci: Oci, bundles: BundleMaker) -> None:
    info = oci.inside(bundles("cat", "/proc/self/mountinfo"))
    kinds = {line.split()[4]: line.split(" - ")[1].split()[0] for line in info.splitlines()}
    assert (kinds["/dev/mqueue"], kinds["/sys"], kinds["/proc"]) == ("mqueue", "sysfs", "proc")


@pytest.mark.parametrize(
    ("mode", "expected"), [("rslave", "master:"), ("rshared", "shared:"), ("rprivate", ""), ("runbindable", "unbindable")]
)
def test_propagation_of_a_mount(oci: Oci, bundles: BundleMaker, tmp_path: Path, mode: str, expected: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True)
    subprocess.run(["mount", "--make-shared", source], check=True)

    def change(config: dict[str, Any]) -> None:
        mount = {"destination": "/m", "type": "bind", "source": str(source), "options": ["rbind", mode]}
        config["mounts"].append(mount)
        config["linux"]["rootfsPropagation"] = "rshared" if mode == "rshared" else "rslave"

    try:
        line = next(m for m in oci.inside(bundles("cat", "/proc/self/mountinfo", change=change)).splitlines() if " /m " in m)
        optional = line.split(" - ")[0].split()[6:]
        assert any(o.startswith(expected) for o in optional) if expected else optional == []
    finally:
        subprocess.run(["umount", source], check=True)


def test_what_the_host_mounts_later_arrives_in_a_slave(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True)
    subprocess.run(["mount", "--make-shared", source], check=True)

    def change(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/m", "type": "bind", "source": str(source), "options": ["rbind", "rslave"]})
        config["linux"]["rootfsPropagation"] = "rslave"

    try:
        oci.detached(bundles("sleep", "60", change=change), "c")
        (source / "later").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", source / "later"], check=True)
        assert " /m/later " in oci.ok("exec", "c", "cat", "/proc/self/mountinfo")
        subprocess.run(["umount", source / "later"], check=True)
        wait_for(lambda: " /m/later " not in oci.ok("exec", "c", "cat", "/proc/self/mountinfo"), "the unmount inside")
    finally:
        subprocess.run(["umount", "-R", source], check=True)


def test_a_shared_root_does_not_show_the_container_to_the_host(oci: Oci, bundles: BundleMaker) -> None:
    """With rshared, mounts below the root could appear on the host: the rootfs and what is in it must not."""

    def change(config: dict[str, Any]) -> None:
        config["linux"]["rootfsPropagation"] = "rshared"

    oci.detached(bundles("sleep", "60", change=change), "c")
    rootfs = str(oci.state("c")["rootfs"])
    assert rootfs not in Path("/proc/self/mountinfo").read_text()


def test_destinations_that_are_relative_or_links(oci: Oci, bundles: BundleMaker) -> None:
    mounts = [
        {"destination": "relative/../relative", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/link/inner", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/up/../../../up", "type": "tmpfs", "source": "tmpfs"},
    ]
    bundle = bundles("cat", "/proc/self/mountinfo", change=mounting(*mounts))
    (bundle / "rootfs/link").symlink_to("/real")
    (bundle / "rootfs/real").mkdir()
    points = {line.split()[4] for line in oci.inside(bundle).splitlines()}
    assert {"/relative", "/real/inner", "/up"} <= points


def test_cgroup_mount_is_the_containers_own_and_readonly(oci: Oci, bundles: BundleMaker) -> None:
    script = (
        "cat /proc/self/cgroup; find /sys/fs/cgroup -maxdepth 2 -name cgroup.procs | head -1 | xargs cat; mkdir /sys/fs/cgroup/x"
    )
    done = oci.run("run", "--bundle", bundles("sh", "-c", script), "c")
    assert "Read-only file system" in done.stderr or "Permission denied" in done.stderr
    assert "\n1\n" in done.stdout
    assert all(line.endswith(":/") for line in done.stdout.splitlines() if ":" in line)


@pytest.mark.parametrize("mode", ["rshared", "shared"])
def test_what_is_mounted_inside_a_shared_mount_appears_outside(oci: Oci, bundles: BundleMaker, tmp_path: Path, mode: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True)
    subprocess.run(["mount", "--make-shared", source], check=True)

    def change(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/m", "type": "bind", "source": str(source), "options": ["rbind", mode]})
        config["linux"]["rootfsPropagation"] = mode
        for name in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][name].append("CAP_SYS_ADMIN")

    try:
        bundle = bundles("sh", "-c", "mkdir /m/inner && mount -t tmpfs none /m/inner && sleep 60", change=change)
        oci.detached(bundle, "c")
        wait_for(lambda: f" {source}/inner " in Path("/proc/self/mountinfo").read_text(), "the mount outside")
        assert "/rootfs" not in "".join(
            line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(bundle) in line
        )
    finally:
        oci.run("delete", "--force", "c")
        subprocess.run(["umount", "-R", source], check=True)


def test_a_tmpfs_has_the_mode_of_what_it_covers(oci: Oci, bundles: BundleMaker) -> None:
    mounts = [{"destination": d, "type": "tmpfs", "source": "tmpfs"} for d in ("/etc", "/new")]
    bundle = bundles("stat", "-c", "%a", "/etc", "/new", change=mounting(*mounts))
    (bundle / "rootfs/etc").chmod(0o751)
    assert oci.inside(bundle).split()[0] == "751"
