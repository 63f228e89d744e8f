"""Look at this host and its containers: the facts that preflight decides on. Reads only."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from migrate import __version__, command, places
from migrate.errors import MigrateError, RuntimeFailed
from migrate.facts import BundleFacts, ContainerFacts, HostFacts


def host_facts(bundle: str | None, bind_sources: list[str], container: str | None, cpu: str | None) -> HostFacts:
    """Return what is to know of this host, for a container that may come here from one with that processor.

    Raises: MigrateError.
    """
    criu_version, criu_error, runtime_error, own_cpu, cpu_error = "", "", "", "", ""
    try:
        annotations = json.loads(command.run("features"))["annotations"]
        criu_version = annotations.get("org.criu.version", "")
        criu_error = annotations.get("org.criu.error", "")
        if not criu_error:
            own_cpu, cpu_error = _cpu(cpu)
    except MigrateError as e:
        runtime_error = str(e)
    exists = None
    if container is not None and not runtime_error:
        exists = command.state(container) is not None
    missing = [s for s in bind_sources if not os.path.exists(s)]
    return HostFacts(
        hostname=platform.node(),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        machine=platform.machine(),
        kernel=platform.release(),
        version=__version__,
        uid=os.geteuid(),
        runtime_error=runtime_error,
        criu_version=criu_version,
        criu_error=criu_error,
        cpu=own_cpu,
        cpu_error=cpu_error,
        container_exists=bool(exists),
        bundle_exists=bundle is not None and os.path.lexists(bundle),
        images_free_bytes=_free(places.RUN),
        bundle_free_bytes=_free(Path(bundle)) if bundle else 0,
        bundle_free_inodes=_free_inodes(Path(bundle)) if bundle else 0,
        missing_bind_sources=tuple(missing),
        clock_ns=time.time_ns(),
    )


def _cpu(other: str | None) -> tuple[str, str]:
    """Return this host's processor, or what it lacks of another's; "" where CRIU cannot tell, as on arm64."""
    try:
        if not other:
            return command.run("cpu", "dump"), ""
    except RuntimeFailed:
        return "", ""
    try:
        command.run("cpu", "check", given=other)
    except RuntimeFailed as e:
        return "", e.message.splitlines()[-1].strip()
    return "", ""


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def _free(path: Path) -> int:
    return shutil.disk_usage(_existing(path)).free


def _free_inodes(path: Path) -> int:
    return os.statvfs(_existing(path)).f_favail


def container_facts(container: str, flags: list[str]) -> ContainerFacts | None:
    """Return what is to know of a container of this host that would be checkpointed with these flags; None where there is none.

    Raises: MigrateError.
    """
    document = command.state(container)
    if document is None:
        return None
    pids = json.loads(command.run("ps", "--format", "json", container)) if document["status"] != "stopped" else []
    bundle = Path(document["bundle"])
    return ContainerFacts(
        id=container,
        status=document["status"],
        pid=document["pid"],
        memory_bytes=sum(_resident(pid) for pid in pids),
        bundle=bundle_facts(bundle, Path(document["rootfs"])),
        moved_by=_lock_holder(container),
        findings=tuple(command.check(container, flags)) if document["status"] == "running" else (),
        sharers=tuple(c["id"] for c in list_containers() if c["id"] != container and _overlap(c, document)),
    )


def mounts_below(directory: Path) -> list[str]:
    """Return the mount points strictly below a directory."""
    points = [line.split(" ")[4].replace("\\040", " ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    prefix = os.path.realpath(directory).rstrip("/") + "/"
    return sorted(p for p in points if p.startswith(prefix))


def _family(init_pid: int) -> list[Path]:
    """Return the /proc directories of the processes in a container's cgroups, its first process's and those below.

    Asked while the container stands still, when starting a command would be the longest part of it.
    """
    own = Path(f"/proc/{init_pid}/cgroup").read_text().splitlines()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            lines = (entry / "cgroup").read_text(errors="replace").splitlines()
        except OSError:
            continue
        if len(lines) == len(own) and all(a == b or a.startswith(f"{b}/") for a, b in zip(lines, own, strict=True)):
            found.append(entry)
    return found


def shared_mappings(init_pid: int) -> set[tuple[int, int]]:
    """Return (device, inode) of every file that a process of a container has mapped shared and writable."""
    found = set()
    for process in _family(init_pid):
        try:
            lines = (process / "maps").read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[1][1] == "w" and fields[1][3] == "s" and fields[4] != "0":
                major, minor = (int(n, 16) for n in fields[3].split(":"))
                found.add((os.makedev(major, minor), int(fields[4])))
    return found


def _lock_holder(container: str) -> str:
    """Return the id of the move that holds a container's lock, "" when none does."""
    try:
        fd = os.open(places.lock(container), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return ""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.read(fd, 100).decode(errors="replace").strip() or "another move"
    finally:
        os.close(fd)
    return ""


def list_containers() -> list[dict[str, Any]]:
    """Return the state documents of this host's containers. Raises: RuntimeFailed."""
    return json.loads(command.run("list", "--format", "json")) or []


def bundle_facts(bundle: Path, rootfs: Path) -> BundleFacts:
    """Return what is to know of a bundle's files. Raises: MigrateError."""
    try:
        document = json.loads((bundle / "config.json").read_bytes())
    except (OSError, ValueError) as e:
        raise MigrateError(f"cannot read {bundle / 'config.json'}: {e}") from e
    entries, size = _measure(rootfs)
    return BundleFacts(
        path=str(bundle),
        rootfs=str(rootfs),
        rootfs_is_mount=os.path.ismount(rootfs),
        mounts_inside=tuple(m for m in mounts_below(bundle) if m != str(rootfs)),
        entries=entries,
        size_bytes=size,
        bind_sources=tuple(
            os.path.join(bundle, m["source"])
            for m in document.get("mounts") or ()
            if m.get("type") in ("bind", "rbind") or {"bind", "rbind"} & set(m.get("options") or ())
        ),
        namespace_paths=tuple(n["path"] for n in (document.get("linux") or {}).get("namespaces") or () if n.get("path")),
    )


def _overlap(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether the files of one container are, or lie in, those of the other."""
    pairs = [(a[x], b[y]) for a, b in ((one, other), (other, one)) for x in ("bundle", "rootfs") for y in ("bundle", "rootfs")]
    return any(a == b or str(a).startswith(f"{b}/") for a, b in pairs)


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def _measure(root: Path) -> tuple[int, int]:
    entries, size = 0, 0
    seen: set[tuple[int, int]] = set()
    for base, directories, files in os.walk(root):
        for name in (*directories, *files):
            try:
                st = os.lstat(os.path.join(base, name))
            except OSError:
                continue
            entries += 1
            if stat.S_ISREG(st.st_mode) and (st.st_dev, st.st_ino) not in seen:
                seen.add((st.st_dev, st.st_ino))
                size += st.st_blocks * 512
    return entries, size
