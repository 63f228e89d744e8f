"""The descriptors 0-2 that a container inherits from its caller."""

from __future__ import annotations

import errno
import os

from runtime.process import console
from runtime.spec.config import Process, Spec


def give_stdio(spec: Spec, process: Process) -> None:
    """Let the user of a user namespace own our stdio: from within, nobody could give it away."""
    if os.geteuid() != 0 or process.terminal:
        return
    for m in spec.linux.uid_mappings:
        if m.container_id <= process.user.uid < m.container_id + m.size:
            console.give_stdio(m.host_id + process.user.uid - m.container_id)


def describe_stdio(terminal: bool) -> tuple[str, str, str]:
    """Say what fds 0-2 are, for a restore that must give the container others in their place."""
    if terminal:
        return ("", "", "")
    names = []
    for fd in range(3):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError as e:
            if e.errno != errno.ENOENT:
                raise
            names.append("")
    return (names[0], names[1], names[2])
