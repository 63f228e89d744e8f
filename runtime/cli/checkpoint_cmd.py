"""`runtime checkpoint`"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from runtime import log
from runtime.cli.main import Globals
from runtime.cli.options import (
    archive_options,
    archive_values,
    controller,
    criu_options,
    criu_values,
    hold_options,
    reporting,
    size,
)
from runtime.container.container import Container
from runtime.criu import configfiles
from runtime.criu.checkpoint import check, checkpoint
from runtime.criu.findings import Severity
from runtime.criu.options import CheckpointOptions, PreDumpMode
from runtime.errors import UsageError
from runtime.memory import tracker

NOT_READY = 4


@click.command(help="Dump a running container into an image directory.")
@criu_options
@hold_options
@click.option("--parent-path", type=click.Path(path_type=Path), help="Directory of the dump before this one.")
@click.option("--pre-dump", is_flag=True, help="Write the memory only, and let the container run.")
@click.option("--pre-dump-mode", type=click.Choice(["splice", "read"]), default="splice", hidden=True)
@click.option("--leave-running", is_flag=True, help="Let the container run on afterwards.")
@click.option("--tcp-skip-in-flight", is_flag=True, help="Leave out connections that are being made; this is always done.")
@click.option("--status-fd", type=int, help="Descriptor that gets a NUL when memory can be fetched with --lazy-pages.")
@click.option(
    "--ghost-limit", "ghost_limit_bytes", metavar="SIZE", callback=size, hidden=True, help="Largest deleted file to keep."
)
@click.option("--timeout", "timeout_s", type=click.IntRange(1), hidden=True, help="Seconds until the processes must stand still.")
@click.option("--force-irmap", is_flag=True, hidden=True, help="Search for the names of files that are watched.")
@click.option("--memory-fd", type=int, help="With --hold: descriptor that the memory goes to, while the container runs.")
@archive_options
@click.option("--check", "only_check", is_flag=True, help="Only say what would stand in the way; exit status 4 if it fails.")
@click.option("--json", "as_json", is_flag=True, help="With --check: print findings as JSON.")
@click.argument("container_id")
@click.pass_obj
def command(
    g: Globals,
    /,
    container_id: str,
    image_path: Path | None,
    work_path: Path | None,
    parent_path: Path | None,
    pre_dump_mode: str,
    hold: bool,
    control_fd: int | None,
    decision: Path | None,
    only_check: bool,
    as_json: bool,
    **flags: Any,
) -> int:
    container = Container(g.store, container_id)
    archive = archive_values(flags)
    values = criu_values(image_path, work_path, flags)
    # As runc has it, a relative one counts from the image directory.
    parent = None if parent_path is None else Path(os.path.normpath(values["image_path"] / parent_path))
    config_file = configfiles.named(container.annotations())
    options = CheckpointOptions(
        **values,
        parent_path=parent,
        pre_dump_mode=PreDumpMode[pre_dump_mode.upper()],
        config_file=config_file,
        debug=g.debug,
    )
    if only_check:
        return _print(container, options, as_json)
    if options.status_fd is not None and not options.lazy_pages:
        raise UsageError("--status-fd needs --lazy-pages")
    if options.lazy_pages and options.page_server is None:
        raise UsageError("--lazy-pages needs --page-server: the address to serve the memory at")
    if hold and (options.leave_running or options.lazy_pages):
        raise UsageError("--hold goes with neither --leave-running nor --lazy-pages: what is committed runs elsewhere")
    if options.memory_fd is not None:
        if not hold or options.parent_path is not None or options.page_server is not None or options.pre_dump:
            raise UsageError("--memory-fd needs --hold, and goes with neither --parent-path, --pre-dump nor --page-server")
        if not tracker.supported():
            raise UsageError("--memory-fd: this kernel cannot follow writes to memory", hint="Linux 6.7 on x86-64 can")
    if options.pre_dump and (hold or options.lazy_pages):
        raise UsageError("--pre-dump goes with neither --hold nor --lazy-pages")
    if archive is not None and (hold or options.pre_dump or options.page_server is not None):
        raise UsageError("--export goes with neither --hold, --pre-dump nor --page-server")
    for option, file in configfiles.overridden(config_file):
        log.warning(f"{file} sets {option} for CRIU, which counts more than our options")
    if archive is not None:
        from runtime.archive.write import export

        export(container, options, archive, keep_images=image_path is not None, keep_log=work_path is not None)
        return 0
    control = controller(hold, control_fd, decision)
    with reporting(control) as report:
        report.update(checkpoint(container, options, control))
    return 0


def _print(container: Container, options: CheckpointOptions, as_json: bool) -> int:
    findings = check(container, options)
    if as_json:
        click.echo(json.dumps([f.as_dict() for f in findings], indent=2))
    else:
        for f in findings:
            click.echo(f"{f.severity:4}  {f.words} [{f.code}]{f': {f.remedy}' if f.remedy else ''}")
    return NOT_READY if any(f.severity == Severity.FAIL for f in findings) else 0
