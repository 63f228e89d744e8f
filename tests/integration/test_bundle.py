"""`runtime bundle create` from every kind of source, and from hostile ones."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from tests.helpers.bundle import BundleMaker, make_rootfs
from tests.helpers.oci import OURS, SLOW_S, Oci

pytestmark = pytest.mark.ferry


def bundle(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([OURS, "bundle", *map(str, args)], capture_output=True, text=True, timeout=SLOW_S, check=False)


def made(*args: str | Path) -> None:
    done = bundle("create", *args)
    assert done.returncode == 0, done.stderr


Entry = tuple[str, dict[str, Any], bytes]


def entry(name: str, data: bytes = b"", **members: Any) -> Entry:
    return name, members, data


def directory(name: str, **members: Any) -> Entry:
    return entry(name, type=tarfile.DIRTYPE, **{"mode": 0o755, **members})


def layer(*entries: Entry) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, members, data in entries:
            info = tarfile.TarInfo(name)
            info.mode, info.mtime, info.size = 0o644, 1_600_000_000, len(data)
            for key, value in members.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def rootfs_layer(tmp_path: Path) -> bytes:
    make_rootfs(tmp_path / "plain")
    return subprocess.run(["tar", "-C", tmp_path / "plain", "-c", "."], capture_output=True, check=True).stdout


CONFIG = {
    "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[os.uname().machine],
    "os": "linux",
    "config": {
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["id -u; id -g; echo $GREETING; pwd"],
        "Env": ["GREETING=hello", "PATH=/bin"],
        "User": "alice",
        "WorkingDir": "/tmp",
        "Labels": {"some.label": "value"},
        "StopSignal": "SIGINT",
    },
}


class Layout:
    """Writes an OCI image layout."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs/sha256").mkdir(parents=True)
        (path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def blob(self, data: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        (self.path / "blobs/sha256" / digest).write_bytes(data)
        return {"digest": f"sha256:{digest}", "size": len(data)}

    def image(self, *layers: bytes, compress: Callable[[bytes], bytes] = gzip.compress, **config: Any) -> dict[str, Any]:
        diff_ids = [f"sha256:{hashlib.sha256(data).hexdigest()}" for data in layers]
        document = {**CONFIG, **config, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": self.blob(json.dumps(document).encode()),
            "layers": [self.blob(compress(data)) for data in layers],
        }
        return self.blob(json.dumps(manifest).encode())

    def index(self, *descriptors: dict[str, Any]) -> Path:
        (self.path / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": descriptors}))
        return self.path


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return Layout(tmp_path / "layout")


def runs_as_its_image_says(oci: Oci, path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    assert config["annotations"]["some.label"] == "value"
    assert config["annotations"]["org.opencontainers.image.stopSignal"] == "SIGINT"
    config["process"]["terminal"] = False
    (path / "config.json").write_text(json.dumps(config))
    assert oci.inside(path).split() == ["1000", "1000", "hello", "/tmp"]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bytes], ids=["gzip", "zstd", "plain"])
def test_oci_layout(oci: Oci, layout: Layout, tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    source = layout.index(layout.image(rootfs_layer(tmp_path), compress=compress))
    made(tmp_path / "b", "--from", source)
    runs_as_its_image_says(oci, tmp_path / "b")


def test_oci_archive(oci: Oci, layout: Layout, tmp_path: Path) -> None:
    layout.index(layout.image(rootfs_layer(tmp_path)))
    subprocess.run(["tar", "-C", layout.path, "-cf", tmp_path / "image.tar", "."], check=True)
    made(tmp_path / "b", "--from", tmp_path / "image.tar")
    runs_as_its_image_says(oci, tmp_path / "b")


def test_docker_save(oci: Oci, tmp_path: Path) -> None:
    data = rootfs_layer(tmp_path)
    config = {**CONFIG, "rootfs": {"diff_ids": [f"sha256:{hashlib.sha256(data).hexdigest()}"]}}
    manifest = [{"Config": "config.json", "Layers": ["abc/layer.tar"], "RepoTags": ["test:latest"]}]
    archive = layer(
        entry("config.json", json.dumps(config).encode()),
        entry("abc/layer.tar", data),
        entry("manifest.json", json.dumps(manifest).encode()),
    )
    (tmp_path / "saved.tar").write_bytes(archive)
    made(tmp_path / "b", "--from", tmp_path / "saved.tar", "--ref", "test:latest")
    runs_as_its_image_says(oci, tmp_path / "b")
    assert "0 images" in bundle("create", tmp_path / "c", "--from", tmp_path / "saved.tar", "--ref", "other").stderr


@pytest.mark.parametrize("name", ["rootfs.tar", "rootfs.tar.gz", "rootfs.tar.xz"])
def test_rootfs_tarball_and_directory(oci: Oci, tmp_path: Path, name: str) -> None:
    make_rootfs(tmp_path / "plain")
    subprocess.run(["tar", "-C", tmp_path / "plain", "-caf", tmp_path / name, "."], check=True)
    for path, source in (("t", name), ("d", "plain")):
        made(tmp_path / path, "--from", tmp_path / source)
        config = json.loads((tmp_path / path / "config.json").read_text())
        config["process"].update(terminal=False, args=["echo", "runs"])
        (tmp_path / path / "config.json").write_text(json.dumps(config))
        assert oci.inside(tmp_path / path) == "runs\n"


def test_the_platform_is_chosen(layout: Layout, tmp_path: Path) -> None:
    ours, other = layout.image(layer(entry("ours"))), layout.image(layer(entry("other")))
    source = layout.index(
        {**other, "platform": {"os": "linux", "architecture": "s390x"}},
        {**ours, "platform": {"os": "linux", "architecture": CONFIG["architecture"]}},
    )
    alone = {"User": ""}
    for descriptor in (ours, other):
        assert descriptor["digest"]
    done = bundle("create", tmp_path / "b", "--from", source, "--platform", "linux/riscv64")
    assert done.returncode == 1 and "linux/s390x" in done.stderr and not (tmp_path / "b").exists()
    no_user = layout.image(layer(entry("ours")), config=alone)
    layout.index(
        {**other, "platform": {"os": "linux", "architecture": "s390x"}},
        {**no_user, "platform": {"os": "linux", "architecture": CONFIG["architecture"]}},
    )
    made(tmp_path / "c", "--from", source)
    assert (tmp_path / "c/rootfs/ours").exists()


LOWER = (
    directory("kept"),
    entry("kept/file", b"lower"),
    directory("opaque"),
    entry("opaque/gone"),
    directory("opaque/sub"),
    entry("opaque/sub/gone"),
    entry("removed"),
    entry("replaced", b"file"),
    directory("turned"),
    entry("turned/inside"),
)
UPPER = (
    entry(".wh.removed"),
    directory("opaque"),
    entry("opaque/new", b"new"),
    entry("opaque/.wh..wh..opq"),
    directory("replaced"),
    entry("replaced/now"),
    entry("turned", b"a file now"),
    entry("kept/file", b"upper"),
)
NOBODY = {"config": {"User": ""}}


@pytest.mark.parametrize("shared", [False, True])
def test_whiteouts(layout: Layout, tmp_path: Path, shared: bool) -> None:
    source = layout.index(layout.image(layer(*LOWER), layer(*UPPER), **NOBODY))
    made(tmp_path / "b", "--from", source, *(("--layers", tmp_path / "layers") if shared else ()))
    root = tmp_path / "b/rootfs"
    found = sorted(str(p.relative_to(root)) for p in root.rglob("*"))
    assert found == ["kept", "kept/file", "opaque", "opaque/new", "replaced", "replaced/now", "turned"]
    assert (root / "kept/file").read_text() == "upper" and (root / "turned").read_text() == "a file now"
    assert bundle("delete", tmp_path / "b").returncode == 0
    assert not (tmp_path / "b").exists()


def test_layers_are_shared_and_written_apart(oci: Oci, layout: Layout, tmp_path: Path) -> None:
    source = layout.index(layout.image(rootfs_layer(tmp_path), layer(entry("second"))))
    for name in ("one", "two"):
        made(tmp_path / name, "--from", source, "--layers", tmp_path / "layers")
    assert len(list((tmp_path / "layers").iterdir())) == 2
    (tmp_path / "one/rootfs/mine").write_text("x")
    assert not (tmp_path / "two/rootfs/mine").exists()
    runs_as_its_image_says(oci, tmp_path / "one")
    subprocess.run(["umount", tmp_path / "one/rootfs"], check=True)
    assert bundle("mount", tmp_path / "one").returncode == 0
    assert (tmp_path / "one/rootfs/mine").read_text() == "x"
    for name in ("one", "two"):
        assert bundle("delete", tmp_path / name).returncode == 0
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()


def test_everything_that_a_file_has(layout: Layout, tmp_path: Path) -> None:
    source = layout.index(
        layout.image(
            layer(
                directory("d", mode=0o1777, uid=3, gid=4),
                entry("d/suid", b"x", mode=0o4755, uid=5, gid=6),
                entry("d/link", type=tarfile.LNKTYPE, linkname="d/suid"),
                entry("d/symlink", type=tarfile.SYMTYPE, linkname="/absolute/target", uid=7),
                entry("d/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666),
                entry("d/fifo", type=tarfile.FIFOTYPE, mode=0o600),
                entry("d/xattr", pax_headers={"SCHILY.xattr.user.colour": "blue"}),
            ),
            **NOBODY,
        )
    )
    made(tmp_path / "b", "--from", source)
    d = tmp_path / "b/rootfs/d"
    suid, link = (d / "suid").stat(), (d / "link").stat()
    assert (stat.S_IMODE(suid.st_mode), suid.st_uid, suid.st_gid, suid.st_mtime) == (0o4755, 5, 6, 1_600_000_000)
    assert suid.st_ino == link.st_ino
    assert os.readlink(d / "symlink") == "/absolute/target" and (d / "symlink").lstat().st_uid == 7
    null = (d / "null").stat()
    assert stat.S_ISCHR(null.st_mode) and (os.major(null.st_rdev), os.minor(null.st_rdev)) == (1, 3)
    assert stat.S_ISFIFO((d / "fifo").stat().st_mode)
    assert os.getxattr(d / "xattr", "user.colour") == b"blue"
    assert (stat.S_IMODE(d.stat().st_mode), d.stat().st_uid, d.stat().st_mtime) == (0o1777, 3, 1_600_000_000)


HOSTILE = {
    "climbs": (entry("../../escaped", b"x"),),
    "absolute": (entry("/escaped", b"x"),),
    "by a link": (entry("out", type=tarfile.SYMTYPE, linkname="/"), entry("out/escaped", b"x")),
    "by a relative link": (entry("out", type=tarfile.SYMTYPE, linkname="../../../.."), entry("out/escaped", b"x")),
    "hard link to outside": (entry("hard", type=tarfile.LNKTYPE, linkname="../../../../../../etc/shadow"),),
    "hard link by a link": (
        entry("etc", type=tarfile.SYMTYPE, linkname="/etc"),
        entry("hard", type=tarfile.LNKTYPE, linkname="etc/shadow"),
    ),
    "whiteout of all": (entry(".wh..."),),
    "whiteout by a link": (entry("out", type=tarfile.SYMTYPE, linkname="/etc"), entry("out/.wh.hostname")),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_layers_stay_inside(layout: Layout, tmp_path: Path, attack: str) -> None:
    outside = {p: p.lstat().st_mtime_ns for p in (Path("/etc"), Path("/"), tmp_path.parent)}
    done = bundle("create", tmp_path / "b", "--from", layout.index(layout.image(layer(*HOSTILE[attack]), **NOBODY)))
    assert "Traceback" not in done.stderr
    assert {p: p.lstat().st_mtime_ns for p in outside} == outside
    assert not Path("/escaped").exists() and not (tmp_path / "escaped").exists()
    assert Path("/etc/shadow").stat().st_nlink == 1
    if done.returncode:
        assert not (tmp_path / "b").exists()


def test_a_damaged_layer_is_refused(layout: Layout, tmp_path: Path) -> None:
    source = layout.index(layout.image(layer(entry("f", b"x" * 1000)), compress=bytes, **NOBODY))
    blob = max((layout.path / "blobs/sha256").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(blob.read_bytes())
    data[600] ^= 1
    blob.write_bytes(data)
    done = bundle("create", tmp_path / "b", "--from", source)
    assert done.returncode == 1 and "damaged" in done.stderr and not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda p: p / "none", "no such file"),
        (lambda p: (p / "junk").write_bytes(b"junk" * 500) and p / "junk", "no tar archive"),
        (lambda p: Layout(p / "l").index({"digest": "sha256:../../../etc/passwd"}), "is not sha256:HEX"),
        (lambda p: Layout(p / "l").index({"digest": "sha256:" + "0" * 64}), "No such file"),
        (lambda p: Layout(p / "l").index(), "not there for"),
    ],
)
def test_a_bad_source_is_named(tmp_path: Path, prepare: Callable[[Path], Path], words: str) -> None:
    done = bundle("create", tmp_path / "b", "--from", prepare(tmp_path))
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_is_there_is_kept(bundles: BundleMaker, tmp_path: Path) -> None:
    path = bundles("true")
    done = bundle("create", path, "--from", path / "rootfs")
    assert done.returncode == 1 and "exists" in done.stderr and (path / "config.json").exists()


def test_a_bundle_is_closed_to_others(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    made(tmp_path / "b", "--from", tmp_path / "plain")
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["/etc/hostname", "../../secret.tar", "link", "fifo"])
def test_an_unpacked_archive_reads_nothing_outside(tmp_path: Path, name: str) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (tmp_path / "secret.tar").write_bytes(layer(entry("secret")))
    (saved / "link").symlink_to(tmp_path / "secret.tar")
    os.mkfifo(saved / "fifo")
    (saved / "config.json").write_text("{}")
    (saved / "manifest.json").write_text(json.dumps([{"Config": "config.json", "Layers": [name]}]))
    done = bundle("create", tmp_path / "b", "--from", saved)
    assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "b").exists()


def test_only_a_bundle_of_ours_is_deleted(bundles: BundleMaker) -> None:
    path = bundles("true")
    assert bundle("delete", path).returncode == 1 and (path / "config.json").exists()
