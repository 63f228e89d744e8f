"""`runtime checkpoint`"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from runtime.cli.main import Globals
from runtime.cli.options import controller, criu_options, hold_options, reporting
from runtime.container.container import Container
from runtime.criu.checkpoint import checkpoint
from runtime.criu.options import CgroupsMode, CheckpointOptions


@click.command(help="Dump a running container into an image directory.")
@criu_options
@hold_options
@click.option("--leave-running", is_flag=True, help="Let the container run on afterwards.")
@click.argument("container_id")
@click.pass_obj
def command(
    g: Globals,
    /,
    image_path: Path | None,
    work_path: Path | None,
    leave_running: bool,
    manage_cgroups_mode: str,
    hold: bool,
    control_fd: int | None,
    decision: Path | None,
    container_id: str,
    **flags: Any,
) -> None:
    images = (image_path or Path("checkpoint")).absolute()
    options = CheckpointOptions(
        image_path=images,
        work_path=(work_path or images).absolute(),
        leave_running=leave_running,
        cgroups_mode=CgroupsMode[manage_cgroups_mode.upper()],
        debug=g.debug,
        **flags,
    )
    control = controller(hold, control_fd, decision)
    with reporting(control) as report:
        report.update(checkpoint(Container(g.store, container_id), options, control))
