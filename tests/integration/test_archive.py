"""Archives: a checkpoint with its files in one file, ours and podman's; what was changed in one is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from tests.helpers.bundle import BundleMaker, assert_gapless, counter, numbers
from tests.helpers.memory import Memory
from tests.helpers.oci import OURS, Oci, counts_on, wait_for
from tests.integration.test_podman import COUNT, IMAGE, Podman, _podman, podman

pytestmark = pytest.mark.ferry
null = subprocess.DEVNULL
__all__ = ["_podman", "podman"]


@pytest.fixture
def archive(oci: Oci, counting: Path, tmp_path: Path) -> Path:
    oci.ok("checkpoint", "--export", tmp_path / "c.tar", "--compress", "none", "c")
    return tmp_path / "c.tar"


def restore(oci: Oci, file: Path, name: str, *options: str | Path) -> None:
    oci.ok("restore", "--detach", "--import", file, *options, name, stdout=null, stderr=null, cwd=file.parent)


def refused(oci: Oci, file: Path, *options: str | Path) -> str:
    """See that an archive is refused and that nothing of it is left; return the words."""
    before = set(Path("/tmp").glob("ferry-im*")) | set(file.parent.iterdir())
    done = oci.run("restore", "--detach", "--import", file, *options, "new", cwd=file.parent)
    assert done.returncode == 1, "it was not refused"
    assert set(Path("/tmp").glob("ferry-im*")) | set(file.parent.iterdir()) == before
    assert "does not exist" in oci.run("state", "new").stderr
    return done.stderr


def rewritten(
    file: Path,
    change: Callable[[tarfile.TarInfo, bytes], tuple[tarfile.TarInfo, bytes] | None],
    *more: tuple[tarfile.TarInfo, bytes],
) -> Path:
    """Return a copy of an archive in which each member was changed, or left out."""
    target = file.with_name("changed.tar")
    with tarfile.open(file) as old, tarfile.open(target, "w") as new:
        for entry in old:
            stream = old.extractfile(entry)
            changed = change(entry, stream.read() if stream else b"")
            if changed:
                changed[0].size = len(changed[1])
                new.addfile(changed[0], io.BytesIO(changed[1]))
        for entry, data in more:
            entry.size = len(data)
            new.addfile(entry, io.BytesIO(data))
    return target


def kept(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return entry, data


def test_it_goes_on_elsewhere(oci: Oci, counting: Path, tmp_path: Path) -> None:
    oci.ok("checkpoint", "--export", tmp_path / "c.tar.zst", "c")
    assert "does not exist" in oci.run("state", "c").stderr
    assert stat.S_IMODE((tmp_path / "c.tar.zst").stat().st_mode) == 0o600
    shutil.rmtree(counting)
    restore(oci, tmp_path / "c.tar.zst", "elsewhere")
    counts_on(tmp_path / "elsewhere/rootfs/count")
    assert not list(Path("/tmp").glob("ferry-im*")), "the images are still there"
    oci.ok("delete", "--force", "elsewhere")
    # And once more, under another name and path.
    restore(oci, tmp_path / "c.tar.zst", "again", "--bundle", tmp_path / "other/place")
    counts_on(tmp_path / "other/place/rootfs/count")


def test_files_keep_everything(oci: Oci, counting: Path, tmp_path: Path) -> None:
    root = counting / "rootfs"
    (root / "su").write_text("x")
    os.chown(root / "su", 7, 8)
    (root / "su").chmod(0o4755)
    os.utime(root / "su", ns=(1_700_000_000_123_456_789, 1_700_000_000_123_456_789))
    os.setxattr(root / "su", "user.a", b"b\xff")
    os.link(root / "su", root / "same")
    (root / "to").symlink_to("/etc/passwd")
    os.mkfifo(root / "fifo")
    os.mknod(root / "null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (root / ".wh.su").write_text("no whiteout")
    with (root / "holes").open("wb") as f:
        f.seek(50 << 20)
        f.write(b"end")
    oci.ok("checkpoint", "--export", tmp_path / "c.tar.zst", "c")
    assert (tmp_path / "c.tar.zst").stat().st_size < 10 << 20
    restore(oci, tmp_path / "c.tar.zst", "new")
    new = tmp_path / "new/rootfs"
    for name in ("su", "same", "to", "fifo", "null", "holes", ".wh.su"):
        a, b = os.lstat(root / name), os.lstat(new / name)
        assert (a.st_mode, a.st_uid, a.st_gid, a.st_mtime_ns, a.st_rdev, a.st_nlink) == (
            b.st_mode, b.st_uid, b.st_gid, b.st_mtime_ns, b.st_rdev, b.st_nlink), name  # fmt: skip
    assert os.getxattr(new / "su", "user.a") == b"b\xff"
    assert (new / "holes").stat().st_blocks < 1000 and (new / "holes").read_bytes().endswith(b"\0end")


@pytest.mark.parametrize("compression", ["zstd", "gzip", "none"])
def test_it_runs_on(oci: Oci, counting: Path, tmp_path: Path, compression: str) -> None:
    file = tmp_path / "c.tar"
    oci.ok("checkpoint", "--leave-running", "--export", file, "--compress", compression, "c")
    magic = {"zstd": b"\x28\xb5\x2f\xfd", "gzip": b"\x1f\x8b", "none": b"spec.dump"}[compression]
    assert file.read_bytes().startswith(magic)
    counts_on(counting / "rootfs/count")
    oci.ok("delete", "--force", "c")
    at = len(numbers(counting / "rootfs/count"))
    restore(oci, file, "new")
    counts_on(tmp_path / "new/rootfs/count")
    assert len(numbers(counting / "rootfs/count")) == at


def test_lazily(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    memory = Memory(oci, bundles, 16)
    oci.ok("checkpoint", "--pre-dump", "--image-path", tmp_path / "1", "c")
    memory.ask()
    oci.ok("checkpoint", "--parent-path", tmp_path / "1", "--export", tmp_path / "c.tar.zst", "c")
    shutil.rmtree(tmp_path / "1")
    restore(oci, tmp_path / "c.tar.zst", "new", "--lazy-pages", "--bundle", memory.bundle)
    memory.ask()
    wait_for(lambda: not list(Path("/tmp").glob("ferry-im*")), "the drain, and the wiping")


def test_a_bundle_of_overlay_layers(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    """With a base image only what was changed goes into the archive."""
    base = bundles(*counter()) / "rootfs"
    (base / "gone").write_text("x")
    (base / "etc/deep").mkdir()
    (base / "etc/deep/old").write_text("x")
    (base / "ballast").write_bytes(os.urandom(1 << 20))
    subprocess.run(["tar", "-C", base, "-cf", tmp_path / "layer.tar", "."], check=True)
    _save_image(tmp_path / "layer.tar", tmp_path / "image.tar")
    bundle = tmp_path / "overlay"
    oci.ok("bundle", "create", "--from", tmp_path / "image.tar", "--layers", tmp_path / "layers", bundle)
    config = json.loads((bundle / "config.json").read_text())
    config["process"].update(args=list(counter()), terminal=False)
    config["root"]["readonly"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    oci.detached(bundle, "c")
    oci.ok("exec", "c", "sh", "-c", "rm /gone; rm -r /etc/deep; mkdir /etc/deep; echo new >/etc/deep/new; echo y >/fresh")
    wait_for(lambda: len(numbers(bundle / "rootfs/count")) > 3, "counting")
    oci.ok("checkpoint", "--base-image", "localhost/base", "--export", tmp_path / "c.tar", "--compress", "none", "c")
    with tarfile.open(tmp_path / "c.tar") as tar:
        diff = tar.extractfile("rootfs-diff.tar")
        deleted = tar.extractfile("deleted.files")
        assert diff and deleted
        names = tarfile.open(fileobj=io.BytesIO(diff.read())).getnames()
        assert {"count", "fresh", "etc/deep/new"} <= set(names) and "ballast" not in names
        assert sorted(json.loads(deleted.read())) == ["etc/deep/old", "gone"]
    restore(oci, tmp_path / "c.tar", "new", "--from", tmp_path / "image.tar")
    new = tmp_path / "new/rootfs"
    counts_on(new / "count")
    assert (new / "etc/deep/new").read_text() == "new\n" and (new / "ballast").stat().st_size == 1 << 20
    assert not (new / "gone").exists() and not (new / "etc/deep/old").exists()
    oci.ok("bundle", "delete", bundle)


def _save_image(layer: Path, target: Path) -> None:
    import hashlib

    config = json.dumps({"rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(layer.read_bytes()).hexdigest()}"]}})
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["base:1"], "Layers": ["layer.tar"]}])
    with tarfile.open(target, "w") as tar:
        tar.add(layer, "layer.tar")
        for name, text in (("config.json", config), ("manifest.json", manifest)):
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))


def test_what_was_changed_is_refused(oci: Oci, archive: Path) -> None:
    def flip(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        return entry, (data[:-1] + bytes([data[-1] ^ 1]) if entry.name == "checkpoint/pages-1.img" else data)

    assert "checkpoint/pages-1.img in the archive is damaged" in refused(oci, rewritten(archive, flip))
    gone = rewritten(archive, lambda e, d: None if e.name == "checkpoint/core-1.img" else (e, d))
    assert "the archive lacks checkpoint/core-1.img" in refused(oci, gone)
    more = rewritten(archive, kept, (tarfile.TarInfo("checkpoint/more.img"), b"x"))
    assert "the archive has checkpoint/more.img, of which its digests know nothing" in refused(oci, more)
    twice = rewritten(archive, kept, (tarfile.TarInfo("spec.dump"), b"{}"))
    assert "has spec.dump twice" in refused(oci, twice)


def test_what_is_no_archive_is_refused(oci: Oci, archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    (tmp_path / "short.tar").write_bytes(whole[: len(whole) // 2])
    assert "cut short" in refused(oci, tmp_path / "short.tar")
    packed = zstandard.compress(whole)
    (tmp_path / "short.zst").write_bytes(packed[: len(packed) // 2])
    assert "short.zst: " in refused(oci, tmp_path / "short.zst")
    (tmp_path / "bent.zst").write_bytes(packed[:2000] + b"\0" * 50 + packed[2050:])
    assert "bent.zst: " in refused(oci, tmp_path / "bent.zst")
    (tmp_path / "other").write_bytes(b"no archive")
    assert "is no archive" in refused(oci, tmp_path / "other")
    assert "no such file" in refused(oci, tmp_path / "none")
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    assert "has no spec.dump" in refused(oci, tmp_path / "empty.tar")


def test_an_image_directory_that_is_in_use(oci: Oci, archive: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    assert "is not empty" in refused(oci, archive, "--image-path", tmp_path / "mine")
    assert (tmp_path / "mine/file").read_text() == "mine"
    restore(oci, archive, "new", "--image-path", tmp_path / "images")
    counts_on(tmp_path / "new/rootfs/count")
    assert (tmp_path / "images/inventory.img").exists(), "images that were asked for by name stay"


def test_nothing_changes_under_a_container(oci: Oci, counting: Path, tmp_path: Path) -> None:
    """Neither its own files, when it is there, nor those of a bundle that another one has."""
    oci.ok("checkpoint", "--leave-running", "--export", tmp_path / "c.tar", "c")
    (counting / "rootfs/mine").write_text("new")
    done = oci.run("restore", "--detach", "--import", tmp_path / "c.tar", "--bundle", counting, "c")
    assert done.returncode == 1 and "container with id exists" in done.stderr
    done = oci.run("restore", "--detach", "--import", tmp_path / "c.tar", "--bundle", counting, "d")
    assert done.returncode == 1 and "is container c's" in done.stderr
    assert (counting / "rootfs/mine").read_text() == "new"
    counts_on(counting / "rootfs/count")


def test_a_pid_file_that_cannot_be_written(oci: Oci, archive: Path, tmp_path: Path) -> None:
    assert "/no/dir" in refused(oci, archive, "--pid-file", "/no/dir/pid")
    assert not (tmp_path / "new").exists()


def test_names_never_leave_their_place(oci: Oci, archive: Path, tmp_path: Path) -> None:
    """Without digests, as podman's; what it holds beside the known names goes nowhere."""
    link = tarfile.TarInfo("checkpoint/link.img")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    names = [
        "checkpoint/../../../escaped",
        "../escaped",
        "/tmp/escaped-from-archive",
        "checkpoint/a/b",
        "volumes/../x.tar",
        "unknown",
    ]
    hostile = rewritten(
        archive,
        lambda e, d: None if e.name.startswith("ferry.") else (e, d),
        (link, b""),
        *((tarfile.TarInfo(n), b"x") for n in names),
    )
    restore(oci, hostile, "new")
    counts_on(tmp_path / "new/rootfs/count")
    assert not Path("/tmp/escaped-from-archive").exists()
    assert not [p for p in (*tmp_path.iterdir(), *Path("/tmp").iterdir()) if p.name == "escaped"]


