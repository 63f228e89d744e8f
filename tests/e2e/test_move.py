"""`migrate move` between two hosts with real sshd, and everything that must be as before."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import stat
import subprocess
import threading
import time
from pathlib import Path
from statistics import median

import pytest

from migrate.phase import Phase
from migrate.story import lines, tell
from tests.helpers.bed import BUNDLES, Bed
from tests.helpers.bundle import BundleMaker, assert_gapless, counter, numbers
from tests.helpers.oci import wait_for

NAME = "mybusybox"
BUNDLE = f"{BUNDLES}/{NAME}"


@pytest.fixture
def counting(bed: Bed) -> Bed:
    """A bed with a container on host1 that counts."""
    make(bed)
    return bed


def make(bed: Bed, *args: str, host: str = "host1", at: str = BUNDLE) -> Path:
    path = bed.path(host, at)
    path.parent.mkdir(parents=True, exist_ok=True)
    bundle = BundleMaker(path.parent)(*(args or counter()), path=path)
    bed.start(host, at, NAME)
    if not args:
        wait_for(lambda: len(numbers(path / "rootfs/count")) > 3, "counting")
    return bundle


def count(bed: Bed, host: str) -> Path:
    return bed.path(host, f"{BUNDLE}/rootfs/count")


def runs_on(bed: Bed, host: str) -> None:
    """Exactly one copy runs, on this host, and its numbers have neither gap nor repetition."""
    other = "host2" if host == "host1" else "host1"
    assert bed.status(host, NAME) == "running"
    assert bed.status(other, NAME) is None
    assert not bed.path(other, BUNDLE).exists()
    at = len(numbers(count(bed, host)))
    wait_for(lambda: len(numbers(count(bed, host))) > at + 2, f"counting on {host}")
    assert_gapless(numbers(count(bed, host)))


def start_python(bed: Bed, code: str, network: str = "") -> Path:
    """Start a container on host1 that runs the machine's own Python, in a network namespace by name; return its bundle."""
    path = bed.path("host1", BUNDLE)

    def change(config: dict) -> None:  # type: ignore[type-arg]
        for directory in ("/usr", "/lib", "/lib64"):
            if Path(directory).exists():
                config["mounts"].append(
                    {"destination": directory, "type": "bind", "source": directory, "options": ["rbind", "ro"]}
                )

        if network:
            namespaces = config["linux"]["namespaces"]
            namespaces[:] = [n for n in namespaces if n["type"] != "network"]
            namespaces.append({"type": "network", "path": f"/run/netns/{network}"})

    bundle = BundleMaker(path.parent)("/usr/bin/python3", "-c", code, path=path, change=change)
    for directory in ("usr", "lib", "lib64"):
        (bundle / "rootfs" / directory).mkdir()
    bed.start("host1", BUNDLE, NAME)
    return bundle


def test_there_and_back(counting: Bed) -> None:
    bed = counting
    report = bed.move("host1", NAME, "host2")
    runs_on(bed, "host2")
    assert report["source"] == "host1" and report["target"] == "host2"
    assert 0 < report["downtime_ms"] < report["total_ms"]
    assert report["wire_bytes"] > 1 << 20
    assert list(report["phases_ms"]) == ["preflight", "prepare", "precopy", "freeze", "ship", "restore", "commit", "finish"]
    bed.move("host2", NAME, "host1")
    runs_on(bed, "host1")


def test_what_is_visible_inside_is_the_same(counting: Bed) -> None:
    look = (
        "cat /proc/1/cgroup /proc/1/limits; grep -E 'Cap|NoNew|Uid|Gid' /proc/1/status; hostname; mount | cut -d' ' -f1-5 | sort;"
        " ls -l /proc/1/fd | sed 's/.* //'; ip -o addr; cat /proc/1/environ; ls -ln /dev | sed 's/.*root//; s/ [A-Z][a-z][a-z] .*:.. / /'"
    )
    before = counting.ok("host1", "runtime", "exec", NAME, "sh", "-c", look)
    counting.move("host1", NAME, "host2")
    assert counting.ok("host2", "runtime", "exec", NAME, "sh", "-c", look) == before


def test_limits_hold_on_the_target(bed: Bed) -> None:
    path = bed.path("host1", BUNDLE)
    limits = {"memory": {"limit": 64 << 20}, "pids": {"limit": 33}, "cpu": {"quota": 50000, "period": 100000}}
    BundleMaker(path.parent)(*counter(), path=path, change=lambda c: c["linux"]["resources"].update(limits))
    bed.start("host1", BUNDLE, NAME)
    read = "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null; true"
    before = bed.ok("host1", "runtime", "exec", NAME, "sh", "-c", read)
    assert before.split()[0] == "33"
    bed.move("host1", NAME, "host2")
    assert bed.ok("host2", "runtime", "exec", NAME, "sh", "-c", read) == before


