"""`runtime spec`"""

from __future__ import annotations

import json
from pathlib import Path

import click

from runtime.errors import AlreadyExists, ContainerError
from runtime.spec.defaults import default_config


@click.command(help="Write a config.json that runs sh in a rootfs beside it.")
@click.option("-b", "--bundle", type=click.Path(path_type=Path), default=Path(), help="Directory of the bundle.")
def command(bundle: Path) -> None:
    path = bundle / "config.json"
    try:
        with path.open("x") as f:
            f.write(json.dumps(default_config(), indent="\t") + "\n")
    except FileExistsError:
        raise AlreadyExists(f"file {path} exists", hint="remove it first") from None
    except OSError as e:
        raise ContainerError(f"cannot write {path}: {e.strerror}") from e
