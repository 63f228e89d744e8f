"""The import directions of docs/ARCHITECTURE.md, read from the code's syntax trees."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# package of runtime -> the packages of runtime that it may import besides itself
RUNTIME = {
    "errors": set(),
    "values": set(),
    "log": set(),
    "files": set(),
    "linux": {"values", "errors"},
    "spec": {"values", "errors", "linux"},
    "setup": {"values", "spec", "linux", "errors"},
    "cgroups": {"values", "spec", "linux", "errors"},
    "process": {"values", "setup", "cgroups", "spec", "linux", "files", "errors"},
    "container": {"values", "process", "cgroups", "setup", "spec", "linux", "files", "log", "errors"},
    "memory": {"values", "linux", "files", "errors"},
    "criu": {"values", "memory", "container", "process", "cgroups", "setup", "spec", "linux", "files", "errors"},
    "image": {"values", "spec", "linux", "files", "errors"},
    "archive": {"values", "criu", "image", "container", "linux", "files", "errors"},
    "cli": {
        "values",
        "archive",
        "image",
        "criu",
        "memory",
        "container",
        "process",
        "cgroups",
        "setup",
        "spec",
        "linux",
        "files",
        "log",
        "errors",
    },
}
# module of migrate -> its layer; a module imports only from lower layers
LAYERS = (
    {"errors"},
    {
        "wire_pb2",
        "phase",
        "faults",
        "places",
        "warm",
        "manifest",
        "liveness",
        "durable",
        "converge",
        "timeline",
        "watch",
        "network",
        "volume",
        "mounts",
        "announce",
    },
    {"overlay"},
    {"wire", "report", "host", "journal", "recover", "facts", "cni", "backlog", "flush"},
    {"preflight", "netns"},
    {"outlet", "blocks"},
    {"plan", "transport", "rootfs", "command", "locks", "records"},
    {"tree", "outgoing", "incoming", "processes"},
    {"layers"},
    {"layer_store"},
    {"ship", "probe", "story"},
    {"page"},
    {"agent"},
    {"session"},
    {"commit", "relay"},
    {"steps", "resolve"},
    {"coordinator", "recovery"},
    {"cli"},
)
ONLY_IN = {
    "pycriu": {"runtime/criu/session.py", "runtime/criu/images.py", "runtime/criu/pagemap.py"},
    "paramiko": {"migrate/transport/ssh.py"},
    "cryptography": {"runtime/archive/digests.py"},
    "google": {"migrate/wire.py", "migrate/wire_pb2.py"},
}
PURE = ["runtime/spec", "runtime/setup", "runtime/linux/const.py"]
PURE += [f"runtime/criu/{n}.py" for n in ("request", "advice", "findings")] + ["runtime/archive/layout.py"]
PURE += [
    f"migrate/{n}.py"
    for n in ("manifest", "preflight", "plan", "phase", "report", "facts", "recover", "converge", "story", "page", "volume")
]


def modules() -> list[Path]:
    return [p for package in ("runtime", "migrate") for p in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Return the full names of what a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def _part(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def _of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[1]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_directions(path: Path) -> None:
    relative = str(path.relative_to(ROOT))
    for name in imports(path):
        top = name.split(".")[0]
        if relative.startswith("runtime/"):
            assert top != "migrate", f"{relative} imports {name}"
            part = _part(name) if top == "runtime" else ""
            if part in RUNTIME and _of(path) in RUNTIME:
                assert part == _of(path) or part in RUNTIME[_of(path)], f"{relative} imports {name}"
        else:
            assert top != "runtime" or name.startswith("runtime.spec"), f"{relative} imports {name}"
            part = _part(name) if top == "migrate" else ""
            layer = {m: i for i, layer in enumerate(LAYERS) for m in layer}
            if part in layer and _of(path) in layer and part != _of(path):
                assert layer[part] < layer[_of(path)], f"{relative} imports {name}"
        if top in ONLY_IN:
            assert relative in ONLY_IN[top], f"{relative} imports {name}"
        if top == "click":
            assert "/cli/" in relative, f"{relative} imports {name}"


def test_every_module_has_its_place() -> None:
    known = {m for layer in LAYERS for m in layer} | set(RUNTIME) | {"__init__"}
    assert {_of(p) for p in modules()} <= known


@pytest.mark.parametrize("place", PURE)
def test_pure_modules_touch_nothing(place: str) -> None:
    paths = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    for path in paths:
        used = {n.split(".")[0] for n in imports(path)}
        assert not used & {"os", "subprocess", "socket", "pathlib", "ctypes", "fcntl", "time"}, path
