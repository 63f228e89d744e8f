"""`exec`: which process to run, decided from the container's own and the options; then run it."""

from __future__ import annotations

import os
from collections.abc import Callable

from runtime.container.container import Container
from runtime.container.lifecycle import Status, require
from runtime.container.stdio import give_stdio
from runtime.errors import SpecError, UsageError
from runtime.linux.capability import last_capability
from runtime.linux.capability_names import NUMBERS
from runtime.process import confine
from runtime.process import exec as exec_process
from runtime.process.identity import check_capabilities
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


def decide(base: Process | None, options: ExecOptions) -> Process:
    """Return the process to run. Pure. Raises: SpecError, UsageError."""
    if options.process is not None:
        return options.process
    if not options.args:
        raise UsageError("process args cannot be empty", hint="runtime exec ID COMMAND [ARG ...]")
    if base is None:
        raise SpecError("the container's config.json has no /process to take defaults from")
    capabilities = base.capabilities
    if options.caps:
        unknown = [c for c in options.caps if c not in NUMBERS]
        if unknown:
            raise SpecError(f"--cap: {unknown[0]!r} is no capability")
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
    if options.user is None:
        return replace(base, additional_gids=(*base.additional_gids, *options.additional_gids))
    uid, _, gid = options.user.partition(":")
    try:
        return User(int(uid), int(gid) if gid else base.gid, base.umask, options.additional_gids)
    except ValueError:
        raise SpecError(f"--user: {options.user!r} is not UID[:GID]", hint="names are not looked up: give numbers") from None


def execute(container: Container, options: ExecOptions, on_console: Callable[[int], None] | None) -> int:
    """Start a process in a container; return its pid. Raises: ContainerError."""
    spec = container.bundle().spec
    process = decide(spec.process, options)
    if process.terminal and on_console is None:
        raise UsageError(
            "cannot allocate a terminal: nobody would hold its other end", hint="with --detach give --console-socket"
        )
    with container.store.locked(container.id):
        container.refresh()
        status = container.status()
        if not (options.ignore_paused and status == Status.PAUSED):
            require("exec", container.id, status)
        if not spec.linux.namespace("user"):
            check_capabilities(process)
        manager = container.manager()
        give_stdio(spec, process)
        return exec_process.spawn(
            container.state.pid,
            process,
            options.preserve_fds,
            last_capability(),
            confine.prepare(process, spec.linux),
            lambda pid: manager.apply(pid, options.cgroups),
            on_console or os.close,
            lambda pid, listener: container.send_listener(pid, listener, str(status)),
        )
