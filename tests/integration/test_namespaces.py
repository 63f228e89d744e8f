"""User, time and joined namespaces, id mappings, and an ordinary user's containers."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker
from tests.helpers.oci import SLOW_S, Oci, wait_for

MAPPING = [{"containerID": 0, "hostID": 100000, "size": 65536}]


def in_user_namespace(config: dict[str, Any]) -> None:
    config["linux"]["namespaces"].append({"type": "user"})
    config["linux"].update(uidMappings=MAPPING, gidMappings=MAPPING)


def give(bundle: Path, uid: int = 100000) -> Path:
    """Give a bundle's rootfs to a user, and let everybody reach it."""
    for path in (bundle, *bundle.parents):
        if path in (Path("/tmp"), Path("/")):
            break
        path.chmod(path.stat().st_mode | 0o055)
    subprocess.run(["chown", "-R", "-h", f"{uid}:{uid}", bundle / "rootfs"], check=True)
    return bundle


def test_user_namespace(oci: Oci, bundles: BundleMaker) -> None:
    script = "id -u; cat /proc/self/uid_map /proc/self/gid_map; touch /made; stat -c %u:%g /made; grep CapEff /proc/self/status"
    bundle = give(bundles("sh", "-c", script, change=in_user_namespace))
    uid, uids, gids, made, caps = oci.inside(bundle).splitlines()
    assert uid == "0" and made == "0:0"
    assert uids.split() == gids.split() == ["0", "100000", "65536"]
    assert caps.split()[1] == "0000000020000420"  # as in config.json, and no more
    found = (bundle / "rootfs/made").stat()
    assert (found.st_uid, found.st_gid) == (100000, 100000)


@pytest.mark.ferry
def test_user_namespace_has_working_devices(oci: Oci, bundles: BundleMaker) -> None:
    script = "echo gone >/dev/null && head -c 3 /dev/zero | wc -c && ls -l /dev/null && echo ok >/dev/stdout"
    out = oci.inside(give(bundles("sh", "-c", script, change=in_user_namespace))).splitlines()
    assert out[0] == "3" and out[1].startswith("crw-rw-rw-") and out[2] == "ok"


