"""config.json as frozen values: `parse` reads a document, and names the JSON pointer of whatever is wrong in it.

Source: OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import SpecError
from runtime.spec.reader import Reader

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")


@dataclass(frozen=True, slots=True)
class Rlimit:
    """One resource limit. Units: those of setrlimit(2)."""

    type: str
    soft: int
    hard: int


@dataclass(frozen=True, slots=True)
class User:
    uid: int = 0
    gid: int = 0
    umask: int | None = None
    additional_gids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Process:
    args: tuple[str, ...]
    cwd: str
    terminal: bool = False
    console_size: tuple[int, int] | None = None  # rows, columns
    user: User = User()
    env: tuple[str, ...] = ()
    capabilities: Mapping[str, tuple[str, ...]] | None = None
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int | None = None


@dataclass(frozen=True, slots=True)
class Mount:
    destination: str
    type: str
    source: str
    options: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Namespace:
    type: str
    path: str | None


@dataclass(frozen=True, slots=True)
class Device:
    path: str
    type: str
    major: int
    minor: int
    file_mode: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class DeviceRule:
    allow: bool
    type: str  # a, b, c
    major: int | None
    minor: int | None
    access: str


@dataclass(frozen=True, slots=True)
class Hook:
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """Units: bytes; -1 is no limit."""

    limit: int | None = None
    reservation: int | None = None
    swap: int | None = None  # memory and swap together, as on cgroup v1


@dataclass(frozen=True, slots=True)
class Cpu:
    """Units: shares are relative; quota and period in microseconds."""

    shares: int | None = None
    quota_us: int | None = None
    period_us: int | None = None
    cpus: str | None = None
    mems: str | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    memory: Memory = Memory()
    cpu: Cpu = Cpu()
    pids_limit: int | None = None
    devices: tuple[DeviceRule, ...] = ()
    unified: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Linux:
    namespaces: tuple[Namespace, ...] = ()
    devices: tuple[Device, ...] = ()
    cgroups_path: str | None = None
    resources: Resources = Resources()
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    rootfs_propagation: str | None = None
    sysctl: Mapping[str, str] | None = None

    def namespace(self, kind: str) -> Namespace | None:
        """Return the namespace entry of one type, None where the container shares the caller's."""
        return next((n for n in self.namespaces if n.type == kind), None)


@dataclass(frozen=True, slots=True)
class Spec:
    oci_version: str
    root_path: str
    root_readonly: bool
    process: Process | None
    hostname: str | None
    domainname: str | None
    mounts: tuple[Mount, ...]
    linux: Linux
    hooks: Mapping[str, tuple[Hook, ...]]
    annotations: Mapping[str, str]


HOOK_NAMES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def parse(document: Any) -> Spec:
    """Read a config.json document.

    Raises: SpecError naming the JSON pointer of the first thing that is wrong; Unsupported is `validate`'s matter.
    """
    r = Reader(document)
    return Spec(
        oci_version=r.text("ociVersion"),
        root_path=r.object("root", required=True).text("path"),
        root_readonly=r.object("root").flag("readonly"),
        process=_process(r.object("process")) if r.has("process") else None,
        hostname=r.text_or_none("hostname"),
        domainname=r.text_or_none("domainname"),
        mounts=tuple(_mount(m) for m in r.objects("mounts")),
        linux=_linux(r.object("linux")),
        hooks={n: tuple(_hook(h) for h in r.object("hooks").objects(n)) for n in HOOK_NAMES if r.object("hooks").has(n)},
        annotations=r.text_map("annotations"),
    )


def parse_process(document: Any) -> Process:
    """Read a process document, as `exec --process` takes it. Raises: SpecError."""
    return _process(Reader(document))


def _process(r: Reader) -> Process:
    args = r.texts("args")
    if not args:
        raise SpecError(f"{r.at('args')}: must not be empty")
    user = r.object("user")
    size = r.object("consoleSize")
    capabilities = r.object("capabilities")
    return Process(
        args=args,
        cwd=r.text("cwd"),
        terminal=r.flag("terminal"),
        console_size=(size.integer("height"), size.integer("width")) if r.has("consoleSize") else None,
        user=User(
            uid=user.integer_or_none("uid") or 0,
            gid=user.integer_or_none("gid") or 0,
            umask=user.integer_or_none("umask"),
            additional_gids=user.integers("additionalGids"),
        ),
        env=r.texts("env"),
        capabilities={s: capabilities.texts(s) for s in CAPABILITY_SETS} if r.has("capabilities") else None,
        rlimits=tuple(Rlimit(x.text("type"), x.integer("soft"), x.integer("hard")) for x in r.objects("rlimits")),
        no_new_privileges=r.flag("noNewPrivileges"),
        oom_score_adj=r.integer_or_none("oomScoreAdj"),
    )


def _mount(r: Reader) -> Mount:
    kind = r.text_or_none("type") or ""
    return Mount(r.text("destination"), kind, r.text_or_none("source") or kind, r.texts("options"))


def _hook(r: Reader) -> Hook:
    return Hook(r.text("path"), r.texts("args"), r.texts("env"), r.integer_or_none("timeout"))


def _device(r: Reader) -> Device:
    mode = r.integer_or_none("fileMode")
    return Device(
        path=r.text("path"),
        type=r.text("type"),
        major=r.integer_or_none("major") or 0,
        minor=r.integer_or_none("minor") or 0,
        file_mode=0o666 if mode is None else mode,
        uid=r.integer_or_none("uid") or 0,
        gid=r.integer_or_none("gid") or 0,
    )


def device_rule(r: Reader) -> DeviceRule:
    """Read one entry of resources.devices; a missing or negative number means any."""
    kind = r.text_or_none("type") or "a"
    if kind not in ("a", "b", "c"):
        raise SpecError(f"{r.at('type')}: {kind!r} is none of a, b, c")
    numbers = [r.integer_or_none(n) for n in ("major", "minor")]
    major, minor = (None if n is None or n < 0 else n for n in numbers)
    return DeviceRule(r.flag("allow"), kind, major, minor, r.text_or_none("access") or "rwm")


def resources(r: Reader) -> Resources:
    """Read linux.resources, or the document that `update --resources` takes."""
    memory, cpu = r.object("memory"), r.object("cpu")
    return Resources(
        memory=Memory(*(memory.integer_or_none(n) for n in ("limit", "reservation", "swap"))),
        cpu=Cpu(
            shares=cpu.integer_or_none("shares"),
            quota_us=cpu.integer_or_none("quota"),
            period_us=cpu.integer_or_none("period"),
            cpus=cpu.text_or_none("cpus") or None,
            mems=cpu.text_or_none("mems") or None,
        ),
        pids_limit=r.object("pids").integer_or_none("limit"),
        devices=tuple(device_rule(d) for d in r.objects("devices")),
        unified=r.text_map("unified"),
    )


def _linux(r: Reader) -> Linux:
    return Linux(
        namespaces=tuple(Namespace(n.text("type"), n.text_or_none("path") or None) for n in r.objects("namespaces")),
        devices=tuple(_device(d) for d in r.objects("devices")),
        cgroups_path=r.text_or_none("cgroupsPath") or None,
        resources=resources(r.object("resources")),
        masked_paths=r.texts("maskedPaths"),
        readonly_paths=r.texts("readonlyPaths"),
        rootfs_propagation=r.text_or_none("rootfsPropagation") or None,
        sysctl=r.text_map("sysctl"),
    )
