"""A layer's digest tells what a container would see of it, and a layer is kept only as what it was said to be."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate import layer_store, layers, places
from migrate.errors import TransferFailed

WHEN = 1_700_000_000_123_456_789


def make(root: Path) -> Path:
    (root / "etc").mkdir(parents=True)
    (root / "etc/file").write_bytes(b"content")
    (root / "etc/other").hardlink_to(root / "etc/file")
    (root / "link").symlink_to("etc/file")
    os.mkfifo(root / "fifo")
    settle(root)
    return root


def settle(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(WHEN, WHEN), follow_symlinks=False)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    return make(tmp_path / "layer")


def test_the_same_wherever_it_lies(layer: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "elsewhere/layer")
    os.utime(other, ns=(0, 0))  # nobody sees when a layer itself was made
    assert layers.digest(layer) == layers.digest(other)
    assert layers.digest(layer)[1] == 7


@pytest.mark.parametrize(
    "change",
    [
        lambda r: (r / "etc/file").write_bytes(b"CONTENT"),
        lambda r: (r / "etc/file").chmod(0o600),
        lambda r: (r / "etc/new").write_bytes(b""),
        lambda r: (r / "etc/other").unlink(),
        lambda r: ((r / "etc/other").unlink(), (r / "etc/other").write_bytes(b"content")),
        lambda r: ((r / "link").unlink(), (r / "link").symlink_to("etc/other")),
        lambda r: (r / "fifo").rename(r / "etc/fifo"),
        lambda r: r.chmod(0o700),
        lambda r: os.setxattr(r / "etc", "user.note", b"1"),
    ],
)
def test_whatever_differs_makes_another_one(layer: Path, change: Callable[[Path], object]) -> None:
    layer.chmod(0o755)
    before, _ = layers.digest(layer)
    change(layer)
    settle(layer)
    assert layers.digest(layer)[0] != before


def test_a_time_is_seen(layer: Path) -> None:
    before, _ = layers.digest(layer)
    os.utime(layer / "etc/file", ns=(WHEN, WHEN + 1))
    assert layers.digest(layer)[0] != before


def test_the_store(layer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "LAYERS", tmp_path / "layers")
    assert layer_store.stored() == {} and layer_store.have(("1" * 40,)) == ()
    places.LAYERS.mkdir()
    digest, _ = layers.digest(layer)
    with pytest.raises(TransferFailed, match="come as another one"):
        layer_store.keep(layer, "1" * 40)
    writer = os.open(layer, os.O_RDONLY)
    fcntl.flock(writer, fcntl.LOCK_SH)
    with pytest.raises(TransferFailed, match="written to still"):
        layer_store.keep(layer, digest)
    os.close(writer)
    layer_store.keep(layer, digest)
    assert layer_store.stored() == {digest: 7} and layer_store.have((digest, "1" * 40, digest)) == (digest,)
    layer_store.keep(make(tmp_path / "again"), digest)
    assert not (tmp_path / "again").exists(), "what is there already is not kept twice"

    own = tmp_path / "bundle.overlay"
    own.mkdir()
    with layer_store.locked():
        layer_store.use(str(own), (digest,))
        assert layer_store.in_use() == {digest}, "also while nothing is mounted"
        own.rmdir()
        assert layer_store.in_use() == set()
        layer_store.remove(digest)
        layer_store.remove(digest)
        layer_store.sweep()
    assert not places.LAYERS.exists()
    with layer_store.locked():
        layer_store.sweep()
