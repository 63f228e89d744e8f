"""Options that several verbs share, and what they mean."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from runtime.archive.options import ArchiveOptions
from runtime.criu.hold import Controller
from runtime.criu.options import CgroupsMode, CpuCap, NetworkLock
from runtime.errors import ContainerError, HoldAborted, KernelError, UsageError
from runtime.linux.terminal import send_master

F = TypeVar("F", bound=Callable[..., Any])


def launch_options(f: F) -> F:
    """Add what `create`, `run` and `restore` have in common."""
    for option in (
        click.option("-b", "--bundle", type=click.Path(path_type=Path), default=Path(), help="Directory of the bundle."),
        click.option("--console-socket", help="Unix socket that receives the master of the terminal."),
        click.option("--pid-file", help="File for the pid of the container's first process."),
        click.option("--no-pivot", is_flag=True, help="Do not use pivot_root (for a rootfs on ramfs)."),
        click.option("--no-new-keyring", is_flag=True, help="Do not make a new session keyring."),
        click.option("--preserve-fds", type=click.IntRange(0), default=0, help="Pass this many more descriptors on."),
    ):
        f = option(f)
    return f


def console_sender(console_socket: str | None) -> Callable[[int], None] | None:
    """Return what gives a terminal's master to the listener on a socket, or None without a socket."""
    if console_socket is None:
        return None

    def send(master: int) -> None:
        try:
            send_master(console_socket, master, "/dev/ptmx")
        except OSError as e:
            raise KernelError(f"cannot send the terminal to --console-socket {console_socket}", e.errno or 0) from e
        finally:
            os.close(master)

    return send


def signal_number(text: str) -> int:
    """Read `TERM`, `SIGTERM` or `15`. Raises: ContainerError."""
    import signal

    if text.isdigit() and int(text) in signal.valid_signals() | {0}:  # 0 only asks whether it is there
        return int(text)
    name = text.upper().removeprefix("SIG")
    try:
        return signal.Signals[f"SIG{name}"]
    except KeyError:
        raise ContainerError(f"unknown signal {text!r}", hint="give a name such as TERM, or a number") from None


def criu_options(f: F) -> F:
    """Add what `checkpoint` and `restore` have in common."""
    path = click.Path(path_type=Path)
    modes = click.Choice(["soft", "full", "strict", "ignore"])
    for option in (
        click.option("--image-path", type=path, help="Directory of the images (default: checkpoint)."),
        click.option("--work-path", type=path, help="Directory of CRIU's log and statistics."),
        click.option("--tcp-established", is_flag=True, help="Keep open TCP connections."),
        click.option("--tcp-close", is_flag=True, help="Drop open TCP connections: they come back closed."),
        click.option("--ext-unix-sk", is_flag=True, help="Allow unix sockets that lead out of the container."),
        click.option("--shell-job", is_flag=True, help="Allow a terminal of the caller's."),
        click.option("--file-locks", is_flag=True, help="Allow file locks."),
        click.option("--link-remap", is_flag=True, help="Allow open files that have lost the name by which they were opened."),
        click.option("--lazy-pages", is_flag=True, help="Move memory by userfaultfd, page by page as it is needed."),
        click.option("--page-server", metavar="ADDRESS:PORT", callback=_address, help="Where memory goes to, or comes from."),
        click.option("--auto-dedup", is_flag=True, help="Free from the images what newer ones, or the processes, have."),
        click.option(
            "--empty-ns",
            metavar="NAMESPACE",
            multiple=True,
            type=click.Choice(["network"]),
            help="Leave its content out of the images.",
        ),
        click.option(
            "--manage-cgroups-mode", type=modes, default="ignore", show_default=True, help="What CRIU does about cgroups."
        ),
        click.option(
            "--network-lock", type=click.Choice(["iptables", "nftables", "skip"]), help="How packets are kept out meanwhile."
        ),
        cpu_cap_option,
    ):
        f = option(f)
    return f


def cpu_cap_option(f: F) -> F:
    """Add what is demanded of the processor."""
    option = click.option("--cpu-cap", metavar="LIST", hidden=True, callback=_cpu_cap, help="What is demanded of the processor.")
    return option(f)


