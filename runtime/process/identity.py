"""Become the user of a process document: groups, user, capabilities, directory, and the command's path.

These are the last steps before execve, the same for a container's first process and for `exec`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat

from runtime.errors import CommandNotExecutable, CommandNotFound, ContainerError, KernelError
from runtime.linux import capability, const
from runtime.linux.capability_names import NAMES
from runtime.linux.mount import openat2
from runtime.linux.process import ioprio_set, no_new_privs, personality, prctl, sched_setattr
from runtime.process.confine import Confinement
from runtime.spec.config import Process
from runtime.values import replace


def grantable(process: Process, *, in_user_namespace: bool) -> tuple[Process, list[str]]:
    """Return the process without the capabilities that cannot be given to it, and their names.

    The specification wants a warning for them, not a failure. The root of a new user namespace has every capability
    that the kernel knows.
    """
    if not process.capabilities:
        return process, []
    known = frozenset(NAMES[: capability.last_capability() + 1])
    have = known if in_user_namespace else known & capability.bounding_set()
    missing = {c for names in process.capabilities.values() for c in names} - have
    kept = {name: tuple(c for c in members if c in have) for name, members in process.capabilities.items()}
    return replace(process, capabilities=kept), sorted(missing)


def limit(pid: int, process: Process) -> None:
    """Set the resource limits and the OOM score of another process, from outside. Raises: KernelError."""
    for r in process.rlimits:
        unlimited = (1 << 64) - 1
        soft, hard = (resource.RLIM_INFINITY if v in (-1, unlimited) else v for v in (r.soft, r.hard))
        try:
            resource.prlimit(pid, getattr(resource, r.type), (soft, hard))
        except (OSError, ValueError) as e:
            number = getattr(e, "errno", None) or errno.EPERM
            raise KernelError(f"cannot set {r.type} to {r.soft}:{r.hard}", number) from e
    if process.oom_score_adj is not None:
        try:
            with open(f"/proc/{pid}/oom_score_adj", "w") as f:
                f.write(str(process.oom_score_adj))
        except OSError as e:
            raise KernelError(f"cannot set oom_score_adj to {process.oom_score_adj}", e.errno or errno.EIO) from e


class Later:
    """Capabilities that are kept until a filter is loaded, which takes CAP_SYS_ADMIN without no_new_privs."""

    def __init__(self, sets: dict[str, frozenset[str]]) -> None:
        self._sets = sets
        have = capability.permitted_set()
        capability.capset(sets["effective"] | {"CAP_SYS_ADMIN"} & have, have, sets["inheritable"])

    def drop(self) -> None:
        """Take on the document's capabilities. Raises: KernelError."""
        try:
            _take_capabilities(self._sets)
        except OSError as e:
            raise KernelError("/process/capabilities: cannot be taken on", e.errno or errno.EIO) from e


def _take_capabilities(sets: dict[str, frozenset[str]]) -> None:
    capability.capset(*(sets[name] for name in _CLASSIC))
    # What is not both permitted and inheritable cannot be ambient: as other runtimes, leave it out.
    capability.set_ambient(sets["ambient"] & sets["permitted"] & sets["inheritable"])


def become_root() -> None:
    """Become the root of the user namespace that we are in, where its mappings have one."""
    with contextlib.suppress(PermissionError):  # setgroups is denied to ordinary users
        os.setgroups([])
    with contextlib.suppress(OSError):
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)


def _take_attributes(process: Process, domain: str | None) -> None:
    """Take on what is neither user nor capability. Raises: KernelError naming the JSON pointer."""
    s = process.scheduler
    what = ""
    try:
        if s is not None:
            what = "/process/scheduler"
            sched_setattr(s.policy, s.flags, s.nice, s.priority, s.runtime_ns, s.deadline_ns, s.period_ns)
        if process.io_priority is not None:
            what = "/process/ioPriority"
            ioprio_set(*process.io_priority)
        if domain is not None:
            what = "/linux/personality"
            personality(domain)
    except OSError as e:
        raise KernelError(f"{what} cannot be set", e.errno or errno.EIO) from e


