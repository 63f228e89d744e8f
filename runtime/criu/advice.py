"""What an error in CRIU's log means for the one who has to do something about it. Pure."""

from __future__ import annotations

import re

# First match wins. The patterns are the texts of CRIU's own messages.
ADVICE: tuple[tuple[str, str], ...] = (
    (r"Connected TCP socket", "the container has open TCP connections: give --tcp-established"),
    (
        r"External socket is used|Can't dump half of stream unix",
        "a unix socket leads out of the container: close it, or give --ext-unix-sk",
    ),
    (r"file locks are hold", "the container holds file locks: give --file-locks"),
    (r"dangling tty|ctty inheritance|shell-job", "the container uses its caller's terminal: give --shell-job"),
    (
        r"Can't lookup mount=\d+ for fd",
        "an open file of the container lies outside of it, most often its stdin, stdout or stderr",
    ),
    (r"ghost file .* increase limit", "a deleted file that is still open is too large"),
    (
        r"io_uring",
        "the container uses io_uring, which CRIU cannot dump: forbid it with sysctl kernel.io_uring_disabled=2",
    ),
    (
        r"Unsupported proto 262",
        "the container uses MPTCP: set net.mptcp.enabled=0 in it, or GODEBUG=multipathtcp=0 for Go",
    ),
    (r"lacks get_rseq_conf", "the kernel cannot tell CRIU about rseq: Linux 5.13 or newer is needed"),
    (r"nested \w+ namespace", "a process of the container made namespaces of its own, which CRIU cannot dump"),
    (r"rt vDSO area|sockets: Can't get 1:16", "this CRIU is too old for this kernel: run scripts/install-criu"),
    (r"CPU (instruction|xsave|capabilities)|FPU feature|xfeatures", "the processors of the two hosts differ too much"),
    (r"has bad (size|mode|build-ID)", "a file that the process has open is not the one that it had at the checkpoint"),
    (r"Can't fork for \d+: File exists", "a process number is taken: the container needs its own pid namespace"),
    (r"Can't bind inet socket", "the container's address is not there"),
    (r"Locking network failed", "CRIU could not lock the network: is nft or iptables installed?"),
    (
        r"Dirty tracking is OFF|Tracking memory is not available",
        "the kernel has no soft-dirty tracking (CONFIG_MEM_SOFT_DIRTY)",
    ),
    (
        r"Unable to freeze cgroup|Timeout reached",
        "a process did not stop in time: is one in uninterruptible sleep (state D)?",
    ),
    (r"No space left on device", "no space for the images"),
    (r"lsm profile|lsm types", "the security label of the process cannot be set on this host"),
)

# Without CAP_SYS_RESOURCE CRIU says this at every start, and goes on.
_HARMLESS = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE")
_ERROR = re.compile(r"Error \(")


def error_lines(log: str, limit: int = 8) -> tuple[str, ...]:
    """Return the log's own error lines, the harmless one left out, at most the first `limit`."""
    lines = [re.sub(r"^\(\d+\.\d+\)\s*", "", line).strip() for line in log.splitlines() if _ERROR.search(line)]
    return tuple(line for line in lines if not _HARMLESS.search(line))[:limit]


def advise(lines: tuple[str, ...]) -> str | None:
    """Return what to do about the first line that is known."""
    for line in lines:
        for pattern, advice in ADVICE:
            if re.search(pattern, line):
                return advice
    return None
