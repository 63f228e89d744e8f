"""What takes two hosts in earnest: kernels that track memory, cgroup v2, images and containers that change kernels, a reboot.

The guests are emulated, many times slower than a machine: ratios are compared here, never times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from runtime.criu.pagemap import PAGE_BYTES
from tests.helpers import memory
from tests.helpers.bundle import BundleMaker, assert_gapless, counter
from tests.helpers.vms import NODES, Vms

pytestmark = [pytest.mark.ferry, pytest.mark.timeout(1800)]
BUNDLES = "/var/lib/ferry/bundles"
IMAGES = "/var/lib/images"
MIB, DIRTY_MIB = 32, 8
ASKED = 2  # how often the memory was changed until the last dump


def test_two_hosts_with_kernels_that_track_memory(vms: Vms) -> None:
    assert vms.ok("node1", "ssh", "-o", "BatchMode=yes", "node2", "hostname").strip() == "node2"
    assert vms.ok("node2", "ssh", "-o", "BatchMode=yes", "node1", "hostname").strip() == "node1"
    for node in NODES:
        assert vms.ok(node, "stat", "-fc", "%T", "/sys/fs/cgroup").strip() == "cgroup2fs"
        assert "mem_dirty_track is supported" in vms.shell(node, "criu check --feature mem_dirty_track 2>&1")
        annotations = json.loads(vms.ok(node, "runtime", "features"))["annotations"]
        assert "org.criu.error" not in annotations, annotations


def ask(vms: Vms, node: str, asked: int) -> None:
    """Have the program change its memory, and see that all of it is right."""
    rootfs = f"{BUNDLES}/memory/rootfs"
    vms.ok(node, "touch", f"{rootfs}/ask")
    deadline = time.monotonic() + 60
    while (answer := vms.ok(node, "cat", f"{rootfs}/answer")).split()[:1] != [str(asked)]:
        assert time.monotonic() < deadline, f"no answer to question {asked}: {answer}"
        time.sleep(0.2)
    assert answer == memory.expected(MIB, asked, DIRTY_MIB)


@pytest.fixture(scope="module")
def chain(vms: Vms, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vms]:
    """On node1 two pre-dumps and a dump of a program that changed a quarter of its memory before the second and the last."""
    directory = tmp_path_factory.mktemp("bundles")
    vms.put(memory.make(BundleMaker(directory), MIB, DIRTY_MIB), "node1", f"{BUNDLES}/memory")
    vms.detached("node1", "run", "--detach", "--bundle", f"{BUNDLES}/memory", "c")
    vms.shell("node1", f"for i in $(seq 300); do test -e {BUNDLES}/memory/rootfs/answer && break; sleep 0.1; done")
    vms.ok("node1", "runtime", "checkpoint", "--pre-dump", "--image-path", f"{IMAGES}/1", "c")
    ask(vms, "node1", 1)
    vms.ok("node1", "runtime", "checkpoint", "--pre-dump", "--parent-path", "../1", "--image-path", f"{IMAGES}/2", "c")
    ask(vms, "node1", 2)
    vms.ok("node1", "runtime", "checkpoint", "--parent-path", "../2", "--image-path", f"{IMAGES}/3", "c")
    assert vms.containers("node1") == {}
    yield vms
    vms.clean()


def test_only_what_changed_is_written(chain: Vms) -> None:
    script = (
        "import json, pathlib; from runtime.criu import images; p = [pathlib.Path(f'" + IMAGES + "/{i}') for i in (1, 2, 3)]\n"
        "print(json.dumps([[sum(f.stat().st_size for f in d.glob('pages-*.img')), images.stats(d, 'dump'), images.tracked(d)] for d in p]))"
    )
    found = json.loads(chain.ok("node1", "python3", "-c", script))
    for size, stats, tracked in found:
        assert tracked, "the kernel was not asked what had changed"
        assert stats["pages_written"] * PAGE_BYTES == size
    (first, _, _), *later = found
    assert first > MIB << 20
    for size, stats, _ in later:
        # A huge page is dirty as a whole, and the interpreter's own memory changes, too.
        assert DIRTY_MIB << 20 <= size < first * 0.45
        assert stats["pages_skipped_parent"] * PAGE_BYTES > first * 0.55


def restore_and_ask(vms: Vms, node: str, *options: str) -> None:
    vms.detached(node, "restore", "--detach", *options, "--bundle", f"{BUNDLES}/memory", "--image-path", f"{IMAGES}/3", "c")
    ask(vms, node, ASKED + 1)
    assert vms.containers(node) == {"c": "running"}
    vms.ok(node, "runtime", "delete", "--force", "c")


def test_restored_on_the_kernel_that_dumped_it(chain: Vms) -> None:
    restore_and_ask(chain, "node1")


def test_restored_by_another_kernel_which_then_reboots(chain: Vms) -> None:
    """The images are carried by hand, and serve a second time after the plug was pulled."""
    chain.shell("node1", f"tar -c -C / {BUNDLES[1:]} {IMAGES[1:]} | ssh -o BatchMode=yes node2 tar -x -C /")
    restore_and_ask(chain, "node2")
    boot = chain.shell("node2", "sync; cat /proc/sys/kernel/random/boot_id")
    chain.reset("node2")
    assert chain.ok("node2", "cat", "/proc/sys/kernel/random/boot_id") != boot
    restore_and_ask(chain, "node2", "--lazy-pages")


def numbers(vms: Vms, node: str) -> list[int]:
    text = vms.ok(node, "cat", f"{BUNDLES}/counter/rootfs/count")
    return [int(line) for line in text[: text.rfind("\n") + 1].split()]


def runs_on(vms: Vms, node: str, other: str) -> None:
    """Exactly one copy runs, there, and its numbers have neither gap nor repetition."""
    assert vms.containers(node) == {"counter": "running"}
    assert vms.containers(other) == {}
    assert vms.run(other, "test", "-e", f"{BUNDLES}/counter").returncode == 1
    at = len(numbers(vms, node))
    deadline = time.monotonic() + 30
    while len(found := numbers(vms, node)) < at + 3:
        assert time.monotonic() < deadline, f"it does not count on {node}"
    assert_gapless(found)


def test_a_move_there_and_back(vms: Vms, tmp_path: Path) -> None:
    vms.clean()
    vms.put(BundleMaker(tmp_path)(*counter(sleep_s=0.1)), "node1", f"{BUNDLES}/counter")
    vms.detached("node1", "run", "--detach", "--bundle", f"{BUNDLES}/counter", "counter")
    findings = json.loads(vms.ok("node1", "migrate", "check", "--json", "counter", "node2"))["findings"]
    assert {f["severity"] for f in findings} == {"ok"}, findings
    for here, there in (("node1", "node2"), ("node2", "node1")):
        report = json.loads(vms.ok(here, "migrate", "move", "--json", "counter", there))
        assert (report["outcome"], report["source"], report["target"]) == ("COMPLETED", here, there)
        runs_on(vms, there, here)
    vms.clean()


def test_a_decided_move_goes_on_when_its_source_boots_again(vms: Vms, tmp_path: Path) -> None:
    """The plug is pulled right after the decision: the unit that runs at boot finds it on disk, and has the target released."""
    vms.clean()
    vms.put(BundleMaker(tmp_path)(*counter(sleep_s=0.1)), "node1", f"{BUNDLES}/counter")
    vms.detached("node1", "run", "--detach", "--bundle", f"{BUNDLES}/counter", "counter")
    stopping = "FERRY_FAULT=commit.decided:after setsid migrate move counter node2 </dev/null >/dev/null 2>&1 &"
    vms.shell("node1", stopping)
    vms.shell("node1", "for i in $(seq 600); do ps -C migrate -o stat= | grep -q ^T && exit; sleep 0.2; done; exit 1")
    assert vms.containers("node2") == {"counter": "paused"}, "prepared, and not released"
    vms.reset("node1")
    deadline = time.monotonic() + 600
    while vms.containers("node2") != {"counter": "running"} or vms.containers("node1") or "counter" in _moves(vms, "node1"):
        assert time.monotonic() < deadline, vms.run("node1", "journalctl", "--no-pager", "-u", "ferry-recover").stdout
        time.sleep(1)
    runs_on(vms, "node2", "node1")
    assert "counter" not in _moves(vms, "node2")
    vms.clean()


def _moves(vms: Vms, node: str) -> str:
    return vms.ok(node, "migrate", "status")
