"""`runtime bundle`"""

from __future__ import annotations

from pathlib import Path

import click

_PATH = click.Path(path_type=Path)


@click.group(help="Make bundles out of images, without a container engine.")
def command() -> None:
    pass


@command.command(help="Make a bundle from an OCI image layout, a `docker save` archive, a rootfs tarball, or a directory.")
@click.option("--from", "source", type=_PATH, required=True, help="The image, tarball or directory.")
@click.option("--ref", "reference", metavar="NAME", help="The image's name, where there are several.")
@click.option("--platform", metavar="OS/ARCH", help="The platform, where the image is for several (default: this one).")
@click.option("--layers", type=_PATH, metavar="DIR", help="Share layers between bundles: keep them here, mount an overlay.")
@click.argument("path", type=_PATH)
def create(source: Path, reference: str | None, platform: str | None, layers: Path | None, path: Path) -> None:
    from runtime.image.create import create_bundle

    create_bundle(path, source, reference=reference, platform=platform, layers=layers)


@command.command(help="Mount the overlay of a bundle of shared layers again, as after a reboot.")
@click.argument("path", type=_PATH)
def mount(path: Path) -> None:
    from runtime.image.create import mount_overlay

    mount_overlay(path)


@command.command(help="Remove a bundle, and what its container wrote; shared layers stay.")
@click.argument("path", type=_PATH)
def delete(path: Path) -> None:
    from runtime.image.create import delete_bundle

    delete_bundle(path)
