"""`runtime run`"""

from __future__ import annotations

import contextlib
from pathlib import Path

import click

from runtime.cli.main import Globals
from runtime.cli.options import console_sender, launch_options
from runtime.container import bundle as bundles
from runtime.container.create import CreateOptions, create
from runtime.errors import ContainerError, NotFound
from runtime.process.exec import write_pid_file
from runtime.process.foreground import Foreground


@click.command(help="Create and start a container; wait for it unless detached.")
@launch_options
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--keep", is_flag=True, help="Do not delete the container when it ends.")
@click.option("--no-subreaper", is_flag=True, help="Accepted; nothing is reaped here but the container itself.")
@click.argument("container_id")
@click.pass_obj
def command(
    g: Globals,
    container_id: str,
    bundle: Path,
    console_socket: str | None,
    pid_file: str | None,
    no_pivot: bool,
    no_new_keyring: bool,
    preserve_fds: int,
    detach: bool,
    keep: bool,
    no_subreaper: bool,
) -> int:
    options = CreateOptions(no_pivot, no_new_keyring, preserve_fds, g.systemd_cgroup, g.rootless)
    loaded = bundles.load(bundle)
    on_console = console_sender(console_socket)
    foreground = None if detach else Foreground()
    if on_console is None and foreground is not None:
        on_console = foreground.take_master
    container = create(g.store, container_id, loaded, options, on_console)
    try:
        if pid_file:
            write_pid_file(pid_file, container.state.pid)
        container.start()
    except ContainerError:
        with contextlib.suppress(ContainerError):
            container.delete(force=True)
        raise
    if foreground is None:
        return 0
    status = foreground.wait(container.state.pid)
    if not keep:
        with contextlib.suppress(NotFound):  # somebody else deleted it
            container.delete(force=True)
    return status