def become(process: Process, last_capability: int, confinement: Confinement) -> Later | None:
    """Take on the user, groups and capabilities of `process`, and go to its directory.

    Returns what is left to be done after a filter was loaded that takes a capability to load.

    Raises: ContainerError; then this process is fit for nothing but to end.
    """
    sets = {name: frozenset((process.capabilities or {}).get(name, ())) for name in ("bounding", *_CLASSIC, "ambient")}
    user = process.user
    later = None
    _take_attributes(process, confinement.personality)
    try:
        if process.no_new_privileges:
            no_new_privs()
        # Tried first with the rights that we still have, for directories that the user cannot enter from outside.
        moved = _chdir(process.cwd)
        capability.drop_bounding(sets["bounding"], last_capability)
        prctl(const.PR_SET_KEEPCAPS, 1)
        _set_groups(user.additional_gids)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
        prctl(const.PR_SET_KEEPCAPS, 0)
        if confinement.filter is not None and not process.no_new_privileges:
            later = Later(sets)
        else:
            _take_capabilities(sets)
        if not moved:
            os.chdir(process.cwd)
        _check_inside()
        if user.umask is not None:
            os.umask(user.umask)
    except OSError as e:
        raise KernelError(f"cannot become user {user.uid}:{user.gid} in {process.cwd}", e.errno or errno.EIO) from e
    return later


def _set_groups(gids: tuple[int, ...]) -> None:
    try:
        os.setgroups(list(gids))
    except PermissionError:
        # An ordinary user's namespace lets nobody change groups; keeping none beyond one's own is what was asked for.
        if gids:
            raise


_CLASSIC = ("effective", "permitted", "inheritable")


def _chdir(path: str) -> bool:
    try:
        os.chdir(path)
    except PermissionError:
        return False
    return True


def _check_inside() -> None:
    """Refuse a working directory outside the root: a descriptor of the host's that leaked in would lead there."""
    try:
        inside = os.getcwd().startswith("/")
    except FileNotFoundError:
        inside = False
    if not inside:
        raise ContainerError("/process/cwd: is outside the container's root")


def environment(process: Process) -> dict[str, str]:
    """Return the environment for execve: the document's, and HOME from the container's /etc/passwd if it has none."""
    env = dict(e.split("=", 1) for e in process.env if "=" in e)
    if not env.get("HOME"):
        env["HOME"] = _home(process.user.uid)
    return env


_MAX_PASSWD_BYTES = 1 << 20


def _home(uid: int) -> str:
    """Look a home directory up in the container's /etc/passwd, which may be anything: a FIFO, a device, endless."""
    try:
        fd = os.open("/etc/passwd", os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return "/"
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return "/"
        text = os.read(fd, _MAX_PASSWD_BYTES).decode(errors="replace")
    except OSError:
        return "/"
    finally:
        os.close(fd)
    for line in text.splitlines():
        fields = line.split(":")
        if len(fields) > 5 and fields[2] == str(uid):
            return fields[5] or "/"
    return "/"


def find_command(process: Process, env: dict[str, str]) -> str:
    """Return the path that execve will get, looked up as the process itself would.

    Raises: CommandNotFound, CommandNotExecutable, worded as runc words them.
    """
    command = process.args[0]
    if "/" in command:
        _check_executable(command, command)
        return command
    for directory in env.get("PATH", "").split(":"):
        path = f"{directory or '.'}/{command}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            _check_executable(path, command)
            return path
    raise CommandNotFound(f'exec: "{command}": executable file not found in $PATH')


def _check_executable(path: str, command: str) -> None:
    try:
        mode = os.stat(path).st_mode
    except OSError as e:
        raise CommandNotFound(f'exec: "{command}": stat {path}: {(e.strerror or "").lower()}') from e
    if stat.S_ISDIR(mode) or not os.access(path, os.X_OK):
        raise CommandNotExecutable(f'exec: "{command}": permission denied')
    # By a link such as /proc/self/exe it would be our stub, executing itself for ever.
    if _is_magic(path):
        raise CommandNotExecutable(f'exec: "{command}": is the runtime itself')


def _is_magic(path: str) -> bool:
    """Say whether a path leads through one of /proc's links that are no paths. Source: openat2(2)."""
    try:
        os.close(openat2(const.AT_FDCWD, path, os.O_PATH, resolve=const.RESOLVE_NO_MAGICLINKS))
    except OSError as e:
        return e.errno == errno.ELOOP
    return False
