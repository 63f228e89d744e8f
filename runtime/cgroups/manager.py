"""The cgroups of one container: made, joined, limited, frozen, listed and removed, whatever trees the host has.

A container has one directory in every tree (v1 controllers, named trees, and the v2 tree, also where that has no
controllers), all under the same relative path.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import signal
import time
from pathlib import Path
from typing import Any

from runtime.cgroups import devices, resources, stats
from runtime.cgroups.layout import Hierarchy, Layout, detect
from runtime.errors import ContainerError, KernelError, Unsupported, UsageError
from runtime.linux import bpf
from runtime.linux.procfs import read_cgroup, read_mountinfo
from runtime.spec.resources import DeviceRule, Resources

_FREEZE_TIMEOUT_S = 10.0
_REMOVE_TIMEOUT_S = 5.0


def host_layout() -> Layout:
    """Read how this host's trees are mounted. Raises: ContainerError."""
    return detect(read_mountinfo(), Path("/proc/self/cgroup").read_text())


def container_paths(layout: Layout, cgroups_path: str | None, container_id: str) -> dict[str, str]:
    """Decide the directory of a container in every tree: key of the tree -> path. Pure.

    An absolute cgroupsPath is below the tree's root; a relative one, or none, is below the caller's own cgroup on
    v1, and beside it on v2, where a cgroup with processes cannot have children with controllers.
    """
    wanted = cgroups_path or container_id
    paths = {}
    for h in layout.hierarchies:
        relative = posixpath.normpath("/" + wanted.lstrip("/"))
        if not wanted.startswith("/"):
            parent = h.own_path
            if layout.mode == "v2" and parent != "/":
                parent = posixpath.dirname(parent)
            relative = parent.rstrip("/") + relative
        paths[h.key] = h.mount_point + relative
    return paths


