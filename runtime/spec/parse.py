"""A config.json document -> Spec, with every violation that its single members have.

What members have to do with each other is `validate`'s matter.
Source: OCI runtime specification 1.2, config.md and config-linux.md.
"""

from __future__ import annotations

from typing import Any

from runtime.errors import SpecError
from runtime.spec import resources, seccomp
from runtime.spec.config import (
    CAPABILITY_SETS,
    HOOK_NAMES,
    Device,
    Hook,
    IdMapping,
    Linux,
    Mount,
    Namespace,
    Process,
    Rlimit,
    Scheduler,
    Spec,
    User,
)
from runtime.spec.reader import Reader

_MAX_ID = 0xFFFFFFFE
SCHEDULER_POLICIES = (
    "SCHED_OTHER", "SCHED_FIFO", "SCHED_RR", "SCHED_BATCH", "SCHED_ISO", "SCHED_IDLE", "SCHED_DEADLINE",
)  # fmt: skip
SCHEDULER_FLAGS = (
    "SCHED_FLAG_RESET_ON_FORK",
    "SCHED_FLAG_RECLAIM",
    "SCHED_FLAG_DL_OVERRUN",
    "SCHED_FLAG_KEEP_POLICY",
    "SCHED_FLAG_KEEP_PARAMS",
    "SCHED_FLAG_UTIL_CLAMP_MIN",
    "SCHED_FLAG_UTIL_CLAMP_MAX",
)
IO_CLASSES = ("IOPRIO_CLASS_RT", "IOPRIO_CLASS_BE", "IOPRIO_CLASS_IDLE")


def parse(document: Any) -> tuple[Spec, list[str]]:
    """Read a document; return its values and its violations, each with its JSON pointer."""
    r = Reader(document)
    hooks, root = r.object("hooks"), r.object("root", required=True)
    spec = Spec(
        oci_version=r.text("ociVersion"),
        root_path=root.text("path") if r.has("root") else "",
        root_readonly=root.flag("readonly"),
        process=_process(r.object("process")) if r.has("process") else None,
        hostname=r.text_or_none("hostname"),
        domainname=r.text_or_none("domainname"),
        mounts=tuple(_mount(m) for m in r.objects("mounts")),
        linux=_linux(r.object("linux")),
        hooks={n: tuple(_hook(h) for h in hooks.objects(n)) for n in HOOK_NAMES if hooks.has(n)},
        annotations=r.text_map("annotations"),
    )
    # A member that was read twice told its violation twice.
    return spec, list(dict.fromkeys(r.problems))


def parse_process(document: Any) -> tuple[Process, list[str]]:
    """Read a process document, as `exec --process` takes it."""
    r = Reader(document)
    return _process(r), r.problems


def parse_resources(document: Any) -> resources.Resources:
    """Read a resources document, as `update --resources` takes it. Raises: SpecError."""
    r = Reader(document)
    read = resources.read(r)
    refuse(r.problems, "resources")
    return read


def refuse(problems: list[str], what: str) -> None:
    """Raise what was found wrong with a document, all of it. Raises: SpecError."""
    if len(problems) == 1:
        raise SpecError(f"{what}: {problems[0]}")
    if problems:
        raise SpecError("\n  ".join([f"{what}: {len(problems)} violations of the specification", *problems]))


def _process(r: Reader) -> Process:
    args = r.texts("args")
    if not args:
        r.wrong("args", "must not be empty")
    user, size, capabilities = r.object("user"), r.object("consoleSize"), r.object("capabilities")
    io, affinity = r.object("ioPriority"), r.object("execCPUAffinity")
    env = r.texts("env")
    for i, entry in enumerate(env):
        if "=" not in entry or entry.startswith("="):
            r.problems.append(f"{r.at('env')}/{i}: {entry!r} is not NAME=VALUE")
    return Process(
        args=args,
        cwd=r.text("cwd"),
        terminal=r.flag("terminal"),
        console_size=(size.integer("height", 0, 65535), size.integer("width", 0, 65535)) if r.has("consoleSize") else None,
        user=User(
            uid=user.integer_or_none("uid", 0, _MAX_ID) or 0,
            gid=user.integer_or_none("gid", 0, _MAX_ID) or 0,
            umask=user.integer_or_none("umask", 0, 0o777),
            additional_gids=user.integers("additionalGids", 0, _MAX_ID),
        ),
        env=env,
        capabilities={s: capabilities.texts(s) for s in CAPABILITY_SETS} if r.has("capabilities") else None,
        rlimits=tuple(Rlimit(x.text("type"), x.integer("soft"), x.integer("hard")) for x in r.objects("rlimits")),
        no_new_privileges=r.flag("noNewPrivileges"),
        oom_score_adj=r.integer_or_none("oomScoreAdj", -1000, 1000),
        apparmor_profile=r.text_or_none("apparmorProfile") or None,
        selinux_label=r.text_or_none("selinuxLabel") or None,
        scheduler=_scheduler(r.object("scheduler")) if r.has("scheduler") else None,
        io_priority=(io.choice("class", IO_CLASSES, "IOPRIO_CLASS_BE"), io.integer_or_none("priority", 0, 7) or 0)
        if r.has("ioPriority")
        else None,
        exec_cpu_affinity=(affinity.text_or_none("initial") or None, affinity.text_or_none("final") or None),
    )


