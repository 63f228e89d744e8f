"""What is in an archive, and what of it is believed. Pure."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.archive import digests, layout
from runtime.errors import ContainerError, SpecError

ENGINE = "/run/containers/1234/userdata"


def spec(*mounts: dict[str, Any]) -> dict[str, Any]:
    return {
        "root": {"path": "/storage/merged", "readonly": True},
        "hostname": "h",
        "mounts": list(mounts),
        "linux": {"cgroupsPath": "/libpod_parent/libpod-1234", "resources": {}},
        "annotations": {"io.container.manager": "libpod", "mine": "x"},
    }


def bind(destination: str, source: str) -> dict[str, Any]:
    return {"destination": destination, "type": "bind", "source": source, "options": ["bind"]}


def test_what_was_the_engines_becomes_the_bundles() -> None:
    document, made = layout.adapt(
        spec(
            bind("/etc/hosts", f"{ENGINE}/hosts"),
            bind("/dev/shm", f"{ENGINE}/shm"),
            bind("/data", "/var/lib/containers/storage/volumes/v/_data"),
            bind("/mine", "/srv/mine"),
            {"destination": "/proc", "type": "proc", "source": "proc"},
        ),
        {"id": "1234", "namedVolumes": [{"volumeName": "v", "dest": "/data"}]},
    )
    assert document["root"] == {"path": "rootfs", "readonly": True}
    assert document["linux"] == {"resources": {}} and document["annotations"] == {"mine": "x"}
    assert [m["source"] for m in document["mounts"]] == ["mounts/0", "mounts/1", "mounts/2", "/srv/mine", "proc"]
    hosts, shm, data = made
    assert hosts.content is not None and "localhost h" in hosts.content
    assert (shm.content, shm.member, data.content, data.member) == (None, "devshm-checkpoint.tar", None, "volumes/v.tar")


@pytest.mark.parametrize("document", [{}, {"root": 5}, {"root": {}, "mounts": [7]}])
def test_a_document_that_is_none(document: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        layout.adapt(document, {})


def test_an_id_that_is_empty_matches_nothing() -> None:
    _, made = layout.adapt(spec(bind("/etc", "/etc")), {"id": ""})
    assert made == []


def test_our_own_documents_come_back() -> None:
    config = {"root": {"path": "rootfs"}, "mounts": [], "linux": {}, "annotations": {"a": "b"}}
    dumped = layout.spec_document(config, "/bundle/rootfs")
    assert dumped["annotations"]["io.container.manager"] == "libpod" and dumped["root"]["path"] == "/bundle/rootfs"
    back, made = layout.adapt(dumped, layout.config_document("c", None, "runc", "t", "t", dumped))
    assert back == config and made == []


@given(st.dictionaries(st.text(), st.text()), st.dictionaries(st.text(), st.text()))
def test_members_are_those_that_were_digested(wanted: dict[str, str], found: dict[str, str]) -> None:
    data = digests.document(wanted)
    if wanted == found:
        digests.check(data, found)
    else:
        with pytest.raises(ContainerError):
            digests.check(data, found)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"members": 5}', b"\xff", json.dumps({"members": {"a": 5}}).encode()])
def test_digests_that_are_none(data: bytes) -> None:
    with pytest.raises(ContainerError):
        digests.check(data, {"a": "sha256:0"})
