"""What `checkpoint` and `restore` are told, as values."""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path

from runtime.values import Value


class CgroupsMode(IntEnum):
    """`--manage-cgroups-mode`. Source: CRIU's rpc.proto, criu_cg_mode."""

    IGNORE = 0
    NONE = 1
    PROPS = 2
    SOFT = 3
    FULL = 4
    STRICT = 5


class CheckpointOptions(Value):
    image_path: Path
    work_path: Path
    leave_running: bool = False
    tcp_established: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False
    cgroups_mode: CgroupsMode = CgroupsMode.IGNORE
    debug: bool = False


class RestoreOptions(Value):
    image_path: Path
    work_path: Path
    tcp_established: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False
    cgroups_mode: CgroupsMode = CgroupsMode.IGNORE
    systemd_cgroup: bool = False
    debug: bool = False
