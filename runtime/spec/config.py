"""config.json as frozen values. Source: OCI runtime specification 1.2, config.md and config-linux.md."""

from __future__ import annotations

from collections.abc import Mapping

from runtime.spec.resources import Resources
from runtime.spec.seccomp import Seccomp
from runtime.values import Value

CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
HOOK_NAMES = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


class Rlimit(Value):
    """One resource limit. Units: those of setrlimit(2)."""

    type: str
    soft: int
    hard: int


class User(Value):
    uid: int = 0
    gid: int = 0
    umask: int | None = None
    additional_gids: tuple[int, ...] = ()


class Scheduler(Value):
    """Units: runtime, deadline and period in nanoseconds. Source: sched_setattr(2)."""

    policy: str
    nice: int = 0
    priority: int = 0
    flags: tuple[str, ...] = ()
    runtime_ns: int = 0
    deadline_ns: int = 0
    period_ns: int = 0


class Process(Value):
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
    apparmor_profile: str | None = None
    selinux_label: str | None = None
    scheduler: Scheduler | None = None
    io_priority: tuple[str, int] | None = None  # class, priority
    exec_cpu_affinity: tuple[str | None, str | None] = (None, None)  # before and after the cgroup is joined


class IdMapping(Value):
    """One range of a user namespace's ids."""

    container_id: int
    host_id: int
    size: int


class Mount(Value):
    destination: str
    type: str
    source: str
    options: tuple[str, ...]
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()


class Namespace(Value):
    type: str
    path: str | None


class Device(Value):
    path: str
    type: str
    major: int
    minor: int
    file_mode: int
    uid: int
    gid: int


class Hook(Value):
    path: str
    args: tuple[str, ...]
    env: tuple[str, ...]
    timeout_s: int | None


class Linux(Value):
    namespaces: tuple[Namespace, ...] = ()
    uid_mappings: tuple[IdMapping, ...] = ()
    gid_mappings: tuple[IdMapping, ...] = ()
    time_offsets: Mapping[str, tuple[int, int]] = {}  # clock -> seconds, nanoseconds
    devices: tuple[Device, ...] = ()
    cgroups_path: str | None = None
    resources: Resources = Resources()
    masked_paths: tuple[str, ...] = ()
    readonly_paths: tuple[str, ...] = ()
    rootfs_propagation: str | None = None
    mount_label: str | None = None
    sysctl: Mapping[str, str] = {}
    seccomp: Seccomp | None = None
    personality: str | None = None

    def namespace(self, kind: str) -> Namespace | None:
        """Return the namespace entry of one type, None where the container shares the caller's."""
        return next((n for n in self.namespaces if n.type == kind), None)

    def makes(self, kind: str) -> bool:
        """Say whether the container gets a new namespace of this type."""
        return any(n.type == kind and not n.path for n in self.namespaces)


class Spec(Value):
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