def _scheduler(r: Reader) -> Scheduler:
    if not r.has("policy"):
        r.wrong("policy", "is required")
    flags = r.texts("flags")
    for flag in flags:
        if flag not in SCHEDULER_FLAGS:
            r.wrong("flags", f"{flag!r} is none of {', '.join(SCHEDULER_FLAGS)}")
    return Scheduler(
        policy=r.choice("policy", SCHEDULER_POLICIES, "SCHED_OTHER"),
        nice=r.integer_or_none("nice", -20, 19) or 0,
        priority=r.integer_or_none("priority", 0, 99) or 0,
        flags=flags,
        runtime_ns=r.integer_or_none("runtime", 0) or 0,
        deadline_ns=r.integer_or_none("deadline", 0) or 0,
        period_ns=r.integer_or_none("period", 0) or 0,
    )


def _mappings(r: Reader, key: str) -> tuple[IdMapping, ...]:
    return tuple(
        IdMapping(m.integer("containerID", 0, _MAX_ID), m.integer("hostID", 0, _MAX_ID), m.integer("size", 1, _MAX_ID + 1))
        for m in r.objects(key)
    )


def _mount(r: Reader) -> Mount:
    kind = r.text_or_none("type") or ""
    return Mount(
        destination=r.text("destination"),
        type=kind,
        source=r.text_or_none("source") or kind,
        options=r.texts("options"),
        uid_mappings=_mappings(r, "uidMappings"),
        gid_mappings=_mappings(r, "gidMappings"),
    )


def _hook(r: Reader) -> Hook:
    return Hook(r.text("path"), r.texts("args"), r.texts("env"), r.integer_or_none("timeout", 1))


def _device(r: Reader) -> Device:
    mode = r.integer_or_none("fileMode", 0, 0o7777777)
    return Device(
        path=r.text("path"),
        type=r.choice("type", ("b", "c", "u", "p"), "c"),
        major=r.integer_or_none("major", 0, 0xFFFFFFFF) or 0,
        minor=r.integer_or_none("minor", 0, 0xFFFFFFFF) or 0,
        # podman and Docker send the file type along.
        file_mode=0o666 if mode is None else mode & 0o7777,
        uid=r.integer_or_none("uid", 0, _MAX_ID) or 0,
        gid=r.integer_or_none("gid", 0, _MAX_ID) or 0,
    )


def _linux(r: Reader) -> Linux:
    offsets = r.object("timeOffsets")
    return Linux(
        namespaces=tuple(Namespace(n.text("type"), n.text_or_none("path") or None) for n in r.objects("namespaces")),
        uid_mappings=_mappings(r, "uidMappings"),
        gid_mappings=_mappings(r, "gidMappings"),
        time_offsets={
            clock: (offsets.object(clock).integer_or_none("secs") or 0, offsets.object(clock).integer_or_none("nanosecs") or 0)
            for clock in offsets.keys()  # noqa: SIM118 - a reader is no mapping
        },
        devices=tuple(_device(d) for d in r.objects("devices")),
        cgroups_path=r.text_or_none("cgroupsPath") or None,
        resources=resources.read(r.object("resources")),
        masked_paths=r.texts("maskedPaths"),
        readonly_paths=r.texts("readonlyPaths"),
        rootfs_propagation=r.text_or_none("rootfsPropagation") or None,
        mount_label=r.text_or_none("mountLabel") or None,
        sysctl=r.text_map("sysctl"),
        seccomp=seccomp.read(r.object("seccomp")) if r.has("seccomp") else None,
        personality=r.object("personality").choice("domain", ("LINUX", "LINUX32"), "LINUX") if r.has("personality") else None,
    )
