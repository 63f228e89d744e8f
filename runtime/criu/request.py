"""Options and facts -> the fields of CRIU's criu_opts, as plain dicts. Pure.

Source: CRIU's images/rpc.proto; the meaning of each field is that of the criu(8) option of its name.
"""

from __future__ import annotations

from typing import Any

from runtime.criu.options import CgroupsMode, CheckpointOptions, CpuCap, CriuOptions, NetworkLock, RestoreOptions
from runtime.linux.const import NAMESPACES
from runtime.values import Value, replace

STDIO_FILE, NOTES_FILE = "descriptors.json", "ferry.json"
SHARED_FILE = "memory-shared.json"
DUMP_LOG, RESTORE_LOG, LAZY_LOG = "dump.log", "restore.log", "lazy-pages.log"
CPU_FILE = "cpuinfo.img"
# Instructions that the source had must be there; more may.
CPU_DEMANDED = CpuCap.FPU | CpuCap.INS
_LOG_WARNINGS, _LOG_ALL = 2, 4
_GHOST_LIMIT_BYTES = 1 << 20  # CRIU's own


class ContainerFacts(Value):
    """What is seen of a running container before its checkpoint."""

    pid: int
    rootfs: str
    binds: dict[str, str]  # destination -> source on the host
    external_namespaces: tuple[str, ...]  # such as net[4026532000]:network
    external_files: tuple[str, ...]  # such as file[1f:2a]
    freezer_path: str | None
    ghost_bytes: int  # the largest deleted file that is still open or mapped
    only_loopback: bool
    rebuild_network: bool
    has_nft: bool
    has_iptables: bool
    parent_image: str | None = None  # relative to the image directory


def without_parent(facts: ContainerFacts) -> ContainerFacts:
    """Return the facts for a dump of all the memory."""
    return replace(facts, parent_image=None)


def network_lock(options: CheckpointOptions, facts: ContainerFacts) -> NetworkLock:
    """Choose how CRIU keeps packets out during a dump.

    Nothing can arrive where there is only a loopback interface; there the lock would cost time for nothing.
    """
    if options.network_lock is not None:
        return options.network_lock
    if facts.only_loopback and not options.tcp_established:
        return NetworkLock.SKIP
    if facts.has_nft:
        return NetworkLock.NFTABLES
    return NetworkLock.IPTABLES if facts.has_iptables else NetworkLock.SKIP


def dump(options: CheckpointOptions, facts: ContainerFacts, unasked_fd: int | None = None) -> dict[str, Any]:
    """Return the criu_opts of a DUMP; the directories' descriptors are the session's to add.

    `unasked_fd` is CRIU's end of a connection to a page server that is never asked for anything: the memory goes another way.
    """
    ghost_bytes = options.ghost_limit_bytes
    if ghost_bytes is None:
        ghost_bytes = max(_GHOST_LIMIT_BYTES, facts.ghost_bytes + 1)
    return {
        **_dumping(options, facts, DUMP_LOG),
        "leave_running": options.leave_running,
        "freeze_cgroup": facts.freezer_path,
        "network_lock": int(network_lock(options, facts)),
        "ghost_limit": min(ghost_bytes, 0xFFFFFFFF),
        "lazy_pages": options.lazy_pages or unasked_fd is not None or None,
        **({} if unasked_fd is None else {"ps": {"fd": unasked_fd}}),
        "cpu_cap": int(CPU_DEMANDED if options.cpu_cap is None else options.cpu_cap),
        # A connection that is still being made fails in the worst case, which its maker must expect anyway.
        "tcp_skip_in_flight": True,
    }


def pre_dump(options: CheckpointOptions, facts: ContainerFacts) -> dict[str, Any]:
    """Return the criu_opts of a SINGLE_PRE_DUMP, for kernels that track dirty pages."""
    fields = {**_dumping(options, facts, DUMP_LOG), "pre_dump_mode": int(options.pre_dump_mode), "track_mem": True}
    # CRIU stops the processes for a moment each, by ptrace: that is shorter than the freezer.
    return {**fields, "notify_scripts": None}


def _dumping(options: CheckpointOptions, facts: ContainerFacts, log: str) -> dict[str, Any]:
    return {
        **_common(options, log),
        "pid": facts.pid,
        "root": facts.rootfs,
        "external": [
            *(f"mnt[{destination}]:{destination}" for destination in facts.binds),
            *facts.external_namespaces,
            *facts.external_files,
        ],
        "parent_img": facts.parent_image,
        "track_mem": True if facts.parent_image else None,
        "ps": _address(options),
        "timeout": options.timeout_s,
        "force_irmap": options.force_irmap or None,
    }


def restore(
    options: RestoreOptions,
    rootfs: str,
    binds: dict[str, str],
    inherit: list[tuple[str, int]],
    external_namespaces: tuple[tuple[str, int], ...],
    cgroup_roots: dict[str, str],
    *,
    knows_cpu: bool,
) -> dict[str, Any]:
    """Return the criu_opts of a RESTORE. `inherit` is (key of the image, descriptor of the CRIU process).

    `knows_cpu` says that the images tell of the processor that they were made on.
    """
    cpu = CPU_DEMANDED if options.cpu_cap is None and knows_cpu else options.cpu_cap
    fields = {
        **_common(options, RESTORE_LOG),
        "root": rootfs,
        "rst_sibling": True,
        "external": [f"mnt[{destination}]:{source}" for destination, source in binds.items()],
        "inherit_fd": [{"key": key, "fd": fd} for key, fd in (*inherit, *external_namespaces)],
        "lazy_pages": options.lazy_pages or None,
        "cpu_cap": None if cpu is None else int(cpu),
        # CRIU would look for the terminal at its own stdin, which is given away by then.
        "shell_job": options.shell_job and not any(key.startswith("tty[") for key, _ in inherit),
        "skip_file_rwx_check": options.skip_file_rwx_check or None,
        "network_lock": None if options.network_lock is None else int(options.network_lock),
        "lsm_profile": options.lsm_profile,
        "lsm_mount_context": options.lsm_mount_context,
    }
    if options.cgroups_mode != CgroupsMode.IGNORE:
        fields["cg_root"] = [{"ctrl": ctrl, "path": path} for ctrl, path in cgroup_roots.items()]
    return fields


def _address(options: CriuOptions) -> dict[str, Any] | None:
    if options.page_server is None:
        return None
    return {"address": options.page_server[0], "port": options.page_server[1]}


def _common(options: CriuOptions, log: str) -> dict[str, Any]:
    empty = 0
    for name in options.empty_ns:
        empty |= NAMESPACES[name][0]
    return {
        "log_level": _LOG_ALL if options.debug else _LOG_WARNINGS,
        "log_file": log,
        "notify_scripts": True,
        "tcp_established": options.tcp_established,
        "tcp_close": options.tcp_close,
        "ext_unix_sk": options.ext_unix_sk,
        "shell_job": options.shell_job,
        "file_locks": options.file_locks,
        "link_remap": options.link_remap,
        "auto_dedup": options.auto_dedup or None,
        "empty_ns": empty or None,
        "config_file": None if options.config_file is None else str(options.config_file),
        "evasive_devices": True,
        "orphan_pts_master": True,
        "manage_cgroups": True,
        "manage_cgroups_mode": int(options.cgroups_mode),
    }
