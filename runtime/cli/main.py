"""The global options, the table of verbs, and the one place where an error becomes an exit status."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from runtime import OCI_VERSION, __version__, log
from runtime.container.store import Store, default_root
from runtime.errors import ContainerError
from runtime.values import Value

VERBS = (
    "bundle", "checkpoint", "cpu", "create", "delete", "events", "exec", "features", "kill", "list", "pause", "ps", "restore",
    "resume", "run", "spec", "start", "state", "update",
)  # fmt: skip


class Globals(Value):
    store: Store
    systemd_cgroup: bool
    debug: bool
    rootless: bool


class LazyGroup(click.Group):
    """Knows its verbs by name and imports a verb's file when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = import_module(f"runtime.cli.{name}_cmd").command
        return command


def _version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"runtime version {__version__}\nspec: {OCI_VERSION}")
        ctx.exit()


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--root", type=click.Path(path_type=Path), default=None, help="Directory for the state of containers.")
@click.option("--log", "log_path", metavar="FILE", help="Write the log here instead of to stderr.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--debug", is_flag=True, help="Log what is done.")
@click.option("--systemd-cgroup", is_flag=True, help="Use the systemd cgroup driver.")
@click.option(
    "--rootless",
    type=click.Choice(["true", "false", "auto", "1", "0"]),
    default="auto",
    help="Ignore cgroup permission errors where they are not allowed.",
)
@click.option("--criu", hidden=True, help="Path of criu; $FERRY_CRIU does the same.")
@click.option("-v", "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version.")
@click.pass_context
def cli(
    ctx: click.Context,
    root: Path | None,
    log_path: str | None,
    log_format: str,
    debug: bool,
    systemd_cgroup: bool,
    rootless: str,
    criu: str | None,
) -> None:
    """Run containers according to the OCI runtime specification, and checkpoint and restore them."""
    if criu:
        os.environ["FERRY_CRIU"] = criu
    try:
        log.configure(log_path, log_format, debug)
    except OSError as e:
        raise ContainerError(f"cannot open log file {log_path}: {e.strerror}") from e
    ctx.obj = Globals(Store((root or default_root()).absolute()), systemd_cgroup, debug, _is_rootless(rootless))


def _is_rootless(value: str) -> bool:
    """Say whether cgroups may be done without where they are not allowed: an ordinary user, or root of a user namespace."""
    if value != "auto":
        return value in ("true", "1")
    if os.geteuid() != 0:
        return True
    try:
        return Path("/proc/self/uid_map").read_text().split() != ["0", "0", "4294967295"]
    except OSError:
        return False


def run(argv: list[str]) -> int:
    """Run one verb; return the exit status."""
    try:
        result: Any = cli.main(argv, prog_name="runtime", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as e:
        return e.exit_code
    except click.ClickException as e:
        e.show()
        log.only_to_file(e.format_message())
        return 1
    except click.Abort:
        return 130
    except ContainerError as e:
        log.error(str(e))
        return e.exit_code
    except OSError as e:
        log.error(f"{e.filename or 'system call'}: {e.strerror or e}")
        return 1
    except KeyboardInterrupt:
        return 130