class Manager:
    """Acts on the directories that `container_paths` decided."""

    def __init__(self, layout: Layout, paths: dict[str, str]) -> None:
        self.layout, self.paths = layout, paths

    def _trees(self) -> list[tuple[Hierarchy, Path]]:
        return [(h, Path(self.paths[h.key])) for h in self.layout.hierarchies if h.key in self.paths]

    def _directory(self, controller: str) -> Path | None:
        """Return the container's directory in the tree that carries a controller."""
        h = self.layout.of(controller)
        return Path(self.paths[h.key]) if h and h.key in self.paths else None

    def _on_unified(self, controller: str) -> Path | None:
        """Return the v2 directory where a hybrid host has a controller on that tree, which is then passed down to it."""
        v2, tree = self._directory(""), self.layout.of("")
        if v2 is None or tree is None:
            return None
        top = Path(tree.mount_point)
        with contextlib.suppress(OSError):
            if controller in (top / "cgroup.controllers").read_text().split():
                self._enable_controllers(top, v2)
                return v2
        return None

    def relative_paths(self) -> dict[str, str]:
        """Return the directories relative to their trees: each v1 controller's name, "" for v2 -> path."""
        return {
            name: self.paths[h.key].removeprefix(h.mount_point) or "/"
            for h, _ in self._trees()
            for name in (h.controllers or ("",))
        }

    def bound_at(self, destination: str) -> dict[str, str]:
        """Return where a container without a cgroup namespace has its directories, by the place of its cgroup mount."""
        if self.layout.mode == "v2":
            return {destination: self.paths[""]}
        return {f"{destination}/{h.name}": str(directory) for h, directory in self._trees()}

    @property
    def freezer_path(self) -> str | None:
        """The directory that freezes the container: v1's freezer, else v2's."""
        directory = self._directory("freezer") or self._directory("")
        return str(directory) if directory else None

    def create(self) -> list[str]:
        """Make the directories; return those above them that were missing, too. Idempotent.

        Raises: KernelError; what was made stays for `remove`.
        """
        above: list[str] = []
        for h, directory in self._trees():
            try:
                above += [str(p) for p in reversed(directory.parents) if not p.exists()]
                directory.mkdir(mode=0o755, parents=True, exist_ok=True)
                if "cpuset" in h.controllers:
                    self._fill_cpuset(Path(h.mount_point), directory)
                if h.key == "" and self.layout.mode == "v2":
                    self._enable_controllers(Path(h.mount_point), directory)
            except OSError as e:
                raise KernelError(f"cannot make cgroup {directory}", e.errno or errno.EIO) from e
        return above

    def create_where_allowed(self) -> None:
        """Make the directories that this user may make and use; forget the others. Raises: KernelError."""
        for h, directory in self._trees():
            alone = Manager(self.layout, {h.key: str(directory)})
            try:
                alone.create()
                if not os.access(directory / "cgroup.procs", os.W_OK):
                    raise KernelError(f"cannot use cgroup {directory}", errno.EACCES)
            except KernelError as e:
                if e.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
                with contextlib.suppress(OSError):
                    directory.rmdir()
                del self.paths[h.key]

    @staticmethod
    def _fill_cpuset(top: Path, directory: Path) -> None:
        """Give every level its parent's processors and nodes: an empty cpuset takes no process."""
        levels = [directory, *directory.parents]
        for level in reversed(levels[: levels.index(top)]):
            for file in ("cpuset.cpus", "cpuset.mems"):
                if not (level / file).read_text().strip():
                    (level / file).write_text((level.parent / file).read_text())

    @staticmethod
    def _enable_controllers(top: Path, directory: Path) -> None:
        """Pass the wanted controllers down to `directory`; one that cannot be is missed when a limit needs it."""
        levels = [directory, *directory.parents]
        for level in reversed(levels[1 : levels.index(top) + 1]):
            have = (level / "cgroup.controllers").read_text().split()
            for controller in {"cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"} & set(have):
                with contextlib.suppress(OSError):
                    _put(level / "cgroup.subtree_control", f"+{controller}")

    def apply(self, pid: int, below: tuple[tuple[str, str], ...] = (), beside: int | None = None) -> None:
        """Move a process into the container's cgroups, or into those `below` them: (controller or "" for all, path).

        A v2 cgroup whose container made cgroups in it takes no process: then it joins process `beside` in its own.

        Raises: KernelError; UsageError for a path that leads out of the container's cgroup.
        """
        for h, directory in self._trees():
            place = directory
            for controller, path in below:
                if controller == "" or controller in h.controllers:
                    place = directory / path.lstrip("/")
                    if ".." in Path(path).parts:
                        raise UsageError(f"--cgroup: {path!r} leads out of the container's cgroup")
            try:
                _put(place / "cgroup.procs", str(pid))
            except OSError as e:
                if e.errno == errno.EBUSY and beside is not None and h.key == "":
                    _put(Path(h.mount_point + read_cgroup(beside)[""]) / "cgroup.procs", str(pid))
                    continue
                raise KernelError(f"cannot move process {pid} into cgroup {place}", e.errno or errno.EIO) from e

    def set(self, r: Resources, default_rules: tuple[DeviceRule, ...] = ()) -> None:
        """Write limits. Raises: ContainerError naming the JSON pointer; what was written stays written."""
        for write in resources.v2_writes(r) if self.layout.mode == "v2" else resources.v1_writes(r):
            self._write(write)
        if r.devices or default_rules:
            rules = (*((DeviceRule(False, "a", None, None, "rwm"),) if default_rules else ()), *r.devices, *default_rules)
            if directory := self._directory("devices"):
                for write in resources.v1_device_writes(devices.v1_rules(rules)):
                    self._write(write)
            elif (directory := self._directory("")) is not None:
                try:
                    bpf.attach_device_program(str(directory), devices.v2_program(rules))
                except OSError as e:
                    raise KernelError(f"/linux/resources/devices: cannot attach to {directory}", e.errno or 0) from e

    def update(self, r: Resources, default_rules: tuple[DeviceRule, ...] = ()) -> None:
        """Change limits of a container that lives. Raises: as `set`.

        v1 wants memory+swap at least as high as memory at every moment, so which of the two goes first depends on where
        they are now: what is refused at first is tried once more after the others.
        """
        again = []
        for write in resources.v2_writes(r) if self.layout.mode == "v2" else resources.v1_writes(r):
            try:
                self._write(write)
            except KernelError as e:
                if e.errno not in (errno.EINVAL, errno.EBUSY):
                    raise
                again.append(write)
        for write in again:
            self._write(write)
        if r.devices:
            self.set(Resources(devices=r.devices), default_rules)

    def _write(self, write: resources.Write) -> None:
        directory = self._directory(write.controller) or self._on_unified(write.controller)
        if directory is None:
            raise Unsupported(
                f"{write.why}: this host has no {write.controller or 'v2'} cgroup controller that the container could use",
                hint=f"remove it from config.json, or mount the controller {write.controller}",
            )
        file, value = write.file, write.value
        if write.instead is not None and not (directory / file).exists():
            file, value = write.instead
        try:
            _put(directory / file, value)
        except (FileNotFoundError, PermissionError) as e:
            if (directory / file).exists():
                raise KernelError(f"{write.why}: cannot write {value!r} to {directory / file}", e.errno or 0) from e
            raise Unsupported(
                f"{write.why}: {directory / file} does not exist", hint="the kernel or this cgroup lacks the controller"
            ) from e
        except OSError as e:
            raise KernelError(f"{write.why}: cannot write {value!r} to {directory / file}", e.errno or 0) from e

    def stats(self) -> dict[str, Any]:
        """Return what the container uses, as `events --stats` prints it."""
        v2 = self._directory("")
        if self.layout.mode == "v2" and v2 is not None:
            return stats.v2(v2)
        nowhere = Path("/nonexistent")
        names = ("cpu", "cpuacct", "memory", "pids", "blkio")
        return stats.v1(*(self._directory(name) or nowhere for name in names))

    def cpu_used_ns(self) -> int:
        """Return the processors' time that the container has taken. Units: nanoseconds. Raises: ContainerError."""
        directory = self._directory("cpuacct")
        try:
            if directory is not None:
                return int((directory / "cpuacct.usage").read_text())
            return stats.v2_cpu_used_ns(self._cpu())
        except (OSError, KeyError, ValueError) as e:
            raise Unsupported("this host does not tell how much CPU time the container takes") from e

    def cpu_quota(self) -> tuple[int, int]:
        """Return the processors' time that the container may take in each period, -1 for any, and the period.

        Units: microseconds. Raises: ContainerError.
        """
        directory = self._cpu()
        try:
            if (directory / "cpu.max").exists():
                quota, period = (directory / "cpu.max").read_text().split()
                return -1 if quota == "max" else int(quota), int(period)
            return int((directory / "cpu.cfs_quota_us").read_text()), int((directory / "cpu.cfs_period_us").read_text())
        except OSError as e:
            raise KernelError(f"cannot read the CPU limit in {directory}", e.errno or errno.EIO) from e

    def set_cpu_quota(self, quota_us: int) -> None:
        """Limit the processors' time in each period; -1 is no limit. Units: microseconds. Raises: ContainerError."""
        directory = self._cpu()
        file, value = directory / "cpu.cfs_quota_us", str(quota_us)
        if (directory / "cpu.max").exists():
            file, value = directory / "cpu.max", "max" if quota_us < 0 else str(quota_us)
        try:
            _put(file, value)
        except OSError as e:
            raise KernelError(f"cannot write {value} to {file}", e.errno or errno.EIO) from e

    def _cpu(self) -> Path:
        directory = self._directory("cpu") or self._on_unified("cpu")
        if directory is None:
            raise Unsupported("this host has no cpu cgroup controller that the container could use")
        return directory

    def oom_kills(self) -> int:
        """Return how often the kernel killed a process of the container for want of memory."""
        v1 = self._directory("memory") if self.layout.mode != "v2" else None
        return stats.oom_kills(v1, self._directory(""))

    def memory_usage(self) -> int:
        """Return the memory that the container uses now. Units: bytes."""
        return int(self.stats()["memory"]["usage"]["usage"])

    def freeze(self) -> None:
        """Stop every process of the container; return when all are stopped.

        Raises: ContainerError when they are not within 10 s; then the container is thawed again.
        """
        self._freezer("FROZEN", "1")

    def freeze_soon(self) -> None:
        """Have every process stop before it next runs in user space; does not wait until all have.

        What a tracer holds stopped now counts as frozen only after it was let go. Raises: KernelError.
        """
        directory = Path(self.freezer_path or "")
        v1 = (directory / "freezer.state").exists()
        file, value = ("freezer.state", "FROZEN") if v1 else ("cgroup.freeze", "1")
        try:
            _put(directory / file, value)
        except OSError as e:
            raise KernelError(f"cannot write {value} to {directory / file}", e.errno or errno.EIO) from e

    def thaw(self) -> None:
        """Let the container's processes run. Idempotent. Raises: ContainerError."""
        self._freezer("THAWED", "0")

    def _freezer(self, v1: str, v2: str) -> None:
        if self.freezer_path is None:
            raise ContainerError("this host has no freezer: neither cgroup v1's nor cgroup v2's")
        directory = Path(self.freezer_path)
        file, value = ("freezer.state", v1) if (directory / "freezer.state").exists() else ("cgroup.freeze", v2)
        deadline = time.monotonic() + _FREEZE_TIMEOUT_S
        try:
            while True:
                _put(directory / file, value)
                if self.frozen() == (v2 == "1"):
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(0.001)
            if v2 == "1":
                _put(directory / file, "THAWED" if file == "freezer.state" else "0")
        except OSError as e:
            raise KernelError(f"cannot write {value} to {directory / file}", e.errno or errno.EIO) from e
        raise ContainerError(
            f"cgroup {directory} is not {v1.lower()} after {_FREEZE_TIMEOUT_S:.0f} s",
            hint="a process in uninterruptible sleep (state D) cannot be frozen: see ps",
        )

    def frozen(self) -> bool:
        """Say whether all processes are stopped by the freezer."""
        return self._freezer_says("freezer.state", "FROZEN", "cgroup.events", "frozen 1")

    def told_to_freeze(self) -> bool:
        """Say whether the freezer was told to stop the processes: what a tracer holds counts as frozen only later."""
        return self._freezer_says("freezer.self_freezing", "1", "cgroup.freeze", "1")

    def _freezer_says(self, v1_file: str, v1: str, v2_file: str, v2: str) -> bool:
        if self.freezer_path is None:
            return False
        directory = Path(self.freezer_path)
        with contextlib.suppress(FileNotFoundError):
            return (directory / v1_file).read_text().strip() == v1
        with contextlib.suppress(FileNotFoundError):
            return v2 in (directory / v2_file).read_text()
        return False

    def pids(self) -> list[int]:
        """Return the processes in the container's cgroups and in those below them."""
        found: set[int] = set()
        for _, directory in self._trees():
            for base in _tree(directory):
                with contextlib.suppress(OSError):
                    found.update(int(p) for p in Path(base, "cgroup.procs").read_text().split())
            if found:
                break
        return sorted(found)

    def signal_all(self, number: int) -> None:
        """Send a signal to every process. SIGKILL reaches also those that are being forked meanwhile."""
        v2 = self._directory("")
        if number == signal.SIGKILL and v2 is not None and (v2 / "cgroup.kill").exists():
            _put(v2 / "cgroup.kill", "1")
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def remove(self, above: tuple[str, ...] = ()) -> None:
        """Remove the directories and all below them, and those `above` that nobody else uses by now. Idempotent.

        Raises: KernelError when processes keep one busy for more than 5 s.
        """
        deadline = time.monotonic() + _REMOVE_TIMEOUT_S
        for h, directory in self._trees():
            if str(directory) == h.mount_point:
                continue
            delay = 0.001
            while directory.exists():
                error = _remove_tree(directory)
                if error is None:
                    break
                if time.monotonic() > deadline:
                    raise KernelError(f"cannot remove cgroup {directory}", error)
                time.sleep(delay)
                delay = min(delay * 2, 0.1)
        for path in reversed(above):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _put(path: Path, value: str) -> None:
    """Write a file of a cgroup. Unlike Path.write_text this asks for no creation, which the kernel calls EACCES."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _tree(directory: Path) -> list[str]:
    """Return a cgroup and those below it, parents first. A container may nest them deeper than Python calls nest."""
    found = [str(directory)]
    for base in found:
        with contextlib.suppress(OSError), os.scandir(base) as entries:
            found += [e.path for e in entries if e.is_dir(follow_symlinks=False)]
    return found


def _remove_tree(directory: Path) -> int | None:
    """Remove a cgroup and its children; return an errno while one of them is busy."""
    for base in reversed(_tree(directory)):
        try:
            os.rmdir(base)
        except FileNotFoundError:
            continue
        except OSError as e:
            return e.errno
    return None
