"""The known breakouts of OCI runtimes, each tried: a test fails when its attack succeeds."""

from __future__ import annotations

import array
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.bundle import BundleMaker, busybox
from tests.helpers.oci import Oci, wait_for
from tests.integration.test_namespaces import give, in_user_namespace


def interpreter() -> Path:
    return Path(os.path.realpath(sys.executable))


def fingerprint(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.ferry
@pytest.mark.parametrize("how", ["command", "link", "script", "exec-command", "exec-script"])
def test_cve_2019_5736_the_runtimes_own_file_is_not_executed_inside(oci: Oci, bundles: BundleMaker, how: str) -> None:
    """/proc/self/exe as the command, or as what executes the command: neither may be the host's interpreter."""
    before = fingerprint(interpreter())

    def limits(config: dict[str, Any]) -> None:
        config["process"]["rlimits"] = [{"type": "RLIMIT_CPU", "soft": 2, "hard": 2}]  # what executes itself ends

    command = {"command": "/proc/self/exe", "link": "/bin/lnk", "script": "/bin/hostile"}.get(how, "sleep")
    bundle = bundles(command, "60", change=limits)
    (bundle / "rootfs/bin/lnk").symlink_to("/proc/self/exe")
    script = bundle / "rootfs/bin/hostile"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    # Whoever executes the host's interpreter in here gets this loader with it, and a segmentation fault. What is
    # expected instead: a refusal, or the stub executing itself until its processor time is used up.
    loader = re.search(rb"/lib[\w/.-]*/ld[\w.-]*\.so[\w.]*", interpreter().read_bytes())
    assert loader is not None
    planted = bundle / "rootfs" / loader[0].decode().lstrip("/")
    planted.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(busybox(), planted)
    if how.startswith("exec"):
        oci.detached(bundle, "c")
        done = oci.run("exec", "c", "/proc/self/exe" if how == "exec-command" else "/bin/hostile")
    else:
        done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode in (126, 128 + signal.SIGXCPU, 128 + signal.SIGKILL), done
    assert fingerprint(interpreter()) == before


@pytest.mark.ferry
def test_cve_2019_5736_by_a_hook_that_runs_inside(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        config["process"]["rlimits"] = [{"type": "RLIMIT_CPU", "soft": 1, "hard": 1}]
        config["hooks"] = {"startContainer": [{"path": "/bin/hostile"}]}

    bundle = bundles("true", change=change)
    script = bundle / "rootfs/bin/hostile"
    script.write_text("#!/proc/self/exe\n")
    script.chmod(0o755)
    done = oci.run("run", "--bundle", bundle, "c")
    # The stub executes itself until its processor time is used up; the interpreter, without its loader, would not be found.
    assert done.returncode == 1 and ("status -24" in done.stderr or "status -9" in done.stderr), done


@pytest.mark.ferry
def test_cve_2019_5736_exe_of_the_process_that_executes_is_a_sealed_file(oci: Oci, bundles: BundleMaker) -> None:
    """Between us and the container's program only the stub is there; whoever catches it cannot write it."""
    from runtime.linux import execstub

    fd = execstub.make("/bin/true", 9)
    assert fd is not None
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(OSError):
        os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)
    os.close(fd)


@pytest.mark.ferry
def test_the_runtimes_process_cannot_be_looked_into_from_inside(oci: Oci, bundles: BundleMaker) -> None:
    """While `exec` prepares, its process is in the container's pid namespace: its exe, root and descriptors must be closed."""
    spy = (
        "while :; do for p in /proc/[0-9]*; do [ $p = /proc/1 ] && continue; "
        "l=$(readlink $p/exe) && case $l in *python*) echo $p $l >>/caught;; esac; done; done"
    )
    bundle = bundles("sh", "-c", spy)
    oci.detached(bundle, "c")
    for _ in range(15):
        oci.ok("exec", "c", "true")
    assert not (bundle / "rootfs/caught").exists()


@pytest.mark.parametrize("number", [3, 5, 7, 8, 9, 12])
def test_cve_2024_21626_a_working_directory_on_a_leaked_descriptor(oci: Oci, bundles: BundleMaker, number: int) -> None:
    cwd = f"/proc/self/fd/{number}"
    done = oci.run(
        "run", "--bundle", bundles("cat", "../../../../etc/shadow", change=lambda c: c["process"].update(cwd=cwd)), "c"
    )
    assert done.returncode != 0 and "root:" not in done.stdout
    oci.detached(bundles("sleep", "60"), "d")
    done = oci.run("exec", "--cwd", cwd, "d", "cat", "../../../../etc/shadow")
    assert done.returncode != 0 and "root:" not in done.stdout


def test_cve_2024_21626_no_descriptor_leaks(oci: Oci, bundles: BundleMaker) -> None:
    """Only stdio, and the directory that ls itself opened, whatever the caller had open."""
    extra = [os.open("/", os.O_RDONLY) for _ in range(4)]
    try:
        for fd in extra:
            os.set_inheritable(fd, True)
        assert oci.ok("run", "--bundle", bundles("ls", "/proc/self/fd"), "c", close_fds=False).split() == ["0", "1", "2", "3"]
        oci.detached(bundles("sleep", "60"), "d")
        assert oci.ok("exec", "d", "ls", "/proc/self/fd", close_fds=False).split() == ["0", "1", "2", "3"]
    finally:
        for fd in extra:
            os.close(fd)


@pytest.mark.parametrize("target", ["/etc", "/../../../../../../../..", "/proc/self/root", "/proc/1/root"])
def test_links_as_mount_targets_stay_inside(oci: Oci, bundles: BundleMaker, tmp_path: Path, target: str) -> None:
    """CVE-2019-16884, CVE-2023-27561: a rootfs whose directories are links out of it."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "planted").write_text("x")

    def change(config: dict[str, Any]) -> None:
        config["mounts"].append({"destination": "/data/inner", "type": "bind", "source": str(source), "options": ["bind"]})

    bundle = bundles("true", change=change)
    (bundle / "rootfs/data").symlink_to(target)
    oci.run("run", "--bundle", bundle, "c")
    assert not Path("/etc/inner").exists() and not Path("/inner").exists()
    assert str(source) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize("place", ["proc", "sys"])
def test_cve_2023_28642_proc_or_sys_as_a_link_is_refused(oci: Oci, bundles: BundleMaker, place: str) -> None:
    bundle = bundles("cat", "/proc/self/attr/current")
    (bundle / "rootfs" / place).rmdir()
    (bundle / "rootfs" / place).symlink_to("/tmp")
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode != 0 and "ordinary directory" in done.stderr


@pytest.mark.ferry  # runc 1.1.5 loses this race, and makes directories on the host
def test_cve_2021_30465_a_link_that_changes_while_mounting(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """Two containers share a volume; one exchanges a directory in it with a link to / for ever."""
    volume = tmp_path / "volume"
    (volume / "place").mkdir(parents=True)
    (volume / "link").symlink_to("/")
    renameat2 = (
        "import ctypes,sys\nl=ctypes.CDLL(None)\n"
        "while True: l.syscall(316 if sys.argv[3]=='x86_64' else 276,-100,sys.argv[1].encode(),-100,sys.argv[2].encode(),2)"
    )
    swapper = subprocess.Popen([sys.executable, "-c", renameat2, volume / "place", volume / "link", os.uname().machine])
    planted = tmp_path / "planted"
    planted.mkdir()

    def change(config: dict[str, Any]) -> None:
        config["mounts"] += [
            {"destination": "/volume", "type": "bind", "source": str(volume), "options": ["rbind"]},
            {"destination": "/volume/place/ferry-planted", "type": "bind", "source": str(planted), "options": ["bind"]},
        ]

    bundle = bundles("cat", "/proc/self/mountinfo", change=change)
    try:
        for _ in range(15):
            done = oci.run("run", "--bundle", bundle, "c")
            # Wherever it went, it was inside: the host's root has no such directory, and the mount is no host's.
            if done.returncode == 0:
                assert "ferry-planted" in done.stdout
            assert not Path("/ferry-planted").exists()
    finally:
        swapper.kill()
        swapper.wait()
    assert str(planted) not in Path("/proc/self/mountinfo").read_text()


def test_cve_2025_31133_null_as_a_link_does_not_unmask(oci: Oci, bundles: BundleMaker) -> None:
    """With /dev/null a link to a file of /proc, masking would bind that file, writable, in place of the masked one."""

    def change(config: dict[str, Any]) -> None:
        config["mounts"] = [m for m in config["mounts"] if not m["destination"].startswith("/dev")]
        config["linux"]["readonlyPaths"] = []
        config["linux"]["maskedPaths"] = ["/proc/kcore"]

    bundle = bundles("sh", "-c", "ls -l /proc/kcore; cat /proc/self/mountinfo", change=change)
    (bundle / "rootfs/dev/null").symlink_to("/proc/sys/kernel/core_pattern")
    done = oci.run("run", "--bundle", bundle, "c")
    assert done.returncode != 0 or "core_pattern" not in done.stdout


def test_cve_2025_52565_console_as_a_link(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """/dev/console leading to a masked file of /proc would have the terminal, not the mask, mounted there."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console.sock"))
    listener.listen()
    masters: list[int] = []

    def accept() -> None:
        connection, _ = listener.accept()
        _, rights, _, _ = connection.recvmsg(4096, socket.CMSG_LEN(4))
        masters.extend(array.array("i", rights[0][2]))

    threading.Thread(target=accept, daemon=True).start()

    def change(config: dict[str, Any]) -> None:
        config["process"]["terminal"] = True
        config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/dev"]

    bundle = bundles("sleep", "60", change=change)
    for name in ("pts", "shm", "mqueue"):
        (bundle / "rootfs/dev" / name).mkdir()
    (bundle / "rootfs/dev/console").symlink_to("/proc/sysrq-trigger")
    null = subprocess.DEVNULL
    oci.run("run", "-d", "--console-socket", tmp_path / "console.sock", "--bundle", bundle, "c", stdout=null, stderr=null)
    if oci.run("state", "c").returncode == 0:
        info = oci.ok("exec", "c", "cat", "/proc/self/mountinfo")
        trigger = [line for line in info.splitlines() if line.split()[4] == "/proc/sysrq-trigger"]
        assert all(line.split(" - ")[1].split()[0] != "devpts" for line in trigger)


