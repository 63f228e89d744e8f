"""What an error in CRIU's log means for the one who has to do something about it: a code of `findings`, and its remedy. Pure."""

from __future__ import annotations

import re

from runtime.criu.findings import REMEDY

# First match wins. The patterns are the texts of CRIU's own messages.
_CODES: tuple[tuple[str, str], ...] = (
    (r"Read \d+ bytes while \d+ expected (on|from) ", "images-damaged"),
    (r"Failed unpacking|pb_read|Can't restore tmpfs content|Can't read mapping page|netns object", "images-damaged"),
    (r"march mismatch", "architecture"),
    (r"Not supported images version|images version", "criu-version"),
    (r"Unsupported proto 262", "mptcp"),
    (r"Unsupported proto|Unsupported socket|Unknown socket collected|unsupported family|Unsupported type", "socket-protocol"),
    (r"Connected TCP socket|tcp-established", "tcp-established"),
    (r"External socket is used|Can't dump half of stream unix|Connection to external", "unix-outside"),
    (r"file locks are hold", "file-locks"),
    (r"dangling tty|path=/dev/(pts/|tty|console)|ctty inheritance|shell-job|tty: Found|Can't find slave peer", "terminal"),
    (r"ghost file .* increase limit|ghost-limit", "ghost-file"),
    (r"link-remap|Can't create link remap|Can't dump linked remap", "link-remap"),
    (r"Can't dump that handle|Handle 0x[0-9a-f]+:0x[0-9a-f]+ cannot be opened", "inotify-overlay"),
    (r"io_uring", "io-uring"),
    (r"Unknown shit|anon_inode:", "anonymous-inode"),
    (r"lacks get_rseq_conf", "kernel-rseq"),
    (r"doesn't belong to the target user namespace", "namespace-owner"),
    (r"nested \w+ namespace", "namespace-nested"),
    (r"Can't get rlimit", "resource-capability"),
    (r"mqueue isn't empty", "message-queue"),
    (r"uprobes", "uprobes"),
    (r"rt vDSO area|sockets: Can't get 1:16|Can't find vDSO area|[Mm]agic doesn't match", "criu-version"),
    (r"CPU (instruction|xsave|capabilities)|FPU feature|xfeatures|cpu: ", "cpu"),
    (r"has bad (size|mode|build-ID)|Can't open file .* on restore|Can't open file .*No such file", "file-mismatch"),
    (r"Can't fork for \d+: File exists|Can't attach to .*: File exists", "pid-taken"),
    (r"Can't (bind|connect) inet socket", "tcp-address"),
    (r"Locking network failed", "network-lock"),
    (r"Dirty tracking is OFF|Tracking memory is not available", "memory-tracking"),
    (r"Unable to freeze cgroup|Timeout reached", "freeze"),
    (r"No space left on device", "space"),
    (r"lsm profile|lsm types|LSM specified", "lsm"),
    (r"connect to lazy-pages", "lazy-socket"),
    (r"page-pipe: splice|page-pipe: Can't", "lazy-limits"),
    (r"doesn't have a proper root mount|has unreachable sharing|Can't lookup mount=", "mount-source"),
    (r"FS mnt .* unsupported|unsupported fs", "mount-type"),
    (r"Chr file .* unsupported|Unsupported device|char device|of that type .*\((chr|blk) ", "device"),
    (r"parent_img|[Oo]pen parent|No parent image", "parent"),
)

# CRIU says this at every start where it may not raise its own limit or make a tun device, and goes on.
_HARMLESS = re.compile(r"rlimit: Can't setup RLIMIT_NOFILE|tun: Unable to create tun")
_ERROR = re.compile(r"Error \(")


def error_lines(log: str, limit: int = 8) -> tuple[str, ...]:
    """Return the log's own error lines, the harmless one left out, at most the first `limit`."""
    lines = [re.sub(r"^\(\d+\.\d+\)\s*", "", line).strip() for line in log.splitlines() if _ERROR.search(line)]
    return tuple(line for line in lines if not _HARMLESS.search(line))[:limit]


def code(lines: tuple[str, ...]) -> str | None:
    """Return the code of the first line that is known."""
    for line in lines:
        for pattern, found in _CODES:
            if re.search(pattern, line):
                return found
    return None


def advise(lines: tuple[str, ...]) -> str | None:
    """Return what to do about the first line that is known, and its code."""
    found = code(lines)
    return f"{REMEDY[found]} [{found}]" if found is not None and REMEDY[found] else None
