"""Namespaces that stand outside of the images, and the network namespace that is made anew at a restore.

A network namespace that never had more than its loopback interface, of a container that may not configure it (no
CAP_NET_ADMIN), is the same wherever it is made. CRIU would run ip and iptables half a dozen times to dump and to
restore it, inside the downtime of a move.
"""

from __future__ import annotations

import os
from pathlib import Path

from runtime.linux import const, namespace
from runtime.process.perform import loopback_up
from runtime.spec.config import Spec

# OCI's name of a namespace -> the key under which it goes into the image and comes back at the restore; they are runc's,
# so that each restores what the other dumped.
NAMESPACE_KEY = {"network": "extRootNetNS", "pid": "extRootPidNS"}


def can_rebuild(spec: Spec) -> bool:
    """Say whether the container's network namespace is its own and out of its processes' reach. Pure."""
    own = spec.linux.namespace("network")
    capabilities = spec.process.capabilities if spec.process else None
    may_configure = any("CAP_NET_ADMIN" in names for names in (capabilities or {}).values())
    # One that belongs to the container's user namespace cannot be made from outside.
    return own is not None and not own.path and not may_configure and spec.linux.namespace("user") is None


def make_namespace(spec: Spec) -> int:
    """Make a network namespace as the container's was at its start; return its descriptor. Raises: OSError."""
    before = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    namespace.unshare(const.CLONE_NEWNET)
    try:
        loopback_up()
        for name, value in (spec.linux.sysctl or {}).items():
            if name.startswith("net."):
                Path("/proc/sys", *name.split(".")).write_text(value)
        return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        namespace.setns(before, const.CLONE_NEWNET)
        os.close(before)