def test_user_namespace_with_bind_mounts_that_only_root_reaches(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    secret = tmp_path / "closed"
    secret.mkdir(mode=0o700)
    (secret / "data").mkdir(mode=0o755)
    (secret / "data/file").write_text("seen\n")

    def change(config: dict[str, Any]) -> None:
        in_user_namespace(config)
        config["mounts"].append(
            {"destination": "/data", "type": "bind", "source": str(secret / "data"), "options": ["bind", "ro"]}
        )

    assert oci.inside(give(bundles("cat", "/data/file", change=change))) == "seen\n"


def test_exec_and_user_in_a_user_namespace(oci: Oci, bundles: BundleMaker) -> None:
    bundle = give(bundles("sleep", "60", change=in_user_namespace))
    oci.detached(bundle, "c")
    assert oci.ok("exec", "--user", "1000:1000", "c", "sh", "-c", "id -u; id -g; cat /proc/self/uid_map").split() == [
        "1000", "1000", "0", "100000", "65536",
    ]  # fmt: skip
    pid = oci.state("c")["pid"]
    assert "Uid:\t100000\t" in Path(f"/proc/{pid}/status").read_text()
    oci.ok("kill", "c", "KILL")
    oci.wait_status("c", "stopped")


def test_namespaces_joined_by_path(oci: Oci, bundles: BundleMaker) -> None:
    """A second container in all the namespaces of the first but the mount one, as in a pod."""
    oci.detached(bundles("sh", "-c", "echo one >/dev/shm/x; exec sleep 60"), "first")
    pid = oci.state("first")["pid"]
    kinds = {"pid": "pid", "network": "net", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup"}

    def change(config: dict[str, Any]) -> None:
        namespaces = [{"type": t, "path": f"/proc/{pid}/ns/{n}"} for t, n in kinds.items()]
        config["linux"]["namespaces"] = [*namespaces, {"type": "mount"}]
        del config["hostname"]

    script = "; ".join(f"readlink /proc/self/ns/{n}" for n in (*kinds.values(), "mnt")) + "; ps | grep -c 'sleep [6]0'"
    *shared, mount, seen = oci.inside(bundles("sh", "-c", script, change=change), "second").split()
    assert shared == [os.readlink(f"/proc/{pid}/ns/{n}") for n in kinds.values()]
    assert mount != os.readlink(f"/proc/{pid}/ns/mnt") and seen == "1"


def test_user_namespace_joined_by_path(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(give(bundles("sleep", "60", change=in_user_namespace)), "first")
    pid = oci.state("first")["pid"]

    def change(config: dict[str, Any]) -> None:
        kinds = {"user": "user", "network": "net", "ipc": "ipc"}
        joined = [{"type": t, "path": f"/proc/{pid}/ns/{n}"} for t, n in kinds.items()]
        config["linux"]["namespaces"] = [*joined, *({"type": t} for t in ("pid", "mount", "uts", "cgroup"))]
        # runc wants what it could read from the namespace.
        config["linux"].update(uidMappings=MAPPING, gidMappings=MAPPING)

    script = "readlink /proc/self/ns/user; readlink /proc/self/ns/net; cat /proc/self/uid_map"
    user, net, *mapping = oci.inside(give(bundles("sh", "-c", script, change=change)), "second").split()
    assert (user, net) == (os.readlink(f"/proc/{pid}/ns/user"), os.readlink(f"/proc/{pid}/ns/net"))
    assert mapping == ["0", "100000", "65536"]


def test_a_namespace_path_that_is_no_namespace(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"] = [{"type": "network", "path": "/etc/passwd"}, {"type": "mount"}]
        config.pop("hostname")

    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode and "namespace" in done.stderr


@pytest.mark.ferry
def test_time_namespace(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"].append({"type": "time"})
        config["linux"]["timeOffsets"] = {"monotonic": {"secs": 5000, "nanosecs": 7}, "boottime": {"secs": 1000000}}

    script = "cat /proc/self/timens_offsets; cut -d. -f1 /proc/uptime; readlink /proc/self/ns/time"
    bundle = bundles("sh", "-c", f"{script}; sleep 60", change=change)
    out = bundle / "out"
    with out.open("w") as f:
        oci.ok("run", "-d", "--bundle", bundle, "c", stdout=f, stderr=subprocess.DEVNULL)
    wait_for(lambda: out.read_text().count("\n") == 4, "the container's output")
    monotonic, boottime, uptime, namespace = out.read_text().splitlines()
    assert monotonic.split() == ["monotonic", "5000", "7"] and boottime.split() == ["boottime", "1000000", "0"]
    own = float(Path("/proc/uptime").read_text().split()[0])
    assert 0 <= own + 1000000 - int(uptime) < 30
    assert namespace != os.readlink("/proc/self/ns/time")
    assert oci.ok("exec", "c", "readlink", "/proc/self/ns/time").strip() == namespace


def idmap_source(tmp_path: Path) -> Path:
    """A tmpfs with a file of user 1000: not every file system can be id-mapped."""
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True)
    (source / "file").write_text("x")
    os.chown(source / "file", 1000, 1000)
    (source / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", source / "below"], check=True)
    (source / "below/file").write_text("x")
    os.chown(source / "below/file", 1000, 1000)
    return source


@pytest.mark.ferry
@pytest.mark.parametrize(("option", "below"), [("idmap", "1000"), ("ridmap", "101000")])
def test_idmapped_mounts(oci: Oci, bundles: BundleMaker, tmp_path: Path, option: str, below: str) -> None:
    source = idmap_source(tmp_path)

    def change(config: dict[str, Any]) -> None:
        mappings = {"uidMappings": MAPPING, "gidMappings": MAPPING}
        mount = {"destination": "/data", "source": str(source), "options": ["rbind", option], **mappings}
        config["mounts"].append({"type": "bind", **mount})

    try:
        bundle = bundles("stat", "-c", "%u:%g", "/data/file", "/data/below/file", change=change)
        assert oci.inside(bundle).split() == ["101000:101000", f"{below}:{below}"]
    finally:
        subprocess.run(["umount", "-R", source], check=True)


@pytest.mark.ferry
def test_idmapped_mount_with_the_mappings_of_the_container(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """What user 1000 owns outside is user 1000's inside, though users are mapped."""
    source = idmap_source(tmp_path)
    subprocess.run(["umount", source / "below"], check=True)  # its mount would be locked to this one: only rbind could take both

    def change(config: dict[str, Any]) -> None:
        in_user_namespace(config)
        mount = {"destination": "/data", "source": str(source), "options": ["bind", "idmap"]}
        config["mounts"].append({"type": "bind", **mount, "uidMappings": MAPPING, "gidMappings": MAPPING})

    try:
        assert oci.inside(give(bundles("stat", "-c", "%u:%g", "/data/file", change=change))).split() == ["1000:1000"]
    finally:
        subprocess.run(["umount", "-R", source], check=True)


@pytest.mark.ferry
def test_a_file_system_that_cannot_be_idmapped(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        mount = {"destination": "/data", "type": "bind", "source": "/proc", "options": ["bind", "idmap"]}
        config["mounts"].append({**mount, "uidMappings": MAPPING, "gidMappings": MAPPING})

    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode == 1 and "/data" in done.stderr and "cannot be id-mapped" in done.stderr


@pytest.fixture
def ordinary(tmp_path: Path) -> Any:
    """A command line of user nobody's that runs the runtime under test, and a directory of that user's."""
    home = Path("/tmp") / f"ferry-ordinary-{os.getpid()}"
    home.mkdir(mode=0o755)
    os.chown(home, 65534, 65534)
    command = os.environ.get("RUNTIME") or "runtime"
    # The interpreter may be where an ordinary user cannot reach it: then one that the user can takes its place.
    argv = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "env", f"HOME={home}", f"XDG_RUNTIME_DIR={home}"]
    python = shutil.which("python3", path="/usr/bin")
    if command == "runtime":
        code = home / "code"
        shutil.copytree(Path(__file__).parents[2] / "runtime", code / "runtime", ignore=shutil.ignore_patterns("__pycache__"))
        site = Path(json.__file__).parents[1] / "site-packages"
        packages = Path(next(p for p in sys.path if p.endswith("site-packages")) or site)
        shutil.copytree(packages / "click", code / "click")
        argv += [f"PYTHONPATH={code}", "PYTHONDONTWRITEBYTECODE=1", str(python), "-c", "from runtime.cli import main; main()"]
    else:
        argv += [command]
    yield home, argv
    shutil.rmtree(home)


def test_an_ordinary_user_runs_a_container(ordinary: tuple[Path, list[str]], bundles: BundleMaker) -> None:
    home, argv = ordinary
    bundle = home / "bundle"
    bundles("true", path=bundle)
    (bundle / "config.json").unlink()
    subprocess.run(["chown", "-R", "-h", "65534:65534", bundle], check=True)

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*argv, "--root", str(home / "state"), *args], cwd=bundle, capture_output=True, text=True, timeout=SLOW_S
        )

    made = run("spec", "--rootless")
    assert made.returncode == 0, made.stderr
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(terminal=False, args=["sh", "-c", "id -u; touch /made; hostname; sleep 0.2; exit 7"])
    config["root"]["readonly"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    done = run("run", "c")
    assert (done.returncode, done.stdout.split()) == (7, ["0", config["hostname"]]), done.stderr
    assert stat.S_IMODE((home / "state").stat().st_mode) & 0o077 in (0, 0o11)
    assert (bundle / "rootfs/made").stat().st_uid == 65534
    config["process"]["args"] = ["sleep", "60"]
    (bundle / "config.json").write_text(json.dumps(config))
    with open("/dev/null", "w") as null:
        subprocess.run([*argv, "--root", str(home / "state"), "run", "-d", "d"], cwd=bundle, check=True, stdout=null, stderr=null)
    inside = run("exec", "d", "id", "-u")
    assert (inside.returncode, inside.stdout) == (0, "0\n"), inside.stderr
    assert run("kill", "d", "KILL").returncode == 0
    wait_for(lambda: json.loads(run("state", "d").stdout)["status"] == "stopped", "the end of d")
    assert run("delete", "d").returncode == 0
