"""`runtime spec`"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click

from runtime.errors import AlreadyExists, ContainerError
from runtime.spec.defaults import default_config, rootless_config


@click.command(help="Write a config.json that runs sh in a rootfs beside it.")
@click.option("-b", "--bundle", type=click.Path(path_type=Path), default=Path(), help="Directory of the bundle.")
@click.option("--rootless", is_flag=True, help="One that an ordinary user can run.")
def command(bundle: Path, rootless: bool) -> None:
    document = rootless_config(os.geteuid(), os.getegid()) if rootless else default_config()
    path = bundle / "config.json"
    try:
        with path.open("x") as f:
            f.write(json.dumps(document, indent="\t") + "\n")
    except FileExistsError:
        raise AlreadyExists(f"file {path} exists", hint="remove it first") from None
    except OSError as e:
        raise ContainerError(f"cannot write {path}: {e.strerror}") from e
