"""What a process gets beside namespaces and cgroups: seccomp filter, security modules' labels, execution domain.

All of it is prepared in the verb, from documents, and taken on in the new process just before execve.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import KernelError, Unsupported
from runtime.spec.config import Linux, Process
from runtime.values import Value

if TYPE_CHECKING:
    from runtime.process import seccomp


class Confinement(Value):
    """`filter` is loaded late; `labels` are (file below /proc/self/attr, text)."""

    filter: seccomp.Filter | None = None
    labels: tuple[tuple[str, str], ...] = ()
    personality: str | None = None


def prepare(process: Process, linux: Linux) -> Confinement:
    """Compile the filter and look whether this kernel has what the labels need. Raises: Unsupported, ContainerError."""
    labels = []
    filter_spec = linux.seccomp
    if process.apparmor_profile and process.apparmor_profile != "unconfined":
        if not _reads("/sys/module/apparmor/parameters/enabled", "Y"):
            raise Unsupported("/process/apparmorProfile: this kernel has no AppArmor", hint="remove it from config.json")
        attribute = "apparmor/exec" if Path("/proc/self/attr/apparmor").is_dir() else "exec"
        labels.append((attribute, f"exec {process.apparmor_profile}"))
    if process.selinux_label:
        if not Path("/sys/fs/selinux/enforce").exists():
            hint = "remove it from config.json"
            raise Unsupported("/process/selinuxLabel: this kernel has no SELinux, or it is off", hint=hint)
        labels.append(("exec", process.selinux_label))
    # A filter that allows everything costs every call something and confines nothing.
    empty = filter_spec is None or (filter_spec.default_action == "SCMP_ACT_ALLOW" and not filter_spec.rules)
    if empty or filter_spec is None:
        return Confinement(None, tuple(labels), linux.personality)
    from runtime.process import seccomp

    return Confinement(seccomp.build(filter_spec), tuple(labels), linux.personality)


def _reads(path: str, text: str) -> bool:
    with contextlib.suppress(OSError):
        return Path(path).read_text().strip() == text
    return False


def open_labels(confinement: Confinement) -> list[tuple[int, str]]:
    """Open the files that take the labels, by the host's /proc: a container's own could be anything."""
    opened = []
    for attribute, text in confinement.labels:
        try:
            opened.append((os.open(f"/proc/thread-self/attr/{attribute}", os.O_WRONLY | os.O_CLOEXEC), text))
        except OSError as e:
            raise KernelError(f"cannot open /proc/thread-self/attr/{attribute}", e.errno or 0) from e
    return opened


def write_labels(opened: list[tuple[int, str]]) -> None:
    """Have execve take on the labels. Raises: KernelError naming the label."""
    for fd, text in opened:
        try:
            os.write(fd, text.encode())
        except OSError as e:
            raise KernelError(f"cannot take on the label {text!r}", e.errno or 0) from e
        os.close(fd)