def test_files_keep_everything(bed: Bed) -> None:
    """Owners, modes, xattrs, hard links, holes, devices, sockets, times: none of it is lost on the way."""
    make(bed)
    rootfs = bed.path("host1", f"{BUNDLE}/rootfs")
    odd = rootfs / "odd"
    odd.mkdir()
    (odd / "setuid").write_bytes(b"x")
    os.chown(odd / "setuid", 1234, 4321)
    os.chmod(odd / "setuid", 0o4751)
    (odd / "one").write_bytes(b"linked")
    os.link(odd / "one", odd / "two")
    with (odd / "holes").open("wb") as f:
        f.seek(64 << 20)
        f.write(b"end")
        f.truncate(100 << 20)
    (odd / "dangling").symlink_to("/no/where")
    os.mkfifo(odd / "fifo", 0o640)
    os.mknod(odd / "device", stat.S_IFCHR | 0o622, os.makedev(1, 3))
    os.mknod(odd / "socket", stat.S_IFSOCK | 0o700)
    os.setxattr(odd / "one", "user.colour", b"blue\0green")
    os.setxattr(odd / "setuid", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    (odd / "latin-\udce9").write_bytes(b"a name that is no UTF-8")
    (odd / "empty").mkdir(mode=0o1777)
    os.chmod(odd / "empty", 0o1777)
    os.setxattr(odd / "empty", "user.directory", b"yes")
    os.utime(odd / "one", ns=(1, 1_234_567_890_123_456_789))
    os.utime(odd, ns=(1, 987_654_321_123_456_789))
    before = _describe(odd)
    bed.move("host1", NAME, "host2")
    assert _describe(bed.path("host2", f"{BUNDLE}/rootfs/odd")) == before


def _describe(root: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    inodes: dict[int, str] = {}
    for path in [root, *sorted(root.rglob("*"))]:
        st = path.lstat()
        name = os.fsencode(path.relative_to(root)).hex()
        xattrs = {a: os.getxattr(path, a, follow_symlinks=False) for a in os.listxattr(path, follow_symlinks=False)}
        content: object = None
        if path.is_symlink():
            content = os.readlink(path)
        elif stat.S_ISREG(st.st_mode):
            content = hash(path.read_bytes())
            assert st.st_blocks * 512 < (1 << 20), "the holes were filled"
        first = inodes.setdefault(st.st_ino, name) if not path.is_dir() else name
        found[name] = (
            st.st_mode,
            st.st_uid,
            st.st_gid,
            st.st_rdev,
            st.st_mtime_ns if not path.is_symlink() else 0,
            xattrs,
            content,
            first,
        )
    return found


def test_files_that_change_while_they_are_copied(bed: Bed) -> None:
    """The container rewrites, renames, links and removes files all the time: the target gets what the last freeze saw."""
    script = (
        "i=0; mkdir /w; while :; do i=$((i+1)); echo $i >>/count; echo $i >/w/new; mv /w/new /w/current; "
        "rm -rf /w/d$((i-3)); mkdir /w/d$i; echo $i >/w/d$i/f; ln -f /w/d$i/f /w/link; sleep 0.01; done"
    )
    make(bed, "sh", "-c", script)
    source = bed.path("host1", f"{BUNDLE}/rootfs")
    wait_for(lambda: len(numbers(source / "count")) > 5, "counting")
    for here, there in (("host1", "host2"), ("host2", "host1"), ("host1", "host2")):
        bed.move(here, NAME, there)
        runs_on(bed, there)
        bed.ok(there, "runtime", "pause", NAME)
        rootfs = bed.path(there, f"{BUNDLE}/rootfs")
        last = numbers(rootfs / "count")[-1]
        directories = {int(p.name[1:]) for p in (rootfs / "w").glob("d*")}
        assert directories <= set(range(last - 4, last + 1)), "what was removed came back"
        bed.ok(there, "runtime", "resume", NAME)


def test_a_bundle_with_a_long_name_and_memory_of_its_own(bed: Bed) -> None:
    """What a process holds in memory only is there after the move."""
    script = "v=$(head -c 3000000 /dev/urandom | od -An -tx1 | md5sum); echo $v >/first; sleep 0.5; while :; do echo $v >/now; sleep 0.05; done"
    make(bed, "sh", "-c", script)
    wait_for((bed.path("host1", f"{BUNDLE}/rootfs") / "now").exists, "the program")
    bed.move("host1", NAME, "host2")
    rootfs = bed.path("host2", f"{BUNDLE}/rootfs")
    (rootfs / "now").unlink()
    wait_for(lambda: (rootfs / "now").exists() and (rootfs / "now").read_text() != "", "the program on host2")
    assert (rootfs / "now").read_text() == (rootfs / "first").read_text()


def test_a_large_memory(bed: Bed) -> None:
    code = "import os, time; m = bytearray(os.urandom(80 << 20)); n = 0\nwhile True: n += 1; m[n] = n % 251; open('/count', 'a').write(f'{n}\\n'); time.sleep(0.02)"
    bundle = start_python(bed, code)
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    report = bed.move("host1", NAME, "host2")
    assert report["wire_bytes"] > 80 << 20
    assert {f["code"] for f in report["findings"] if f["severity"] == "warn"} == {"bind-source"}
    runs_on(bed, "host2")


def test_writes_through_a_shared_mapping_are_not_lost(bed: Bed) -> None:
    """They leave no trace in the file's times, so that a comparison of times would miss them."""
    code = (
        "import mmap, time; f = open('/mapped', 'w+b'); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); n = 0\n"
        "while True: n += 1; m[0:8] = n.to_bytes(8, 'big'); time.sleep(0.005)"
    )
    bundle = start_python(bed, code)

    def value(host: str) -> int:
        return int.from_bytes(bed.path(host, f"{BUNDLE}/rootfs/mapped").read_bytes()[:8], "big")

    wait_for(lambda: (bundle / "rootfs/mapped").exists() and value("host1") > 10, "counting")
    # Frozen just before the restore is let go: the file must be what the freeze saw, not what a pass before it saw.
    report = bed.move("host1", NAME, "host2")
    at = value("host2")
    wait_for(lambda: value("host2") > at, "counting on host2")
    assert report["details"]["freeze"]["delta"]["entries"] >= 1


def test_a_stdin_that_was_a_pipe(bed: Bed) -> None:
    """On the target it is the null device, of the host: that must not be in the way of the next move."""
    path = bed.path("host1", BUNDLE)
    BundleMaker(path.parent)(*counter(), path=path)
    null = subprocess.DEVNULL
    run = ("runtime", "run", "--detach", "--bundle", BUNDLE, NAME)
    assert bed.run("host1", *run, stdin=subprocess.PIPE, stdout=null, stderr=null).returncode == 0
    bed.move("host1", NAME, "host2")
    bed.move("host2", NAME, "host1")
    runs_on(bed, "host1")


def test_plain_output(counting: Bed) -> None:
    done = counting.run("host1", "migrate", "move", NAME, "host2")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{NAME} runs on host2: downtime ") and "on the wire" in done.stdout
    for phase in ("prepare", "precopy", "freeze", "ship", "restore", "commit", "finish"):
        assert any(line.startswith(phase) and " ms" in line for line in done.stderr.splitlines()), phase
    assert "/s" in done.stderr


def test_dry_run_touches_nothing(counting: Bed) -> None:
    before = [counting.inventory(h) for h in ("host1", "host2")]
    out = counting.ok("host1", "migrate", "move", "--dry-run", NAME, "host2")
    assert "from host1 to host2" in out and "[downtime]" in out
    plan = json.loads(counting.ok("host1", "migrate", "move", "--dry-run", "--json", NAME, "host2"))
    assert plan["bundle"] == BUNDLE and [p["phase"] for p in plan["phases"]][-1] == "finish"
    after = [counting.inventory(h) for h in ("host1", "host2")]
    for b, a in zip(before, after, strict=True):
        del b["PROCESSES"], a["PROCESSES"]  # the container's own come and go
        assert a == b
    runs_on(counting, "host1")


def test_list_and_check(counting: Bed) -> None:
    document = json.loads(counting.ok("host1", "migrate", "list", "--json", "-", "host2"))
    assert [(c["host"], c["id"], c["status"]) for c in document["containers"]] == [("this host", NAME, "running")]
    table = counting.ok("host2", "migrate", "list", "host1").splitlines()
    assert table[1].split()[:3] == ["host1", NAME, "running"]
    findings = json.loads(counting.ok("host1", "migrate", "check", "--json", NAME, "host2"))["findings"]
    assert {f["severity"] for f in findings} == {"ok"}


def test_keep_source(counting: Bed) -> None:
    counting.move("host1", NAME, "host2", "--keep-source")
    assert counting.status("host1", NAME) is None
    kept = count(counting, "host1")
    at = numbers(kept)
    time.sleep(0.2)
    assert numbers(kept) == at, "it still runs on the source"
    assert numbers(count(counting, "host2"))[: len(at)] == at


def test_the_journal_tells_the_move(counting: Bed) -> None:
    report = counting.move("host1", NAME, "host2")
    directory = counting.path("host1", f"/var/lib/ferry/migrations/{report['migration_id']}")
    from migrate.journal import read

    found, damaged = read(directory / "journal")
    entries = [(e["phase"], e["mark"]) for e in found]
    assert damaged == 0
    phases = ["prepare", "precopy", "freeze", "ship", "restore"]
    expected = [("plan", "made"), *[(p, m) for p in phases for m in ("intent", "result")]]
    expected += [("commit", m) for m in ("intent", "decided", "released", "result")]
    expected += [("finish", "intent"), ("finish", "result"), ("move", "ended")]
    assert entries == expected
    assert json.loads((directory / "report.json").read_text())["outcome"] == "COMPLETED"


def test_a_report_says_where_the_downtime_went(counting: Bed) -> None:
    report = counting.move("host1", NAME, "host2")
    story = tell(report)
    assert [b.name for b in story.phases] == list(report["phases_ms"])
    # What the hosts tell of their parts lies inside the downtime, and leaves little of it unexplained.
    assert {"freeze", "dump; the memory goes", "prepare the restore", "restore", "release, on disk; it runs"} <= {
        b.name for b in story.downtime
    }
    assert story.between_ms < report["downtime_ms"]
    kept = json.loads(counting.ok("host1", "migrate", "report", "--json", report["migration_id"]))
    assert counting.ok("host1", "migrate", "report", report["migration_id"]).splitlines() == lines(tell(kept))
    assert kept["timeline"] == report["timeline"]
    page = counting.path("host1", "/var/lib/page.html")
    counting.ok("host1", "migrate", "report", "--html", "/var/lib/page.html", report["migration_id"])
    assert page.read_text().count("<svg") == 2
    done = counting.run("host2", "migrate", "report", report["migration_id"])
    assert done.returncode == 1 and "its source has it" in done.stderr
    page.unlink()


@pytest.mark.timeout(1200)
def test_fifty_moves_leave_everything_as_it_was(counting: Bed) -> None:
    """Fewer on a machine that is short of time ($FERRY_SHARE); an even number, so that it ends where it began."""
    bed = counting
    moves = 50 // int(os.environ.get("FERRY_SHARE") or 1) // 2 * 2
    bed.move("host1", NAME, "host2")
    bed.move("host2", NAME, "host1")
    before = {h: bed.inventory(h) for h in ("host1", "host2")}
    downtimes = []
    for i in range(moves):
        here, there = ("host1", "host2") if i % 2 == 0 else ("host2", "host1")
        report = bed.move(here, NAME, there)
        downtimes.append(report["downtime_ms"])
        runs_on(bed, there)
    after = {h: bed.inventory(h) for h in ("host1", "host2")}
    for host in ("host1", "host2"):
        for kind in ("MOUNTS", "CGROUPS", "RULES", "NETNS", "FILES"):
            assert after[host][kind] == before[host][kind], (host, kind)
        commands = [[" ".join(p.split()[1:]) for p in inv[host]["PROCESSES"] if "sleep 0." not in p] for inv in (before, after)]
        assert commands[0] == commands[1]
    print(f"downtime of {moves} moves: median {median(downtimes):.0f} ms, largest {max(downtimes):.0f} ms")


def test_it_is_shown_as_it_goes_on(counting: Bed) -> None:
    """To a program line by line, to a person at a terminal as a view that is drawn again and again."""
    done = counting.run("host1", "migrate", "move", "--progress", "json", NAME, "host2")
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stderr.splitlines()]
    ended = [e["phase"] for e in events if e["event"] == "end"]
    assert ended == [str(p) for p in Phase]
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # when nobody has the other end any more
            while data := os.read(ours, 1 << 16):
                drawn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    back = counting.run("host2", "migrate", "move", NAME, "host1", stderr=theirs)
    os.close(theirs)
    reader.join()
    os.close(ours)
    text = b"".join(drawn).decode()
    assert back.returncode == 0, text
    assert "\x1b[" in text and text.count("✓") > len(Phase)
