"""`runtime cpu`"""

from __future__ import annotations

import base64
from typing import TextIO

import click

from runtime.cli.options import cpu_cap_option
from runtime.criu.options import CpuCap
from runtime.errors import SpecError


@click.group(help="Compare the processors of hosts, as a checkpoint on one and a restore on the other would.")
def command() -> None:
    pass


@command.command(help="Write what this host's processor has, as one line of text.")
@click.argument("file", type=click.File("w"), default="-")
def dump(file: TextIO) -> None:
    from runtime.criu.cpu import dump as dump_cpu

    file.write(base64.b64encode(dump_cpu()).decode() + "\n")


@command.command(help="See whether this host's processor has what another host wrote.")
@cpu_cap_option
@click.argument("file", type=click.File("r"), default="-")
def check(file: TextIO, cpu_cap: CpuCap | None) -> None:
    from runtime.criu.cpu import check as check_cpu

    try:
        image = base64.b64decode(file.read(), validate=False)
    except ValueError as e:
        raise SpecError(f"this is nothing that `runtime cpu dump` has written: {e}") from e
    check_cpu(image, cpu_cap)
