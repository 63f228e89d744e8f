"""User namespaces: id mappings, and descriptors of namespaces that are there only for their mappings."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from runtime.errors import ContainerError, KernelError
from runtime.linux.const import CLONE_NEWUSER
from runtime.linux.process import clone, die_with_parent
from runtime.spec.config import IdMapping


def mapping_text(mappings: tuple[IdMapping, ...]) -> str:
    """Return what /proc/PID/uid_map reads. Source: user_namespaces(7)."""
    return "".join(f"{m.container_id} {m.host_id} {m.size}\n" for m in mappings)


def map_ids(pid: int, uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> None:
    """Write the mappings of the user namespace of another process.

    An ordinary user may map only itself; for more, newuidmap and newgidmap do it by /etc/subuid and /etc/subgid.

    Raises: ContainerError.
    """
    if os.geteuid() != 0:
        alone = len(gids) == 1 and gids[0].size == 1 and gids[0].host_id == os.getegid()
        if alone:
            _write(Path(f"/proc/{pid}/setgroups"), "deny")
        _map_as_user(pid, "gid", gids, alone)
        _map_as_user(pid, "uid", uids, len(uids) == 1 and uids[0].size == 1 and uids[0].host_id == os.geteuid())
        return
    _write(Path(f"/proc/{pid}/gid_map"), mapping_text(gids))
    _write(Path(f"/proc/{pid}/uid_map"), mapping_text(uids))


def _map_as_user(pid: int, kind: str, mappings: tuple[IdMapping, ...], alone: bool) -> None:
    if alone:
        _write(Path(f"/proc/{pid}/{kind}_map"), mapping_text(mappings))
        return
    tool = shutil.which(f"new{kind}map")
    if tool is None:
        raise ContainerError(
            f"/linux/{kind}Mappings: an ordinary user needs new{kind}map to map more than itself", hint="apt install uidmap"
        )
    numbers = [str(n) for m in mappings for n in (m.container_id, m.host_id, m.size)]
    done = subprocess.run([tool, str(pid), *numbers], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContainerError(f"/linux/{kind}Mappings: {done.stderr.strip()}", hint=f"see /etc/sub{kind}")


def _write(path: Path, text: str) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode())
        finally:
            os.close(fd)
    except OSError as e:
        raise KernelError(f"cannot write {text.strip()!r} to {path}", e.errno or 0) from e


def open_with_mappings(uids: tuple[IdMapping, ...], gids: tuple[IdMapping, ...]) -> int:
    """Return the descriptor of a new user namespace with these mappings; nobody is in it. Raises: ContainerError."""
    pid = clone(CLONE_NEWUSER)
    if pid == 0:
        die_with_parent()
        signal.pause()
        os._exit(0)
    try:
        map_ids(pid, uids, gids)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
