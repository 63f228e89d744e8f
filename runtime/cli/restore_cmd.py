"""`runtime restore`"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from runtime import log
from runtime.cli.main import Globals
from runtime.cli.options import (
    console_sender,
    controller,
    criu_options,
    criu_values,
    hold_options,
    launch_options,
    reporting,
)  # fmt: skip
from runtime.container import bundle as bundles
from runtime.container.store import Store
from runtime.criu import configfiles, images
from runtime.criu.options import RestoreOptions
from runtime.criu.restore import final_stats, restore
from runtime.errors import AlreadyExists, ContainerError, NotFound, UsageError
from runtime.process.exec import write_pid_file
from runtime.process.foreground import Foreground

_PATH = click.Path(path_type=Path)


@click.command(help="Make a container out of an image directory, and let it run on.")
@launch_options
@criu_options
@hold_options
@click.option("-d", "--detach", is_flag=True, help="Leave it running in the background.")
@click.option("--lsm-profile", metavar="TYPE:NAME", help="Security profile instead of the one at the checkpoint.")
@click.option("--lsm-mount-context", metavar="CONTEXT", help="Mount context instead of the one at the checkpoint.")
@click.option("--skip-file-rwx-check", is_flag=True, hidden=True, help="Do not compare the modes of open files.")
@click.option("--import", "archive", type=_PATH, metavar="FILE", help="Take images and files from an archive.")
@click.option("--from", "base", type=_PATH, metavar="IMAGE", help="With --import: the base image (archive, layout, tarball).")
@click.option("--verify-key", type=_PATH, metavar="FILE", help="With --import: refuse what none of these keys has signed.")
@click.option("--wipe", is_flag=True, help="Destroy the images when they are not needed any more.")
@click.option("--drained-fd", type=int, help="Descriptor that a line of JSON goes to when all memory of a lazy restore is there.")
@click.option("--memory-requests", type=_PATH, metavar="FIFO", help="Where memory is asked for that comes after the restore.")
@click.option("--mounted-root", is_flag=True, help="The rootfs is a mount point; with --hold it need not be one before `go`.")
@click.option("--no-subreaper", is_flag=True, help="Accepted; nothing is reaped here but the container itself.")
@click.argument("container_id")
@click.pass_obj
def command(
    g: Globals,
    /,
    container_id: str,
    bundle: Path,
    console_socket: str | None,
    pid_file: str | None,
    no_pivot: bool,
    no_new_keyring: bool,
    preserve_fds: int,
    image_path: Path | None,
    work_path: Path | None,
    hold: bool,
    control_fd: int | None,
    decision: Path | None,
    detach: bool,
    no_subreaper: bool,
    wipe: bool,
    drained_fd: int | None,
    memory_requests: Path | None,
    mounted_root: bool,
    archive: Path | None,
    base: Path | None,
    verify_key: Path | None,
    **flags: Any,
) -> int:
    with _imported(g.store, archive, base, verify_key, bundle, container_id, image_path, wipe) as (bundle, image_path, wipe):
        loaded = bundles.load(bundle)
        config_file = configfiles.named(loaded.spec.annotations)
        options = RestoreOptions(
            **criu_values(image_path, work_path, flags),
            preserve_fds=preserve_fds,
            drained_fd=drained_fd,
            memory_requests=memory_requests,
            mounted_root=mounted_root,
            config_file=config_file,
            systemd_cgroup=g.systemd_cgroup,
            debug=g.debug,
        )
        for option, file in configfiles.overridden(config_file):
            log.warning(f"{file} sets {option} for CRIU, which counts more than our options")
        on_console = console_sender(console_socket)
        foreground = None if detach or hold else Foreground()
        if on_console is None and foreground is not None:
            on_console = foreground.take_master
        control = controller(hold, control_fd, decision)
        with reporting(control) as report:
            container = restore(g.store, container_id, loaded, options, on_console, control, wipe=wipe)
            if pid_file:
                try:
                    write_pid_file(pid_file, container.state.pid)
                except BaseException:
                    container.delete(force=True)
                    raise
            if control is not None:
                report.update(final_stats(options))
    if foreground is None:
        return 0
    status = foreground.wait(container.state.pid)
    with contextlib.suppress(NotFound):
        container.delete(force=True)
    return status


def _refuse_in_use(store: Store, container_id: str, bundle: Path) -> None:
    """Refuse an import that would change files under a container. Raises: AlreadyExists."""
    place = os.path.realpath(bundle)
    for other in store.ids():
        if other == container_id:
            raise AlreadyExists(f"container with id exists: {container_id}", hint="choose another id, or delete it")
        try:
            state = store.load(other)
        except ContainerError:
            continue  # damaged, or gone by now
        if state.bundle == place or state.rootfs.startswith(f"{place}/"):
            raise AlreadyExists(f"bundle {place} is container {other}'s", hint="name another --bundle")


@contextlib.contextmanager
def _imported(
    store: Store,
    archive: Path | None,
    base: Path | None,
    verify_key: Path | None,
    bundle: Path,
    container_id: str,
    image_path: Path | None,
    wipe: bool,
) -> Iterator[tuple[Path, Path | None, bool]]:
    """Give the bundle, the images, and whether to wipe them: of an archive, if there is one. On failure nothing is left."""
    if archive is None:
        if base is not None or verify_key is not None:
            raise UsageError("--from and --verify-key need --import")
        yield bundle, image_path, wipe
        return
    from runtime.archive.read import Import

    if click.get_current_context().get_parameter_source("bundle") == ParameterSource.DEFAULT:
        bundle = Path(container_id)
    _refuse_in_use(store, container_id, bundle)
    with Import(archive, image_path, verify_key) as imported:
        if not imported.has_digests:
            log.warning(f"{archive} has no digests: whether it is whole is not known")
        try:
            with imported.bundle(bundle.absolute(), base):
                yield bundle, imported.images, wipe or image_path is None
        except BaseException:
            if image_path is None:
                images.wipe(imported.images)
            raise
