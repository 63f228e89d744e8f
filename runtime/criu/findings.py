"""What stands in the way of a checkpoint, said before anything is frozen: a look at a container -> findings. Pure.

Each finding has a code that stays what it is, words that name the thing, and a remedy. What CRIU itself says in its log is
explained by the same codes and remedies (`advice.py`).
"""

from __future__ import annotations

import stat
from enum import StrEnum
from typing import Any

from runtime.criu.options import CheckpointOptions, NetworkLock
from runtime.linux.procfs import Mount
from runtime.values import Value, as_dict


class Severity(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Finding(Value):
    code: str
    severity: Severity
    words: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        return as_dict(self)


# What to do about each; "" where the words say it all.
REMEDY: dict[str, str] = {
    "architecture": "the images are of another architecture: processes cannot change it",
    "anonymous-inode": "CRIU cannot dump this kind of descriptor: have the program close it",
    "config-file": "take the option out of that file, or mind it",
    "cpu": "the processors of the two hosts differ too much: --cpu-cap can demand less, at the program's own risk",
    "criu-missing": "run scripts/install-criu, or name one with $FERRY_CRIU",
    "criu-version": "run scripts/install-criu: it finds one that works with this kernel",
    "device": "have the program close the device",
    "exec-session": "let it end: what `exec` started is not below the container's first process, and its caller waits for it",
    "file-locks": "give --file-locks",
    "file-mismatch": "bring the files of the container to what they were at the checkpoint",
    "file-outside": "a restore gives the container its caller's instead",
    "freeze": "a process did not stop in time: look for one in uninterruptible sleep (state D), or give a longer --timeout",
    "ghost-file": "give a larger --ghost-limit, or none: then it is as large as it must be",
    "images-damaged": "the images are damaged or cut short: copy them again, or make another checkpoint",
    "inotify-overlay": "watch a path on a volume or a tmpfs instead, or try --force-irmap; CRIU 4.3 lifts this",
    "io-uring": "CRIU cannot dump it: forbid it by sysctl kernel.io_uring_disabled=2 or seccomp, and programs do without",
    "ipc-host": "give the container an ipc namespace of its own",
    "kernel-rseq": "the kernel cannot tell CRIU about rseq: Linux 5.13 or newer is needed",
    "lazy-limits": "pipes are too small: sysctl fs.pipe-max-size=33554432 fs.pipe-user-pages-soft=0, or CAP_SYS_RESOURCE",
    "lazy-socket": "start `criu lazy-pages` in the same --work-path first, or leave it to `restore --lazy-pages`",
    "link-remap": "give --link-remap: the name is then made again for the time being",
    "lsm": "the security label of a process cannot be set on this host: load the profile here, or name another by --lsm-profile",
    "lsm-label": "the same profile must be loaded where it is restored, or another be named by --lsm-profile",
    "memory-tracking": "pre-dumps compare the memory page by page instead",
    "message-queue": "CRIU cannot dump it: have the program remove it (mq_unlink)",
    "mount-source": "give the container the path as a bind mount in its config.json, so that it is known to come from outside",
    "mount-type": "unmount it, or mount it from outside by config.json",
    "mptcp": "set sysctl net.mptcp.enabled=0 in the container, or GODEBUG=multipathtcp=0 for Go",
    "namespace-joined": "what else is in it is not restored with the container",
    "namespace-owner": "CRIU cannot dump that: give the container one of its own, or no user namespace",
    "namespace-nested": "CRIU cannot dump a namespace made inside: turn that off (PrivateUsers= and the like)",
    "network-lock": "install nftables or iptables, or give --network-lock skip when nothing talks to the container",
    "page-server": "start one there first: criu page-server --images-dir DIR --address ADDRESS --port PORT",
    "parent": "name the directory of the dump before this one by --parent-path",
    "pid-namespace": "give the container a pid namespace of its own",
    "pid-taken": "a process number is taken: the container needs a pid namespace of its own",
    "pipe-outside": "what is at its other end is not restored with it",
    "space": "free some space there, or name another --image-path",
    "tcp-address": "the address must be on the host where it is restored; or give --tcp-close",
    "tcp-established": "give --tcp-established to keep the connections, or --tcp-close to drop them",
    "tcp-in-flight": "they are left out; whoever makes them must try again",
    "terminal": "run it with a terminal of its own (process.terminal), or give --shell-job",
    "resource-capability": "give the runtime CAP_SYS_RESOURCE, or the container a user namespace",
    "socket-protocol": "CRIU cannot dump this kind of socket: have the program close it",
    "traced": "detach the debugger",
    "uninterruptible": "wait until it is through, or the freezer will run into its time-out",
    "unix-outside": "close it, or put its server into the container; in the host's network --ext-unix-sk lets datagrams pass",
    "uprobes": "detach the tracer that set them",
}

_KNOWN_FS = {
    "autofs", "binfmt_misc", "cgroup", "cgroup2", "debugfs", "devpts", "devtmpfs", "fusectl", "hugetlbfs", "mqueue",
    "overlay", "proc", "pstore", "securityfs", "sysfs", "tmpfs", "tracefs",
}  # fmt: skip
# One anon_inode each; CRIU's criu/files.c. What holds for io_uring is said apart.
_KNOWN_ANON = {"[eventfd]", "[eventpoll]", "[signalfd]", "[timerfd]", "inotify", "[fanotify]", "[pidfd]", "bpf-map"}
_MEMORY_DEVICES = {(1, n) for n in (1, 3, 4, 5, 7, 8, 9, 11)}
TTY_MAJORS = {4, 5, *range(136, 144)}
_TUN, _RTC_MAJOR = (10, 200), {249, 250, 251, 252, 253, 254}
# socket.h, in.h
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET = 1, 2, 10, 16, 17
_SOCK_STREAM, _SOCK_DGRAM = 1, 2
_ICMP, _TCP, _UDP, _ICMPV6, _UDPLITE, _RAW = 1, 6, 17, 58, 136, 255
_TCP_LISTEN, _TCP_CLOSE, _TCP_SYN_SENT, _TCP_SYN_RECV, _TCP_NEW_SYN_RECV = 10, 7, 2, 3, 12
_MPTCP, _SCTP = 262, 132
_PLAIN_PROTOCOLS = {0, _TCP, _UDP, _UDPLITE, _ICMP, _ICMPV6, _RAW}
_FAMILIES = {_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK, _AF_PACKET}
# A namespace of these kinds that is not the first process's cannot be dumped; of the others it can.
_NOT_NESTED = {"user": "user", "pid": "pid", "ipc": "ipc", "uts": "uts", "cgroup": "cgroup", "time": "time"}


class OpenFile(Value):
    """A descriptor, or a mapping of a deleted file (number -1). Units: bytes."""

    pid: int
    number: int
    target: str
    mode: int = 0
    links: int = 1
    size: int = 0
    rdev: tuple[int, int] = (0, 0)
    device: tuple[int, int] = (0, 0)
    inode: int = 0
    writable: bool = False
    readable: bool = False
    locks: int = 0
    watched_devices: tuple[tuple[int, int], ...] = ()


class Socket(Value):
    """`state` is the kernel's of TCP; `peer_outside` that no process of the container has its other end.

    `peer_seen` says of such a peer that it is in the container's network namespace, where CRIU sees it.
    """

    pid: int
    number: int
    inode: int
    family: int
    kind: int
    protocol: int
    state: int = 0
    name: str = ""
    peer_outside: bool = False
    peer_seen: bool = False


class Task(Value):
    """A process in the container's cgroups, or below its first process."""

    pid: int
    name: str
    state: str
    tracer: int
    below_init: bool
    namespaces: dict[str, int]
    label: str = ""
    has_uprobes: bool = False
    has_sysv_memory: bool = False
    other_user: bool = False  # than we are, in our own user namespace


class Look(Value):
    """All that was seen of a container and its host. Units: bytes."""

    pid: int
    tasks: tuple[Task, ...]
    files: tuple[OpenFile, ...]
    sockets: tuple[Socket, ...]
    mounts: tuple[Mount, ...]
    message_queues: tuple[str, ...]
    known_places: tuple[str, ...]  # mount points that CRIU is told about
    inherited: tuple[str, ...]  # names of descriptors that a restore gets from its caller
    own_pid_namespace: bool
    own_ipc_namespace: bool
    joined_namespaces: tuple[str, ...]  # by a path in config.json
    foreign_namespaces: tuple[str, ...]  # of another user namespace than the container's
    own_terminal: bool
    needs_lock: bool
    has_nft: bool
    has_iptables: bool
    memory_bytes: int
    images_free_bytes: int
    images_place: str
    has_sys_resource: bool
    tracks_memory: bool
    criu_error: str = ""
    criu_version: str = ""
    overridden: tuple[tuple[str, str], ...] = ()  # option, file of CRIU's that sets it


def examine(look: Look, options: CheckpointOptions) -> list[Finding]:
    """Return all findings, what fails first; with nothing to say, that it is ready."""
    found = [
        *_host(look, options),
        *_tasks(look, options),
        *_files(look, options),
        *_sockets(look, options),
        *_mounts(look),
    ]
    if not any(f.severity == Severity.FAIL for f in found):
        found.append(Finding("ready", Severity.OK, f"CRIU {look.criu_version} can dump it: {len(look.tasks)} processes"))
    order = [Severity.FAIL, Severity.WARN, Severity.OK]
    return sorted(found, key=lambda f: order.index(f.severity))


def at_once(tasks: tuple[Task, ...]) -> Finding | None:
    """Return what CRIU would not notice, or only after a long time: the first of it."""
    for task in tasks:
        if not task.below_init:
            return fail("exec-session", f"{_who(task)} was started by exec")
        if task.tracer:
            return fail("traced", f"{_who(task)} is traced by process {task.tracer}")
    return None


def fail(code: str, words: str) -> Finding:
    return Finding(code, Severity.FAIL, words, REMEDY[code])


def warn(code: str, words: str) -> Finding:
    return Finding(code, Severity.WARN, words, REMEDY[code])


def _host(look: Look, options: CheckpointOptions) -> list[Finding]:
    found = []
    if look.criu_error:
        code = next(
            (c for mark, c in (("too old", "criu-version"), ("get_rseq_conf", "kernel-rseq")) if mark in look.criu_error),
            "criu-missing",
        )
        found.append(fail(code, look.criu_error))
    found += [warn("config-file", f"{path} sets {option}, and counts more than ours") for option, path in look.overridden]
    if look.memory_bytes > look.images_free_bytes:
        found.append(
            fail(
                "space",
                f"{look.images_place} has {look.images_free_bytes >> 20} MiB free, the memory is {look.memory_bytes >> 20} MiB",
            )
        )
    if not look.own_pid_namespace:
        found.append(
            fail(
                "pid-namespace", "the container has no pid namespace of its own: its process numbers may be taken at the restore"
            )
        )
    for kind in look.joined_namespaces:
        if kind == "user":
            found.append(fail("namespace-joined", "the container joins a user namespace, which CRIU can only make anew"))
        elif kind not in ("network", "pid"):
            found.append(warn("namespace-joined", f"the container joins a namespace ({kind}); restored it has one of its own"))
    for kind in look.foreign_namespaces:
        found.append(fail("namespace-owner", f"the container's {kind} namespace belongs to another user namespace"))
    if look.needs_lock and not (look.has_nft or look.has_iptables) and options.network_lock != NetworkLock.SKIP:
        found.append(fail("network-lock", "the container has a network, and neither nft nor iptables is here to lock it"))
    if options.pre_dump and not look.tracks_memory:
        found.append(warn("memory-tracking", "the kernel does not track dirty pages (CONFIG_MEM_SOFT_DIRTY)"))
    return found


def _who(task: Task) -> str:
    return f"process {task.pid} ({task.name})"


def _tasks(look: Look, options: CheckpointOptions) -> list[Finding]:
    found = []
    init = next(t for t in look.tasks if t.pid == look.pid)
    for task in look.tasks:
        if finding := at_once((task,)):
            found.append(finding)
        for kind, name in _NOT_NESTED.items():
            if task.namespaces.get(kind, 0) != init.namespaces.get(kind, 0) and task.below_init and task.state != "Z":
                found.append(fail("namespace-nested", f"{_who(task)} has a {name} namespace of its own"))
        if task.other_user and not look.has_sys_resource:
            found.append(fail("resource-capability", f"{_who(task)} is another user's, whose limits CRIU cannot read here"))
        if task.state == "D":
            found.append(warn("uninterruptible", f"{_who(task)} is in uninterruptible sleep"))
        if task.has_uprobes:
            found.append(fail("uprobes", f"{_who(task)} has uprobes set in it"))
        if task.has_sysv_memory and not look.own_ipc_namespace:
            found.append(fail("ipc-host", f"{_who(task)} uses System V shared memory of the host's ipc namespace"))
    labels = {t.label for t in look.tasks if t.label and not t.label.startswith("unconfined")}
    found += [warn("lsm-label", f"processes have the security label {label}") for label in sorted(labels)]
    return found


def _files(look: Look, options: CheckpointOptions) -> list[Finding]:
    found = []
    names = {t.pid: _who(t) for t in look.tasks}
    overlays = {_device(m) for m in look.mounts if m.fstype == "overlay"}
    ends: dict[str, set[str]] = {}
    for f in look.files:
        who = f"{names.get(f.pid, f.pid)} has {f'descriptor {f.number}' if f.number >= 0 else 'a mapping'}"
        if f.target.startswith("pipe:["):
            ends.setdefault(f.target, set()).update("r" * f.readable + "w" * f.writable)
        if f.locks and not options.file_locks:
            found.append(fail("file-locks", f"{who} with a lock: {f.target}"))
        if f.target.startswith("anon_inode:"):
            kind = f.target.removeprefix("anon_inode:")
            if kind == "[io_uring]":
                found.append(fail("io-uring", f"{who} of io_uring"))
            elif kind not in _KNOWN_ANON:
                found.append(fail("anonymous-inode", f"{who}: {kind.strip('[]')}"))
            if set(f.watched_devices) & overlays and not options.force_irmap:
                found.append(fail("inotify-overlay", f"{who} that watches a file on an overlay"))
        elif f.pid == look.pid and stat.S_ISREG(f.mode) and 0 <= f.number < 3 and look.inherited[f.number].startswith("file["):
            found.append(warn("file-outside", f"{who} of a file outside of the container: {f.target}"))
        elif stat.S_ISREG(f.mode) and f.target.endswith(" (deleted)"):
            found += _deleted(f, who, options)
        elif stat.S_ISCHR(f.mode) or stat.S_ISBLK(f.mode):
            found += _device_node(f, who, look, options)
    for name, sides in sorted(ends.items()):
        if len(sides) == 1 and name not in look.inherited:
            found.append(warn("pipe-outside", f"{name}: its other end is outside of the container, or closed"))
    return found


def _deleted(f: OpenFile, who: str, options: CheckpointOptions) -> list[Finding]:
    path = f.target.removesuffix(" (deleted)")
    if path.startswith(("/memfd:", "/dev/zero", "/SYSV", "/[aio]", "/anon_hugepage")):
        return []
    if f.links:
        if not options.link_remap:
            return [fail("link-remap", f"{who} of {path}, which has lost that name but has others")]
        return []
    limit = options.ghost_limit_bytes
    if limit is not None and f.size > limit:
        return [fail("ghost-file", f"{who} of {path}, deleted and {f.size} bytes large; the limit is {limit}")]
    return []


def _device_node(f: OpenFile, who: str, look: Look, options: CheckpointOptions) -> list[Finding]:
    major = f.rdev[0]
    if stat.S_ISCHR(f.mode):
        if f.rdev in _MEMORY_DEVICES or f.rdev == _TUN or major in _RTC_MAJOR:
            return []
        if major in TTY_MAJORS:
            inside = any(_device(m) == f.device for m in look.mounts if m.fstype == "devpts") or look.own_terminal
            if not inside and not options.shell_job:
                return [fail("terminal", f"{who} at a terminal of its caller's: {f.target}")]
            return []
    return [fail("device", f"{who} of the device {f.rdev[0]}:{f.rdev[1]}: {f.target}")]


def _sockets(look: Look, options: CheckpointOptions) -> list[Finding]:
    found = []
    names = {t.pid: _who(t) for t in look.tasks}
    in_flight = 0
    seen: set[int] = set()
    for s in look.sockets:
        if s.inode in seen:
            continue
        seen.add(s.inode)
        who = f"{names.get(s.pid, s.pid)} has descriptor {s.number}"
        if s.family not in _FAMILIES:
            found.append(fail("socket-protocol", f"{who}: a socket of address family {s.family}"))
        elif s.family == _AF_UNIX:
            if s.peer_outside and not (options.ext_unix_sk and s.kind == _SOCK_DGRAM and s.peer_seen):
                found.append(
                    fail("unix-outside", f"{who}: a unix socket whose other end is outside{f' ({s.name})' if s.name else ''}")
                )
        elif s.family in (_AF_INET, _AF_INET6):
            if s.protocol == _MPTCP:
                found.append(fail("mptcp", f"{who}: an MPTCP socket {s.name}"))
            elif s.protocol == _SCTP or s.protocol not in _PLAIN_PROTOCOLS:
                found.append(fail("socket-protocol", f"{who}: a socket of protocol {s.protocol}"))
            elif s.protocol == _TCP and s.kind == _SOCK_STREAM:
                if s.state in (_TCP_SYN_SENT, _TCP_SYN_RECV, _TCP_NEW_SYN_RECV):
                    in_flight += 1
                elif s.state not in (0, _TCP_LISTEN, _TCP_CLOSE) and not (options.tcp_established or options.tcp_close):
                    found.append(fail("tcp-established", f"{who}: an open TCP connection {s.name}"))
    if in_flight:
        found.append(warn("tcp-in-flight", f"{in_flight} TCP connections are being made"))
    return found


def _device(mount: Mount) -> tuple[int, int]:
    major, _, minor = mount.device.partition(":")
    return int(major), int(minor)


def _mounts(look: Look) -> list[Finding]:
    found = []
    whole = {m.device for m in look.mounts if m.root == "/"}
    found += [fail("message-queue", f"there is a POSIX message queue: {name}") for name in look.message_queues]
    for m in look.mounts:
        if m.mount_point == "/" or m.mount_point in look.known_places:
            continue
        if m.fstype == "fuse" or m.fstype.startswith("fuse.") or (m.fstype not in _KNOWN_FS and not m.source.startswith("/dev/")):
            found.append(fail("mount-type", f"{m.mount_point} is a {m.fstype}, which CRIU cannot mount again"))
        elif m.device not in whole and m.fstype not in ("cgroup", "cgroup2"):
            found.append(
                fail(
                    "mount-source",
                    f"{m.mount_point} is a part ({m.root}) of a file system that the container has nowhere as a whole",
                )
            )
    return found
