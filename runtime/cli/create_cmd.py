"""`runtime create`"""

from __future__ import annotations

from pathlib import Path

import click

from runtime.cli.main import Globals
from runtime.cli.options import console_sender, launch_options
from runtime.container import bundle as bundles
from runtime.container.create import CreateOptions, create
from runtime.process.exec import write_pid_file


@click.command(help="Make a container whose program waits for start.")
@launch_options
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
) -> None:
    options = CreateOptions(no_pivot, no_new_keyring, preserve_fds, g.systemd_cgroup, g.rootless)
    container = create(g.store, container_id, bundles.load(bundle), options, console_sender(console_socket))
    if pid_file:
        write_pid_file(pid_file, container.state.pid)
