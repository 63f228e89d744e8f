"""Options and facts -> the fields of CRIU's criu_opts, as plain dicts. Pure.

Source: CRIU's images/rpc.proto; the meaning of each field is that of the criu(8) option of its name.
"""

from __future__ import annotations

from typing import Any

from runtime.criu.options import CgroupsMode, CheckpointOptions, RestoreOptions
from runtime.values import Value

# rpc.proto: criu_network_lock_method
LOCK_IPTABLES, LOCK_NFTABLES, LOCK_SKIP = 1, 2, 3

STDIO_FILE, NOTES_FILE = "descriptors.json", "ferry.json"
DUMP_LOG, RESTORE_LOG = "dump.log", "restore.log"
_LOG_WARNINGS, _LOG_ALL = 2, 4


class ContainerFacts(Value):
    """What is seen of a running container before its checkpoint."""

    pid: int
    rootfs: str
    binds: dict[str, str]  # destination -> source on the host
    external_namespaces: tuple[str, ...]  # such as net[4026532000]:network
    external_files: tuple[str, ...]  # such as file[1f:2a]
    freezer_path: str | None
    only_loopback: bool
    rebuild_network: bool
    has_nft: bool
    has_iptables: bool


def network_lock(facts: ContainerFacts, tcp_established: bool) -> int:
    """Choose how CRIU keeps packets out during a dump.

    Nothing can arrive where there is only a loopback interface; there the lock would cost time for nothing.
    """
    if facts.only_loopback and not tcp_established:
        return LOCK_SKIP
    if facts.has_nft:
        return LOCK_NFTABLES
    return LOCK_IPTABLES if facts.has_iptables else LOCK_SKIP


def dump(options: CheckpointOptions, facts: ContainerFacts) -> dict[str, Any]:
    """Return the criu_opts of a DUMP; the directories' descriptors are the session's to add."""
    return {
        **_common(options, DUMP_LOG),
        "pid": facts.pid,
        "leave_running": options.leave_running,
        "root": facts.rootfs,
        "external": [
            *(f"mnt[{destination}]:{destination}" for destination in facts.binds),
            *facts.external_namespaces,
            *facts.external_files,
        ],
        "freeze_cgroup": facts.freezer_path,
        "network_lock": network_lock(facts, options.tcp_established),
    }


def restore(
    options: RestoreOptions,
    rootfs: str,
    binds: dict[str, str],
    inherit: list[tuple[str, int]],
    external_namespaces: tuple[tuple[str, int], ...],
    cgroup_roots: dict[str, str],
) -> dict[str, Any]:
    """Return the criu_opts of a RESTORE. `inherit` is (key of the image, descriptor of the CRIU process)."""
    fields = {
        **_common(options, RESTORE_LOG),
        "root": rootfs,
        "rst_sibling": True,
        "external": [f"mnt[{destination}]:{source}" for destination, source in binds.items()],
        "inherit_fd": [{"key": key, "fd": fd} for key, fd in (*inherit, *external_namespaces)],
    }
    if options.cgroups_mode != CgroupsMode.IGNORE:
        fields["cg_root"] = [{"ctrl": ctrl, "path": path} for ctrl, path in cgroup_roots.items()]
    return fields


def _common(options: CheckpointOptions | RestoreOptions, log: str) -> dict[str, Any]:
    return {
        "log_level": _LOG_ALL if options.debug else _LOG_WARNINGS,
        "log_file": log,
        "notify_scripts": True,
        "tcp_established": options.tcp_established,
        "ext_unix_sk": options.ext_unix_sk,
        "shell_job": options.shell_job,
        "file_locks": options.file_locks,
        "evasive_devices": True,
        "orphan_pts_master": True,
        "manage_cgroups": True,
        "manage_cgroups_mode": int(options.cgroups_mode),
    }