def criu_values(image_path: Path | None, work_path: Path | None, flags: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of CriuOptions that `criu_options` gave: directories made absolute, names made values."""
    images = (image_path or Path("checkpoint")).absolute()
    lock, mode = flags.pop("network_lock"), flags.pop("manage_cgroups_mode")
    return {
        **flags,
        "image_path": images,
        "work_path": (work_path or images).absolute(),
        "cgroups_mode": CgroupsMode[mode.upper()],
        "network_lock": None if lock is None else NetworkLock[lock.upper()],
    }


def _address(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[str, int] | None:
    if value is None:
        return None
    host, _, port = value.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise click.BadParameter(f"{value!r} is not ADDRESS:PORT")
    return host.strip("[]"), int(port)


def _cpu_cap(ctx: click.Context, param: click.Parameter, value: str | None) -> CpuCap | None:
    if value is None:
        return None
    found = CpuCap.NONE
    for name in value.upper().split(","):
        word, negated = name.removeprefix("^"), name.startswith("^")
        if word not in CpuCap.__members__:
            raise click.BadParameter(f"{name.lower()!r} is none of cpu, fpu, ins, image, all, none")
        found = found & ~CpuCap[word] if negated else found | CpuCap[word]
    return found


def size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read a size such as 4M: K, M and G are powers of 1024."""
    if value is None:
        return None
    digits, factor = value.rstrip("KMGkmg"), 1
    if len(value) - len(digits) == 1:
        factor = 1 << 10 * (" KMG".index(value[-1].upper()))
    if not digits.isdigit():
        raise click.BadParameter(f"{value!r} is no size")
    return int(digits) * factor


def archive_options(f: F) -> F:
    """Add what makes a checkpoint an archive."""
    path = click.Path(path_type=Path)
    for option in (
        click.option("--export", type=path, metavar="FILE", help="Write an archive of the checkpoint and the rootfs."),
        click.option("--compress", type=click.Choice(["zstd", "gzip", "none"]), default="zstd", help="Of an archive."),
        click.option("--base-image", metavar="NAME", help="For an engine that has this image and puts the rootfs on it."),
        click.option("--engine-runtime", metavar="NAME", help="The OCI runtime that the engine is to use (default: this one)."),
        click.option("--ignore-rootfs", is_flag=True, help="Leave the rootfs out of an archive."),
        click.option("--sign-key", type=path, metavar="FILE", help="Sign an archive with this Ed25519 key."),
    ):
        f = option(f)
    return f


def archive_values(flags: dict[str, Any]) -> ArchiveOptions | None:
    """Take what `archive_options` gave out of the flags. Raises: UsageError."""
    path, compression = flags.pop("export"), flags.pop("compress")
    image, runtime = flags.pop("base_image"), flags.pop("engine_runtime")
    without_rootfs, sign_key = flags.pop("ignore_rootfs"), flags.pop("sign_key")
    if path is None:
        if image is not None or runtime is not None or without_rootfs or sign_key is not None:
            raise UsageError("--base-image, --engine-runtime, --ignore-rootfs and --sign-key need --export")
        return None
    runtime = runtime or os.path.abspath(shutil.which(sys.argv[0]) or sys.argv[0])
    return ArchiveOptions(path.absolute(), runtime, image, compression, sign_key, without_rootfs)


def hold_options(f: F) -> F:
    """Add the hold: stay undecided until told."""
    for option in (
        click.option("--hold", is_flag=True, help="Wait for go, and in the end for commit or abort, on the control descriptor."),
        click.option("--control-fd", type=int, help="The control descriptor (default: standard input and output)."),
        click.option("--decision", type=click.Path(path_type=Path), help="File that says commit when the controller is gone."),
    ):
        f = option(f)
    return f


def controller(hold: bool, control_fd: int | None, decision: Path | None) -> Controller | None:
    """Return the controller that --hold asks for. Raises: UsageError."""
    if not hold:
        if control_fd is not None or decision is not None:
            raise UsageError("--control-fd and --decision need --hold")
        return None
    if control_fd is not None:
        try:
            os.fstat(control_fd)
        except OSError as e:
            raise UsageError(f"--control-fd {control_fd} is not open") from e
        return Controller(control_fd, control_fd, decision)
    # The container's stdio must not be the conversation.
    fds = os.dup(0), os.dup(1)
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    return Controller(*fds, decision)


@contextlib.contextmanager
def reporting(control: Controller | None) -> Iterator[dict[str, int]]:
    """Report the end of a held verb: done with the statistics put into the dict, aborted, or the error."""
    stats: dict[str, int] = {}
    try:
        yield stats
    except HoldAborted as e:
        if control is not None:
            control.say("aborted", reason=e.message)
        raise
    except ContainerError as e:
        if control is not None:
            control.say("error", error=e.as_dict())
        raise
    if control is not None:
        control.say("done", stats=stats)