def test_signatures(oci: Oci, counting: Path, tmp_path: Path) -> None:
    for name in ("key", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    file = tmp_path / "c.tar"
    oci.ok("checkpoint", "--leave-running", "--export", tmp_path / "plain.tar", "c")
    oci.ok("checkpoint", "--export", file, "--compress", "none", "--sign-key", tmp_path / "key", "c")
    assert "is not signed" in refused(oci, tmp_path / "plain.tar", "--verify-key", tmp_path / "key.pub")
    assert "by a key that" in refused(oci, file, "--verify-key", tmp_path / "other.pub")

    def forge(entry: tarfile.TarInfo, data: bytes) -> tuple[tarfile.TarInfo, bytes]:
        return entry, (data.replace(b"sha256:0", b"sha256:1") if entry.name == "ferry.digests" else data)

    assert "somebody changed it" in refused(oci, rewritten(file, forge), "--verify-key", tmp_path / "key.pub")
    restore(oci, file, "new", "--verify-key", tmp_path / "key.pub")
    counts_on(tmp_path / "new/rootfs/count")


def test_a_key_that_is_none(oci: Oci, counting: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("nonsense")
    done = oci.run("checkpoint", "--export", tmp_path / "c.tar", "--sign-key", tmp_path / "key", "c")
    assert done.returncode == 1 and "is no private key" in done.stderr
    assert oci.status("c") == "running"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle1", "key", "state"]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.parametrize("images", [False, True])
def test_a_full_disk(oci: Oci, counting: Path, tmp_path: Path, small: Path, images: bool) -> None:
    """The rootfs is larger than what is free, with and without the images at another place: the container runs on."""
    options = ("--image-path", tmp_path / "images") if images else ()
    done = oci.run("checkpoint", "--export", small / "c.tar", *options, "c")
    assert done.returncode == 1 and "o space left" in done.stderr, done.stderr
    assert oci.status("c") == "running"
    counts_on(counting / "rootfs/count")
    assert list(small.iterdir()) == []


RUNTIMES = {"ours": OURS, "runc": shutil.which("runc") or "runc"}


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_podmans_restores_here(podman: Podman, oci: Oci, tmp_path: Path, runtime: str) -> None:
    engine = podman.by(RUNTIMES[runtime])
    engine.ok("run", "-d", "--name", "c", IMAGE, "sh", "-c", f"echo shared >/dev/shm/kept; rm /etc/group; {COUNT}")
    wait_for(lambda: engine.run("exec", "c", "test", "-s", "/data/count").returncode == 0, "a count")
    engine.ok("container", "checkpoint", "--export", tmp_path / "c.tar.zst", "c")
    engine.ok("rm", "-f", "c")
    engine.ok("save", "--format", "oci-archive", "--output", tmp_path / "image.tar", IMAGE)
    restore(oci, tmp_path / "c.tar.zst", "new", "--from", tmp_path / "image.tar")
    counts_on(tmp_path / "new/rootfs/data/count")
    assert oci.ok("exec", "new", "sh", "-c", "cat /dev/shm/kept; ls /etc") == "shared\nhostname\nhosts\npasswd\n"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_ours_restores_in_podman(oci: Oci, counting: Path, podman: Podman, tmp_path: Path, runtime: str) -> None:
    engine = podman.by(RUNTIMES[runtime])
    options = ("--base-image", f"{IMAGE}:latest", "--engine-runtime", RUNTIMES[runtime])
    oci.ok("checkpoint", *options, "--export", tmp_path / "c.tar.zst", "c")
    engine.ok("container", "restore", "--import", tmp_path / "c.tar.zst", "--name", "moved")
    before = engine.ok("exec", "moved", "cat", "/count").split()
    wait_for(lambda: len(engine.ok("exec", "moved", "cat", "/count").split()) > len(before), "the count going on")
    assert_gapless([int(n) for n in engine.ok("exec", "moved", "cat", "/count").split()])
