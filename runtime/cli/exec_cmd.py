"""`runtime exec`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from runtime.cli.main import Globals
from runtime.cli.options import console_sender
from runtime.container.container import Container
from runtime.container.exec import ExecOptions, execute
from runtime.errors import SpecError, UsageError
from runtime.process.exec import write_pid_file
from runtime.process.foreground import Foreground
from runtime.spec.config import Process
from runtime.spec.parse import parse_process, refuse
from runtime.spec.validate import check_process


@click.command(
    help="Run a process in a container.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.option("--console-socket", help="Unix socket that receives the master of the terminal.")
@click.option("--cwd", help="Working directory.")
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Add to the environment.")
@click.option("-t", "--tty", is_flag=True, help="Give it a terminal.")
@click.option("-u", "--user", metavar="UID[:GID]", help="User to run as.")
@click.option("-g", "--additional-gids", multiple=True, type=int, help="More groups.")
@click.option("-p", "--process", "process_file", type=click.Path(path_type=Path), help="Process document to run.")
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--pid-file", help="File for the pid of the process.")
@click.option("--no-new-privs", is_flag=True, help="Give up gaining privileges.")
@click.option("-c", "--cap", multiple=True, help="Add a capability.")
@click.option("--preserve-fds", type=click.IntRange(0), default=0, help="Pass this many more descriptors on.")
@click.option("--apparmor", metavar="PROFILE", help="AppArmor profile of the process.")
@click.option("--process-label", metavar="LABEL", help="SELinux label of the process.")
@click.option("--cgroup", "cgroups", multiple=True, metavar="[CONTROLLER:]PATH", help="Cgroup below the container's.")
@click.option("--ignore-paused", is_flag=True, help="Also in a paused container.")
@click.argument("container_id")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def command(
    g: Globals,
    console_socket: str | None,
    cwd: str | None,
    env: tuple[str, ...],
    tty: bool,
    user: str | None,
    additional_gids: tuple[int, ...],
    process_file: Path | None,
    detach: bool,
    pid_file: str | None,
    no_new_privs: bool,
    cap: tuple[str, ...],
    preserve_fds: int,
    apparmor: str | None,
    process_label: str | None,
    cgroups: tuple[str, ...],
    ignore_paused: bool,
    container_id: str,
    args: tuple[str, ...],
) -> int:
    options = ExecOptions(
        args=args,
        process=_load(process_file) if process_file else None,
        tty=tty,
        cwd=cwd,
        env=env,
        user=user,
        additional_gids=additional_gids,
        caps=cap,
        no_new_privs=no_new_privs,
        ignore_paused=ignore_paused,
        preserve_fds=preserve_fds,
        apparmor=apparmor,
        process_label=process_label,
        cgroups=_cgroups(cgroups),
    )
    on_console = console_sender(console_socket)
    foreground = None if detach else Foreground()
    if on_console is None and foreground is not None:
        on_console = foreground.take_master
    pid = execute(Container(g.store, container_id), options, on_console)
    if pid_file:
        write_pid_file(pid_file, pid)
    return 0 if foreground is None else foreground.wait(pid)


def _load(path: Path) -> Process:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise SpecError(f"cannot read process document {path}: {e}") from e
    process, problems = parse_process(document)
    refuse([*problems, *(p.removeprefix("/process") for p in check_process(process))], str(path))
    return process


def _cgroups(values: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Read `PATH` or `CONTROLLER[,CONTROLLER]:PATH`."""
    found = []
    for value in values:
        controllers, colon, path = value.rpartition(":")
        if not path:
            raise UsageError(f"--cgroup: {value!r} names no path")
        found += [(c, path) for c in (controllers.split(",") if colon else [""])]
    return tuple(found)
