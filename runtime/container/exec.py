"""`exec`: which process to run, decided from the container's own and the options; then run it."""

from __future__ import annotations

import os
from collections.abc import Callable

from runtime.container.container import Container
from runtime.container.create import without_what_cannot_be_given
from runtime.container.lifecycle import Status, require
from runtime.container.stdio import give_stdio
from runtime.errors import SpecError, UsageError, WrongStatus
from runtime.linux.capability import last_capability
from runtime.linux.process import pidfd_open
from runtime.process import confine
from runtime.process import exec as exec_process
from runtime.spec.config import CAPABILITY_SETS, Process, User
from runtime.values import Value, replace


class ExecOptions(Value):
    args: tuple[str, ...] = ()
    process: Process | None = None
    tty: bool = False
    cwd: str | None = None
    env: tuple[str, ...] = ()
    user: str | None = None
    additional_gids: tuple[int, ...] = ()
    caps: tuple[str, ...] = ()
    no_new_privs: bool = False
    ignore_paused: bool = False
    preserve_fds: int = 0
    apparmor: str | None = None
    process_label: str | None = None
    cgroups: tuple[tuple[str, str], ...] = ()  # (controller or "" for all, path below the container's cgroup)


_MAX_ID = (1 << 31) - 1


def decide(base: Process | None, options: ExecOptions) -> Process:
    """Return the process to run. Pure. Raises: SpecError, UsageError."""
    if options.process is not None:
        return options.process
    if not options.args:
        raise UsageError("process args cannot be empty", hint="runtime exec ID COMMAND [ARG ...]")
    if base is None:
        raise SpecError("the container's config.json has no /process to take defaults from")
    if options.cwd is not None and not options.cwd.startswith("/"):
        raise SpecError(f"--cwd: {options.cwd!r} must be absolute")
    for entry in options.env:
        if "=" not in entry:
            raise SpecError(f"--env: {entry!r} is not NAME=VALUE")
    capabilities = base.capabilities
    if options.caps:
        # As runc: into every set but the ambient one, and into that where it could be inherited.
        have = {s: set((capabilities or {}).get(s, ())) for s in CAPABILITY_SETS}
        for name in ("bounding", "effective", "permitted"):
            have[name] |= set(options.caps)
        capabilities = {s: tuple(sorted(have[s])) for s in CAPABILITY_SETS}
    return replace(
        base,
        args=options.args,
        terminal=options.tty,
        console_size=None,
        cwd=options.cwd or base.cwd,
        env=(*base.env, *options.env),
        user=_user(base.user, options),
        capabilities=capabilities,
        no_new_privileges=base.no_new_privileges or options.no_new_privs,
        apparmor_profile=options.apparmor or base.apparmor_profile,
        selinux_label=options.process_label or base.selinux_label,
    )


def _user(base: User, options: ExecOptions) -> User:
    if not all(0 <= n <= _MAX_ID for n in options.additional_gids):
        raise SpecError(f"uids and gids must be in range 0-{_MAX_ID}")
    if options.user is None:
        return replace(base, additional_gids=(*base.additional_gids, *options.additional_gids))
    uid, _, gid = options.user.partition(":")
    if not uid.isdecimal() or (gid and not gid.isdecimal()):
        raise SpecError(f"--user: {options.user!r} is not UID[:GID]", hint="names are not looked up: give numbers")
    ids = (int(uid), int(gid) if gid else base.gid, *options.additional_gids)
    if not all(0 <= n <= _MAX_ID for n in ids):
        raise SpecError(f"uids and gids must be in range 0-{_MAX_ID}")
    return User(ids[0], ids[1], base.umask, options.additional_gids)


def execute(container: Container, options: ExecOptions, on_console: Callable[[int], None] | None) -> int:
    """Start a process in a container; return its pid. Raises: ContainerError."""
    spec = container.bundle().spec
    process = decide(spec.process, options)
    if process.terminal and on_console is None:
        raise UsageError(
            "cannot allocate a terminal: nobody would hold its other end", hint="with --detach give --console-socket"
        )
    # The lock is held for the look only: what follows may take as long as the container likes, which must not keep
    # others from ending it.
    with container.store.locked(container.id):
        container.refresh()
        status = container.status()
        if not (options.ignore_paused and status == Status.PAUSED):
            require("exec", container.id, status)
        try:
            pidfd = pidfd_open(container.state.pid)
        except ProcessLookupError:
            raise WrongStatus(f"cannot exec in a stopped container: {container.id}") from None
        if not container.alive():  # the number could be another process's by now
            raise WrongStatus(f"cannot exec in a stopped container: {container.id}")
    process = without_what_cannot_be_given(process, spec)
    manager = container.manager()
    give_stdio(spec, process)
    return exec_process.spawn(
        container.state.pid,
        pidfd,
        process,
        options.preserve_fds,
        last_capability(),
        confine.prepare(process, spec.linux),
        f"_ses.{container.id}" if container.state.new_keyring else None,
        lambda pid: manager.apply(pid, options.cgroups, beside=container.state.pid),
        on_console or os.close,
        lambda pid, listener: container.send_listener(pid, listener, str(status)),
    )