@pytest.mark.ferry
def test_cve_2025_52881_writes_to_proc_are_not_redirected(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A /proc of the attacker's, in which sysctl's file is another file, takes nothing of what the runtime writes."""
    fake = tmp_path / "fake"
    (fake / "sys/net/ipv4").mkdir(parents=True)
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (fake / "sys/net/ipv4/ip_forward").symlink_to(victim)
    for name in ("self", "thread-self"):
        (fake / name / "attr").mkdir(parents=True)
        (fake / name / "fd").mkdir()

    def change(config: dict[str, Any]) -> None:
        config["mounts"] = [m for m in config["mounts"] if m["destination"] != "/proc"]
        config["mounts"].insert(0, {"destination": "/proc", "type": "bind", "source": str(fake), "options": ["bind"]})
        config["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1"}

    oci.detached(bundles("sleep", "60", change=change), "c")
    assert victim.read_text() == "untouched"
    pid = oci.state("c")["pid"]
    inside = subprocess.run(
        ["nsenter", "-n", "-t", str(pid), "cat", "/proc/sys/net/ipv4/ip_forward"], capture_output=True, text=True, check=True
    )
    assert inside.stdout == "1\n"


@pytest.mark.ferry
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["mounts"][1]["options"].append("x" * 5000), "/mounts/1/options"),
        (lambda c: c["process"]["args"].append("x" * (1 << 22)), ""),
        (lambda c: c["process"].update(env=["A=" + "x" * (1 << 22)]), ""),
        (lambda c: c.update(hostname="h" * 70000), "/hostname"),
        (
            lambda c: c["linux"].update(uidMappings=[{"containerID": i, "hostID": i, "size": 1} for i in range(0, 20000, 2)]),
            "/linux/uidMappings",
        ),
        (lambda c: c["process"].update(cwd="/" + "d/" * 5000), ""),
    ],
)
def test_cve_2021_43784_what_is_too_long_is_refused(oci: Oci, bundles: BundleMaker, change: Any, words: str) -> None:
    """Nothing is cut off, nothing overflows into the next field."""
    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode in (1, 126, 127) and words in done.stderr and "Traceback" not in done.stderr
    assert oci.ok("list", "-q") == ""


@pytest.mark.ferry
def test_exec_into_a_hostile_root(oci: Oci, bundles: BundleMaker) -> None:
    """A FIFO for /etc/passwd, links everywhere: exec neither hangs nor leaves the container."""
    bundle = bundles("sleep", "60")
    oci.detached(bundle, "c")
    rootfs = bundle / "rootfs"
    (rootfs / "etc/passwd").unlink()
    os.mkfifo(rootfs / "etc/passwd")
    (rootfs / "etc/group").unlink()
    (rootfs / "etc/group").symlink_to("/dev/zero")
    (rootfs / "tmp").rmdir()
    (rootfs / "tmp").symlink_to("/proc/1/root/../../../..")
    start = time.monotonic()
    assert oci.ok("exec", "--user", "0", "--cwd", "/tmp", "c", "ls", "/").split() == sorted(p.name for p in rootfs.iterdir())
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("name", ["../escape", "a/b", "..", ".", "", "x\ny", "a" * 2000, "é"])
def test_ids_cannot_leave_the_state_directory(oci: Oci, bundles: BundleMaker, name: str) -> None:
    bundle = bundles("true")
    before = sorted(p.name for p in oci.root.parent.iterdir())
    done = oci.run("create", "--bundle", bundle, "--", name)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert [n for n in sorted(p.name for p in oci.root.parent.iterdir()) if n != oci.root.name] == [
        n for n in before if n != oci.root.name
    ]


@pytest.mark.ferry
def test_state_directories_are_closed_to_others(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "60"), "c")
    assert stat.S_IMODE((oci.root / "c").stat().st_mode) == 0o700
    assert stat.S_IMODE(oci.root.stat().st_mode) & 0o066 == 0
    assert all(stat.S_IMODE(p.stat().st_mode) & 0o077 == 0 for p in (oci.root / "c").iterdir() if p.is_file())


def test_devices_of_the_host_stay_closed(oci: Oci, bundles: BundleMaker) -> None:
    """A container that may make nodes may still not use them."""

    def change(config: dict[str, Any]) -> None:
        for name in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][name].append("CAP_MKNOD")

    script = "mknod /disk b 259 0; mknod /mem c 1 1; head -c 1 /disk; head -c 1 /mem; true"
    done = oci.run("run", "--bundle", bundles("sh", "-c", script, change=change), "c")
    assert done.stderr.count("Operation not permitted") == 2 and done.stdout == ""


def test_sysrq_and_kernel_parameters_cannot_be_written(oci: Oci, bundles: BundleMaker) -> None:
    script = "for f in /proc/sysrq-trigger /proc/sys/kernel/core_pattern /proc/irq/default_smp_affinity; do echo h >$f && echo wrote; done; true"
    assert "wrote" not in oci.ok("run", "--bundle", bundles("sh", "-c", script), "c", stderr=subprocess.DEVNULL)


def test_state_of_another_is_not_followed(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """A bundle whose config.json is not a file, and whose rootfs leads elsewhere."""
    bundle = bundles("true")
    config = json.loads((bundle / "config.json").read_text())
    (bundle / "config.json").unlink()
    os.mkfifo(bundle / "config.json")
    writer = threading.Thread(target=lambda: (bundle / "config.json").write_text(json.dumps(config)), daemon=True)
    writer.start()
    done = oci.run("run", "--bundle", bundle, "c")
    assert "Traceback" not in done.stderr
    if writer.is_alive():  # nobody read it: let the thread end
        fd = os.open(bundle / "config.json", os.O_RDONLY | os.O_NONBLOCK)
        wait_for(lambda: not writer.is_alive(), "the writer's end")
        os.close(fd)


def test_no_pivot_leaves_no_unmasked_proc_behind(oci: Oci, bundles: BundleMaker) -> None:
    """A user namespace made inside may mount its own proc only if an unmasked one is there to be seen."""

    def change(config: dict[str, Any]) -> None:
        for name in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][name].append("CAP_SETFCAP")

    script = "unshare -Urmpf sh -c 'mount -t proc proc /tmp && test -w /tmp/sys/kernel/core_pattern && echo open'; echo done"
    done = oci.run("run", "--no-pivot", "--bundle", bundles("sh", "-c", script, change=change), "c")
    assert done.stdout.split() == ["done"], done


def test_flags_of_the_hosts_mounts_stay_in_a_user_namespace(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """What is mounted read-only on the host cannot be made writable by the root of a user namespace."""
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "none", source], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", source], check=True)

    def change(config: dict[str, Any]) -> None:
        in_user_namespace(config)
        for name in ("bounding", "effective", "permitted"):
            config["process"]["capabilities"][name].append("CAP_SYS_ADMIN")
        config["mounts"].append({"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind"]})

    try:
        script = "mount -o remount,bind,rw /data; touch /data/pwned && echo written; echo done"
        done = oci.run("run", "--bundle", give(bundles("sh", "-c", script, change=change)), "c")
        assert done.stdout.split() == ["done"], done
    finally:
        subprocess.run(["umount", source], check=True)


@pytest.mark.ferry
def test_a_paused_exec_keeps_nobody_from_ending_the_container(oci: Oci, bundles: BundleMaker) -> None:
    oci.detached(bundles("sleep", "60"), "c")
    oci.ok("pause", "c")
    hanging = subprocess.Popen(
        oci.argv("exec", "--ignore-paused", "c", "true"), stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        time.sleep(0.5)
        assert hanging.poll() is None
        oci.ok("delete", "--force", "c")
    finally:
        hanging.kill()
        hanging.wait()


def test_a_host_namespaces_parameters_are_not_set(oci: Oci, bundles: BundleMaker) -> None:
    before = Path("/proc/sys/net/ipv4/ip_default_ttl").read_text()

    def change(config: dict[str, Any]) -> None:
        namespaces = [n for n in config["linux"]["namespaces"] if n["type"] != "network"]
        config["linux"]["namespaces"] = [*namespaces, {"type": "network", "path": f"/proc/{os.getpid()}/ns/net"}]
        config["linux"]["sysctl"] = {"net.ipv4.ip_default_ttl": "33"}

    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode != 0 and "sysctl" in done.stderr
    assert Path("/proc/sys/net/ipv4/ip_default_ttl").read_text() == before


@pytest.mark.ferry
def test_a_profile_that_would_bypass_the_stub_is_refused(oci: Oci, bundles: BundleMaker) -> None:
    def change(config: dict[str, Any]) -> None:
        config["process"]["noNewPrivileges"] = False
        config["linux"]["seccomp"] = {
            "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["execveat"], "action": "SCMP_ACT_ERRNO"}]
        }  # fmt: skip

    done = oci.run("run", "--bundle", bundles("true", change=change), "c")
    assert done.returncode == 1 and "execveat" in done.stderr


def test_a_deep_tree_of_cgroups_can_be_deleted(oci: Oci, bundles: BundleMaker) -> None:
    """A container that may write its cgroup mount nests cgroups deeper than calls of Python's nest."""
    oci.detached(bundles("sleep", "60", change=lambda c: c["linux"].update(cgroupsPath="/ferry-deep")), "c")
    base = next(p for p in (Path("/sys/fs/cgroup/pids"), Path("/sys/fs/cgroup")) if (p / "ferry-deep").is_dir())
    fd = os.open(base / "ferry-deep", os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(1100):
        try:
            os.mkdir("d", dir_fd=fd)
        except OSError:
            break  # as deep as this kernel lets them be
        inner = os.open("d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    oci.ok("delete", "--force", "c")
    assert not (base / "ferry-deep").exists()
