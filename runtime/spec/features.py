"""The document that `runtime features` prints. Source: OCI runtime specification 1.2, features.md."""

from __future__ import annotations

from typing import Any

from runtime import OCI_VERSION, __version__
from runtime.linux.capability_names import NAMES
from runtime.linux.const import NAMESPACES
from runtime.spec.config import HOOK_NAMES
from runtime.spec.mount_options import ALL
from runtime.spec.seccomp import ACTIONS, ARCHITECTURES, FLAGS, OPERATORS


def document() -> dict[str, Any]:
    """Return what this runtime can carry out, whatever the kernel beneath it has."""
    return {
        "ociVersionMin": "1.0.0",
        "ociVersionMax": OCI_VERSION,
        "hooks": list(HOOK_NAMES),
        "mountOptions": sorted(ALL),
        "linux": {
            "namespaces": sorted(NAMESPACES),
            "capabilities": list(NAMES),
            "cgroup": {"v1": True, "v2": True, "systemd": True, "systemdUser": True, "rdma": True},
            "seccomp": {
                "enabled": True,
                "actions": list(ACTIONS),
                "operators": list(OPERATORS),
                "archs": list(ARCHITECTURES),
                "knownFlags": list(FLAGS),
                "supportedFlags": list(FLAGS),
            },
            "apparmor": {"enabled": True},
            "selinux": {"enabled": True},
            "intelRdt": {"enabled": False},
            "mountExtensions": {"idmap": {"enabled": True}},
        },
        "annotations": {"org.ferry.runtime.version": __version__, "org.ferry.runtime.checkpoint.enabled": "true"},
        "potentiallyUnsafeConfigAnnotations": [],
    }
