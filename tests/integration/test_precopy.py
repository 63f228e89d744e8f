"""Pre-dumps and chains of images: the memory that comes back is the one that was, and only changes are written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from runtime.criu import images, pagemap
from tests.helpers.bundle import BundleMaker, assert_gapless, counter, numbers
from tests.helpers.memory import Memory
from tests.helpers.oci import Oci, wait_for

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL


def content_bytes(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.glob("pages-*.img"))


def restore(oci: Oci, bundle: Path, directory: Path, *options: str) -> None:
    oci.ok("restore", "--detach", "--bundle", bundle, "--image-path", directory, *options, "c", stdout=null, stderr=null)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_chain(oci: Oci, bundles: BundleMaker, tmp_path: Path, lazy: bool) -> None:
    mib = 32
    memory = Memory(oci, bundles, mib)
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    assert oci.status("c") == "running"
    memory.ask()
    oci.ok("checkpoint", "--pre-dump", "--parent-path", "../1", "--image-path", tmp_path / "2", "c")
    memory.ask()
    # An absolute path will do as well.
    oci.ok("checkpoint", "--parent-path", tmp_path / "2", "--image-path", tmp_path / "3", "c")
    assert content_bytes(tmp_path / "1") > mib << 20
    for later in ("2", "3"):
        assert content_bytes(tmp_path / later) < mib << 18, "more was written than what changed"
    first, last = images.stats(tmp_path / "1", "dump"), images.stats(tmp_path / "3", "dump")
    assert first["pages_written"] * pagemap.PAGE_BYTES == content_bytes(tmp_path / "1")
    assert last["pages_written"] * pagemap.PAGE_BYTES == content_bytes(tmp_path / "3")
    assert last["pages_skipped_parent"] > mib * 200
    restore(oci, memory.bundle, tmp_path / "3", *(["--lazy-pages"] if lazy else []))
    memory.ask()


def test_it_may_be_iterated_further_after_a_restore(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 8)
    oci.ok("checkpoint", "--image-path", tmp_path / "1", "c")
    restore(oci, memory.bundle, tmp_path / "1")
    memory.ask()
    oci.ok("checkpoint", "--parent-path", "../1", "--leave-running", "--image-path", tmp_path / "2", "c")
    memory.ask()
    oci.ok("checkpoint", "--parent-path", "../2", "--image-path", tmp_path / "3", "c")
    assert content_bytes(tmp_path / "3") < 4 << 20
    restore(oci, memory.bundle, tmp_path / "3")
    memory.ask()


def test_shared_memory_and_children(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    program = (
        "import mmap, os, time\n"
        "m = mmap.mmap(-1, 1 << 20); m[:] = os.urandom(1 << 20)\n"
        "if os.fork() == 0:\n  while True: m[0] = 7; time.sleep(0.01)\n"
        "i = 0\nwhile True:\n  i += 1; open('/count', 'a').write('%d\\n' % i); time.sleep(0.01)\n"
    )
    from tests.helpers.memory import system

    bundle = bundles("/usr/bin/python3", "-c", program, change=system)
    oci.detached(bundle, "c")
    count = bundle / "rootfs/count"
    wait_for(lambda: len(numbers(count)) > 3, "counting")
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    shared = list((tmp_path / "1").glob("pagemap-shmem-*.img"))
    assert len(shared) == 1 and len(list((tmp_path / "1").glob("pagemap-[0-9]*.img"))) == 2
    oci.ok("checkpoint", "--parent-path", "../1", "--image-path", tmp_path / "2", "c")
    assert content_bytes(tmp_path / "2") < 1 << 20, "the shared memory was written again"
    restore(oci, bundle, tmp_path / "2")
    at = len(numbers(count))
    wait_for(lambda: len(numbers(count)) > at + 3, "counting")
    assert_gapless(numbers(count))
    assert len(json.loads(oci.ok("ps", "--format", "json", "c"))) == 2


def test_a_chain_without_its_parent(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    oci.ok("checkpoint", "--parent-path", "../1", "--image-path", tmp_path / "2", "c")
    (tmp_path / "1").rename(tmp_path / "elsewhere")
    for lazy in ([], ["--lazy-pages"]):
        done = oci.run("restore", "--detach", "--bundle", memory.bundle, "--image-path", tmp_path / "2", *lazy, "c")
        assert done.returncode == 1 and str(tmp_path / "2/parent") in done.stderr, done.stderr
        assert "does not exist" in oci.run("state", "c").stderr
    (tmp_path / "elsewhere").rename(tmp_path / "1")
    restore(oci, memory.bundle, tmp_path / "2")
    memory.ask()


def test_a_parent_that_is_cut_short(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 4)
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    shutil.copytree(tmp_path / "1", tmp_path / "short")
    pages = next((tmp_path / "short").glob("pages-*.img"))
    with pages.open("r+b") as f:
        f.truncate(1 << 20)
    done = oci.run("checkpoint", "--pre-dump", "--parent-path", "../short", "--image-path", tmp_path / "2", "c")
    assert done.returncode == 1 and f"{pages} is cut short" in done.stderr
    assert oci.status("c") == "running"
    memory.ask()


def test_a_parent_that_is_none(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    done = oci.run("checkpoint", "--parent-path", "../none", "--image-path", tmp_path / "2", "c")
    assert done.returncode == 1 and "no dump or pre-dump in" in done.stderr and "none" in done.stderr
    assert oci.status("c") == "running"


def test_directories_that_are_used_in_turns(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """The third dump must not go where the first is, on which it builds."""
    memory = Memory(oci, bundles, 4)
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "a", "c")
    oci.ok("checkpoint", "--pre-dump", "--parent-path", "../a", "--image-path", tmp_path / "b", "c")
    before = content_bytes(tmp_path / "a")
    done = oci.run("checkpoint", "--parent-path", "../b", "--image-path", tmp_path / "a", "c")
    assert done.returncode == 1 and "is one of the dumps that this one builds upon" in done.stderr
    assert content_bytes(tmp_path / "a") == before
    assert oci.status("c") == "running"
    memory.ask()


def test_a_refused_checkpoint_leaves_what_was_there(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    oci.ok("checkpoint", "--leave-running", "--image-path", tmp_path / "images", "c")
    before = sorted(p.name for p in (tmp_path / "images").iterdir())
    oci.ok("exec", "--detach", "c", "sleep", "100", stdout=null, stderr=null)
    assert "[exec-session]" in oci.run("checkpoint", "--image-path", tmp_path / "images", "c").stderr
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == before


def test_a_pre_dump_is_no_checkpoint(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    bundle = bundles(*counter())
    oci.detached(bundle, "c")
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    done = oci.run("restore", "--detach", "--bundle", bundle, "--image-path", tmp_path / "1", "again")
    assert done.returncode == 1 and "no checkpoint in" in done.stderr
