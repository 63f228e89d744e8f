"""What a default container sees from inside: namespaces, mounts, devices, masks, capabilities, limits, user."""

from __future__ import annotations

import os
import re
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci


def test_namespaces_are_its_own(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("sh", "-c", "for n in cgroup ipc mnt net pid uts user; do readlink /proc/self/ns/$n; done"))
    inside = dict(line.split(":") for line in out.split())
    for name in ("cgroup", "ipc", "mnt", "net", "pid", "uts"):
        assert inside[name] != os.readlink(f"/proc/self/ns/{name}").split(":")[1], name
    assert inside["user"] == os.readlink("/proc/self/ns/user").split(":")[1]


def test_a_namespace_that_is_not_listed_is_the_callers(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["namespaces"] = [n for n in c["linux"]["namespaces"] if n["type"] != "network"]

    out = oci.inside(bundles("readlink", "/proc/self/ns/net", change=change))
    assert out.strip() == os.readlink("/proc/self/ns/net")


def test_a_namespace_is_joined_by_its_path(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "100"), "first")
    pid = oci.state("first")["pid"]

    def change(c: Config) -> None:
        for n in c["linux"]["namespaces"]:
            if n["type"] in ("ipc", "network", "pid"):
                n["path"] = f"/proc/{pid}/ns/{'net' if n['type'] == 'network' else n['type']}"
        c["mounts"] = [m for m in c["mounts"] if m["type"] not in ("sysfs", "mqueue")]

    out = oci.inside(bundles("sh", "-c", "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; ps", change=change), "second")
    assert os.readlink(f"/proc/{pid}/ns/net") in out and os.readlink(f"/proc/{pid}/ns/ipc") in out
    assert "sleep 100" in out


def test_first_process_is_pid_1_and_alone(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("sh", "-c", "echo $$; ls -d /proc/[0-9]*"))
    assert out.splitlines()[0] == "1"
    assert len(out.splitlines()) <= 3


def test_hostname(oci: Oci, bundles: BundleMaker) -> None:
    assert oci.inside(bundles("hostname", change=lambda c: c.update(hostname="anchor"))).strip() == "anchor"
    assert os.uname().nodename != "anchor"


def test_default_mounts(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("cat", "/proc/self/mountinfo"))
    mounts = {}
    for line in out.splitlines():
        left, right = line.split(" - ")
        mounts[left.split()[4]] = (right.split()[0], left.split()[5])
    expected = {
        "/proc": "proc", "/dev": "tmpfs", "/dev/pts": "devpts", "/dev/shm": "tmpfs", "/dev/mqueue": "mqueue", "/sys": "sysfs",
    }  # fmt: skip
    assert {path: mounts[path][0] for path in expected} == expected
    assert "ro" in mounts["/sys"][1].split(",")
    assert {"nosuid", "noexec", "nodev"} <= set(mounts["/dev/shm"][1].split(","))
    assert any(p.startswith("/sys/fs/cgroup") for p in mounts)


