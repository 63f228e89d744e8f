"""What of an overlay is read from its mount options, and how it is made on another host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from migrate.overlay import Layer, Overlay, beside

PLAIN = "rw,lowerdir=/l/2:/l/1,upperdir=/b/upper,workdir=/b/work,xino=off"
USUAL = {"index": "off", "nfs_export": "off", "redirect_dir": "follow", "metacopy": "off"}
KEPT = Overlay("/b/rootfs", (Layer("/l/2", "2" * 40, 20), Layer("/l/1", "1" * 40, 10)), "/b/upper", "/b/work", ("metacopy=on",))


def test_layers_in_their_order() -> None:
    found = Overlay.read("/b/rootfs", PLAIN, USUAL)
    assert [layer.path for layer in found.layers] == ["/l/2", "/l/1"]
    assert (found.upper, found.work, found.unsupported) == ("/b/upper", "/b/work", ())
    assert found.options == ("index=off", "metacopy=off", "nfs_export=off", "redirect_dir=follow")
    assert Overlay.read("/b/rootfs", "rw,lowerdir+=/l/2,lowerdir+=/l/1,upperdir=/b/upper,workdir=/b/work", USUAL) == found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rw,lowerdir=/l", "no layer of its own"),
        ("rw,lowerdir=l/A:l/B,upperdir=/u,workdir=/w", "relative"),
        (r"rw,lowerdir=/a\134:b,upperdir=/u,workdir=/w", "colon"),
        (r"rw,lowerdir=/a\054b,upperdir=/u,workdir=/w", "comma"),
        ("rw,lowerdir=/a::/data,upperdir=/u,workdir=/w", "nothing but data"),
        ("rw,lowerdir=/a,upperdir=/u,workdir=/w,index=on", "the option index=on"),
        ("rw,lowerdir=/a,upperdir=/u,workdir=/w,nfs_export=on", "the option nfs_export=on"),
    ],
)
def test_what_cannot_be_made_elsewhere(options: str, words: str) -> None:
    assert any(words in thing for thing in Overlay.read("/b/rootfs", options, USUAL).unsupported)


def test_what_the_kernel_does_not_tell_counts() -> None:
    """An option that is a kernel's own is not shown where it holds, and is another one on another host."""
    assert Overlay.read("/b/rootfs", PLAIN, {**USUAL, "index": "on"}).unsupported == ("the option index=on",)
    assert "metacopy=on" in Overlay.read("/b/rootfs", PLAIN, {**USUAL, "metacopy": "on"}).options
    told = Overlay.read("/b/rootfs", f"{PLAIN},metacopy=off,index=off", {**USUAL, "metacopy": "on", "index": "on"})
    assert told.unsupported == () and {"metacopy=off", "index=off"} <= set(told.options)
    assert Overlay.read("/b/rootfs", f"{PLAIN},userxattr", USUAL).options == ("index=off", "nfs_export=off", "userxattr")


def test_names_as_the_kernel_writes_them() -> None:
    found = Overlay.read("/b/rootfs", r"rw,lowerdir=/with\040space,upperdir=/b/upper,workdir=/b/work", USUAL)
    assert found.layers[0].path == "/with space" and found.unsupported == ()


def test_elsewhere_nobody_chooses_its_place() -> None:
    there = KEPT.elsewhere("/b", "/store")
    assert there.mount_options() == (
        f"lowerdir=/store/{'2' * 40}:/store/{'1' * 40},upperdir={beside('/b')}/upper,workdir={beside('/b')}/work,metacopy=on"
    )
    for wrong in ("/other", "/b/rootfs"):
        with pytest.raises(ValueError, match="cannot be made"):
            KEPT.elsewhere(wrong, "/store")
    with pytest.raises(ValueError, match="cannot be made"):
        replace(KEPT, root="/b,upperdir=/etc/rootfs").elsewhere("/b,upperdir=/etc", "/store")
    many = Overlay("/b/rootfs", KEPT.layers * 50, "/b/upper", "/b/work")
    with pytest.raises(ValueError, match="more than one mount takes"):
        many.elsewhere("/b", "/store")


def test_what_lies_in_the_bundle() -> None:
    assert KEPT.inside("/b") == (b"upper", b"work") and KEPT.inside("/l") == (b"2", b"1")
    assert KEPT.size_without(()) == 30 and KEPT.size_without(("1" * 40,)) == 20


def test_json() -> None:
    document = KEPT.as_dict()
    assert Overlay.from_json(document) == KEPT
    layer = {"path": "/l", "digest": "1" * 40, "size_bytes": 1}
    for wrong in (
        {"layers": [{**layer, "digest": "../../etc"}]},
        {"layers": [{**layer, "path": "/a:/etc"}]},
        {"upper": "/u,lowerdir=/etc"},
        {"options": ["upperdir=/etc"]},
        {"root": "/b/../etc"},
    ):
        with pytest.raises(ValueError, match=r"layer|options|root"):
            Overlay.from_json({**document, **wrong})
