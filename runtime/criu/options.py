"""What `checkpoint` and `restore` are told, as values."""

from __future__ import annotations

from enum import IntEnum, IntFlag
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


class NetworkLock(IntEnum):
    """`--network-lock`: how packets are kept out of a frozen container. Source: rpc.proto, criu_network_lock_method."""

    IPTABLES = 1
    NFTABLES = 2
    SKIP = 3


class PreDumpMode(IntEnum):
    """`--pre-dump-mode`: how CRIU reads the memory of a container that runs on. Source: rpc.proto, criu_pre_dump_mode."""

    SPLICE = 1
    READ = 2


class CpuCap(IntFlag):
    """`--cpu-cap`: which abilities of the processor the images demand. Source: CRIU's criu/include/cr_options.h."""

    NONE = 0
    FPU = 1
    CPU = 2
    INS = 4
    ALL = 7
    IMAGE = 8


class CriuOptions(Value):
    """What both have in common. `empty_ns` holds OCI's names of namespaces."""

    image_path: Path
    work_path: Path
    tcp_established: bool = False
    tcp_close: bool = False
    ext_unix_sk: bool = False
    shell_job: bool = False
    file_locks: bool = False
    link_remap: bool = False
    lazy_pages: bool = False
    auto_dedup: bool = False
    page_server: tuple[str, int] | None = None
    empty_ns: tuple[str, ...] = ()
    cgroups_mode: CgroupsMode = CgroupsMode.IGNORE
    network_lock: NetworkLock | None = None  # None: by what is there
    cpu_cap: CpuCap | None = None
    config_file: Path | None = None  # CRIU's own, whose words count more than ours
    debug: bool = False


class CheckpointOptions(CriuOptions):
    """Units: bytes, seconds."""

    parent_path: Path | None = None
    leave_running: bool = False
    tcp_skip_in_flight: bool = False
    status_fd: int | None = None
    pre_dump: bool = False
    pre_dump_mode: PreDumpMode = PreDumpMode.SPLICE
    ghost_limit_bytes: int | None = None  # None: as much as the container's deleted files need
    timeout_s: int | None = None
    memory_fd: int | None = None  # where the memory goes, instead of into the images
    force_irmap: bool = False


class RestoreOptions(CriuOptions):
    skip_file_rwx_check: bool = False
    lsm_profile: str | None = None
    lsm_mount_context: str | None = None
    preserve_fds: int = 0
    drained_fd: int | None = None  # told when all memory of a lazy restore is there
    memory_requests: Path | None = None  # FIFO by which memory is asked for that comes after the restore
    systemd_cgroup: bool = False
    mounted_root: bool = False  # the rootfs is a mount point, at the latest when a hold is told to go