def test_nothing_of_the_host_is_mounted(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("cat", "/proc/self/mountinfo")
    roots = {line.split()[4] for line in oci.inside(bundle).splitlines()}
    assert all(r == "/" or r.split("/")[1] in ("proc", "dev", "sys") for r in roots)


def test_cgroup_namespace_hides_the_path(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("cat", "/proc/self/cgroup"))
    assert {line.split(":", 2)[2] for line in out.splitlines()} == {"/"}


def test_readonly_root(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles("sh", "-c", "touch /x; echo $?", change=lambda c: c["root"].update(readonly=True))
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.stdout.strip() == "1" and "Read-only" in done.stderr


def test_default_devices(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(
        bundles(
            "sh",
            "-c",
            "cd /dev; stat -c '%n %F %t:%T %a' null zero full random urandom tty; for l in fd stdin ptmx; do readlink $l; done",
        )
    )
    assert re.findall(r"(\w+) character special file (\w+:\w+) 666", out) == [
        ("null", "1:3"), ("zero", "1:5"), ("full", "1:7"), ("random", "1:8"), ("urandom", "1:9"), ("tty", "5:0"),
    ]  # fmt: skip
    assert out.split()[-3:] == ["/proc/self/fd", "/proc/self/fd/0", "pts/ptmx"]


def test_more_devices(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["devices"] = [
            {"path": "/dev/sub/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o640, "uid": 5, "gid": 6}
        ]

    out = oci.inside(bundles("stat", "-c", "%t:%T %a %u %g", "/dev/sub/fuse", change=change))
    assert out.strip() == "a:e5 640 5 6"


def test_devices_are_denied_by_default(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}]

    out = oci.inside(bundles("sh", "-c", "head -c1 /dev/zero | wc -c; head -c1 /dev/kmsg 2>&1; true", change=change))
    assert out.split("\n")[0] == "1"
    assert "not permitted" in out


def test_an_allowed_device_can_be_used(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["linux"]["devices"] = [{"path": "/dev/kmsg", "type": "c", "major": 1, "minor": 11, "fileMode": 0o666}]
        c["linux"]["resources"]["devices"].append({"allow": True, "type": "c", "major": 1, "minor": 11, "access": "r"})
        c["process"]["capabilities"] = {s: ["CAP_SYSLOG", "CAP_SYS_ADMIN"] for s in ("bounding", "effective", "permitted")}

    out = oci.inside(bundles("sh", "-c", "head -c1 /dev/kmsg | wc -c; (echo x >/dev/kmsg) 2>&1; true", change=change))
    assert out.split()[0] == "1" and "not permitted" in out, "it may be read, not written"


def test_masked_and_readonly_paths(oci: Oci, bundles: BundleMaker) -> None:
    script = "cat /proc/keys | wc -c; ls /proc/acpi /sys/firmware | grep -vc :; echo 1 >/proc/sys/kernel/panic; cat /proc/self/mountinfo"
    done = oci.run("run", "--bundle", bundles("sh", "-c", script), "c")
    assert done.stdout.split()[0] == "0"
    assert "Read-only file system" in done.stderr
    options = {line.split()[4]: line.split()[5].split(",") for line in done.stdout.splitlines() if " - " in line}
    assert all("ro" in options[p] for p in ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"))


def test_capabilities(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["process"]["capabilities"] = {
            "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_NET_RAW"],
            "permitted": ["CAP_KILL", "CAP_CHOWN"],
            "effective": ["CAP_KILL"],
            "inheritable": ["CAP_CHOWN"],
            "ambient": ["CAP_CHOWN"],
        }

    out = oci.inside(bundles("grep", "Cap", "/proc/self/status", change=change))
    found = {k: int(v, 16) for k, v in (line.split(":\t") for line in out.splitlines())}
    # As root execve raises permitted and effective to the bounding set.
    assert found["CapBnd"] == 1 << 5 | 1 << 0 | 1 << 13
    assert found["CapInh"] == 1 << 0


def test_capabilities_of_a_user(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["process"]["user"] = {"uid": 1000, "gid": 1000}
        sets = ("bounding", "permitted", "effective", "inheritable", "ambient")
        c["process"]["capabilities"] = {s: ["CAP_NET_BIND_SERVICE"] for s in sets}

    out = oci.inside(bundles("grep", "Cap", "/proc/self/status", change=change))
    assert {int(line.split()[1], 16) for line in out.splitlines()} == {1 << 10}


@pytest.mark.ferry
def test_a_capability_that_cannot_be_given_is_named(oci: Oci, bundles: BundleMaker) -> None:
    """The specification wants a warning, not a failure."""
    names = ["CAP_CHOWN", "CAP_NO_SUCH"]
    bundle = bundles(
        "grep", "CapBnd", "/proc/self/status", change=lambda c: c["process"].update(capabilities={"bounding": names})
    )
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode == 0 and int(done.stdout.split()[1], 16) == 1
    assert "warning" in done.stderr and "CAP_NO_SUCH" in done.stderr and "CAP_CHOWN" not in done.stderr


@pytest.mark.parametrize("value", [True, False])
def test_no_new_privileges(oci: Oci, bundles: BundleMaker, value: bool) -> None:
    out = oci.inside(
        bundles("grep", "NoNewPrivs", "/proc/self/status", change=lambda c: c["process"].update(noNewPrivileges=value))
    )
    assert out.split()[1] == str(int(value))


def test_rlimits(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["process"]["rlimits"] = [
            {"type": "RLIMIT_NOFILE", "soft": 256, "hard": 512},
            {"type": "RLIMIT_CORE", "soft": 0, "hard": 0},
        ]

    out = oci.inside(bundles("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c", change=change))
    assert out.split() == ["256", "512", "0"]


def test_user_groups_and_umask(oci: Oci, bundles: BundleMaker) -> None:
    def change(c: Config) -> None:
        c["process"]["user"] = {"uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o027}

    out = oci.inside(bundles("sh", "-c", "id -u; id -g; id -G; umask; echo $HOME", change=change))
    assert out.split("\n")[:5] == ["1000", "1001", "1001 5 6", "0027", "/home/alice"]


def test_environment_is_exactly_the_documents(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("env", change=lambda c: c["process"].update(env=["PATH=/bin", "A=b=c", "HOME=/x"])))
    assert sorted(out.split()) == ["A=b=c", "HOME=/x", "PATH=/bin"]


def test_cwd_is_made_and_entered(oci: Oci, bundles: BundleMaker) -> None:
    assert oci.inside(bundles("pwd", change=lambda c: c["process"].update(cwd="/some/where"))).strip() == "/some/where"


@pytest.mark.ferry
def test_signals_are_reset(oci: Oci, bundles: BundleMaker) -> None:
    out = oci.inside(bundles("grep", "Sig[BIC]", "/proc/self/status"))
    assert {int(line.split()[1], 16) for line in out.splitlines()} == {0}


def test_bind_mount_readonly_and_relative_destination(oci: Oci, bundles: BundleMaker, tmp_path: Any) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/file").write_text("from outside")

    def change(c: Config) -> None:
        c["mounts"].append(
            {"destination": "/mnt/data", "type": "bind", "source": str(tmp_path / "data"), "options": ["rbind", "ro"]}
        )

    done = oci.run("run", "--bundle", bundles("sh", "-c", "cat /mnt/data/file; touch /mnt/data/new", change=change), "c")
    assert done.stdout == "from outside" and "Read-only" in done.stderr


def test_a_link_in_the_rootfs_does_not_lead_a_mount_outside(oci: Oci, bundles: BundleMaker, tmp_path: Any) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()

    def change(c: Config) -> None:
        c["mounts"].append({"destination": "/link/inner", "type": "tmpfs", "source": "tmpfs"})

    bundle = bundles("sh", "-c", "grep -c inner /proc/self/mountinfo", change=change)
    (bundle / "rootfs/link").symlink_to(outside)
    done = oci.run("run", "--bundle", bundle, "c")
    assert not (outside / "inner").exists(), "a directory was made outside of the rootfs"
    assert done.returncode != 0 or done.stdout.strip() == "1"


def test_sysctl_of_a_namespace(oci: Oci, bundles: BundleMaker) -> None:
    before = open("/proc/sys/net/ipv4/ip_forward").read()
    other = "0" if before.strip() == "1" else "1"
    out = oci.inside(
        bundles("cat", "/proc/sys/net/ipv4/ip_forward", change=lambda c: c["linux"].update(sysctl={"net.ipv4.ip_forward": other}))
    )
    assert out.strip() == other
    assert open("/proc/sys/net/ipv4/ip_forward").read() == before
