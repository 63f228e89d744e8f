"""CRIU's own configuration files: what stands in them counts more than what CRIU is asked for here.

    # comment
    tcp-established
    ghost-limit 4M

Source: criu(8), Configuration files.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from runtime.criu.options import CheckpointOptions
from runtime.errors import KernelError
from runtime.values import replace

# What our requests decide; anything else in such a file is its owner's affair.
OURS = frozenset({
    "action-script", "auto-dedup", "cgroup-root", "cgroup-yard", "cpu-cap", "empty-ns", "evasive-devices",
    "ext-unix-sk", "external", "file-locks", "force-irmap", "freeze-cgroup", "ghost-limit", "images-dir",
    "inherit-fd", "join-ns", "lazy-pages", "leave-running", "leave-stopped", "link-remap", "log-file",
    "lsm-mount-context", "lsm-profile", "manage-cgroups", "network-lock", "page-server", "pre-dump-mode",
    "prev-images-dir", "restore-detached", "restore-sibling", "root", "shell-job", "skip-file-rwx-check",
    "skip-in-flight", "skip-mnt", "stream", "tcp-close", "tcp-established", "timeout", "track-mem", "unprivileged",
    "work-dir",
})  # fmt: skip
_RUNC_FILE = Path("/etc/criu/runc.conf")


def named(annotations: Mapping[str, str]) -> Path | None:
    """Return the file that the container's annotation names, else the one for OCI runtimes if it is there."""
    if path := annotations.get("org.criu.config"):
        return Path(path)
    return _RUNC_FILE if _RUNC_FILE.is_file() else None


def with_address(options: CheckpointOptions) -> CheckpointOptions:
    """Have memory be served at the address that was asked for: by its RPC, CRIU takes the port alone and serves everywhere.

    Raises: KernelError.
    """
    if not options.lazy_pages or options.page_server is None:
        return options
    file = options.work_path / "criu.conf"
    try:
        given = options.config_file.read_text() if options.config_file is not None else ""
        file.write_text(f"{given}\naddress {options.page_server[0]}\n")
    except OSError as e:
        raise KernelError(f"cannot write {file}", e.errno or 0) from e
    return replace(options, config_file=file)


def overridden(config_file: Path | None) -> tuple[tuple[str, str], ...]:
    """Return (option, file) for each option of ours that a file sets which CRIU reads."""
    files = [Path("/etc/criu/default.conf"), Path(os.environ.get("HOME", "/root"), ".criu/default.conf")]
    if extra := os.environ.get("CRIU_CONFIG_FILE"):
        files.append(Path(extra))
    if config_file is not None:
        files.append(config_file)
    found = []
    for file in files:
        try:
            text = file.read_text(errors="replace")
        except OSError:
            continue
        found += [(option, str(file)) for option in parse(text) if option in OURS]
    return tuple(found)


def parse(text: str) -> list[str]:
    """Return the names of the options that a configuration file sets. Pure."""
    names = []
    for line in text.splitlines():
        try:
            words = shlex.split(line, comments=True)
        except ValueError:
            words = line.split()
        if words:
            names.append(words[0].lstrip("-").partition("=")[0].removeprefix("no-"))
    return names
