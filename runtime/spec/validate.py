"""What a document may say that is wrong, or that this runtime does not have: both are errors, neither is skipped."""

from __future__ import annotations

from typing import Any

from runtime.errors import SpecError, Unsupported
from runtime.linux.capability import NUMBERS
from runtime.linux.const import NAMESPACES
from runtime.spec.config import Spec

# Members of config.json that are not carried out: a document that uses one of them is refused.
UNSUPPORTED = (
    "/process/apparmorProfile",
    "/process/selinuxLabel",
    "/process/scheduler",
    "/process/ioPriority",
    "/process/execCPUAffinity",
    "/linux/uidMappings",
    "/linux/gidMappings",
    "/linux/timeOffsets",
    "/linux/seccomp",
    "/linux/mountLabel",
    "/linux/intelRdt",
    "/linux/personality",
    "/linux/netDevices",
    "/linux/resources/blockIO",
    "/linux/resources/hugepageLimits",
    "/linux/resources/network",
    "/linux/resources/rdma",
    "/linux/resources/memory/kernel",
    "/linux/resources/memory/kernelTCP",
    "/linux/resources/memory/swappiness",
    "/linux/resources/memory/disableOOMKiller",
    "/linux/resources/cpu/burst",
    "/linux/resources/cpu/idle",
    "/linux/resources/cpu/realtimeRuntime",
    "/linux/resources/cpu/realtimePeriod",
)

RLIMITS = frozenset(
    f"RLIMIT_{n}"
    for n in [
        "AS",
        "CORE",
        "CPU",
        "DATA",
        "FSIZE",
        "LOCKS",
        "MEMLOCK",
        "MSGQUEUE",
        "NICE",
        "NOFILE",
        "NPROC",
        "RSS",
        "RTPRIO",
        "RTTIME",
        "SIGPENDING",
        "STACK",
    ]
)


def _lookup(document: Any, pointer: str) -> Any:
    for key in pointer.split("/")[1:]:
        document = document.get(key) if isinstance(document, dict) else None
    return document


def check(spec: Spec, document: Any) -> None:
    """Refuse a document that is wrong or asks for what is not there.

    Raises: SpecError, Unsupported; both name the JSON pointer.
    """
    major = spec.oci_version.partition(".")[0]
    if major != "1":
        raise SpecError(f"/ociVersion: {spec.oci_version!r} is not a version 1 of the specification")
    for pointer in UNSUPPORTED:
        if _lookup(document, pointer):
            raise Unsupported(f"{pointer}: is not supported", hint="remove it from config.json")
    seen: set[str] = set()
    for i, namespace in enumerate(spec.linux.namespaces):
        at = f"/linux/namespaces/{i}/type"
        if namespace.type in ("user", "time"):
            raise Unsupported(f"{at}: {namespace.type} namespaces are not supported")
        if namespace.type not in NAMESPACES:
            raise SpecError(f"{at}: {namespace.type!r} is no namespace type")
        if namespace.type in seen:
            raise SpecError(f"{at}: {namespace.type!r} is listed twice")
        seen.add(namespace.type)
    if "mount" not in seen:
        raise Unsupported("/linux/namespaces: a container without its own mount namespace is not supported")
    if spec.hostname and "uts" not in seen:
        raise SpecError("/hostname: needs a uts namespace in /linux/namespaces")
    for i, mount in enumerate(spec.mounts):
        if not mount.destination:
            raise SpecError(f"/mounts/{i}/destination: must not be empty")
        if "idmap" in mount.options or "ridmap" in mount.options:
            raise Unsupported(f"/mounts/{i}/options: id-mapped mounts are not supported")
    for i, device in enumerate(spec.linux.devices):
        if device.type not in ("c", "u", "b", "p"):
            raise SpecError(f"/linux/devices/{i}/type: {device.type!r} is none of b, c, u, p")
    if spec.process:
        check_process(spec)


def check_process(spec: Spec) -> None:
    """Refuse a process that is wrong. Raises: SpecError naming the JSON pointer."""
    process = spec.process
    assert process is not None
    if not process.cwd.startswith("/"):
        raise SpecError(f"/process/cwd: {process.cwd!r} must be absolute")
    for i, rlimit in enumerate(process.rlimits):
        if rlimit.type not in RLIMITS:
            raise SpecError(f"/process/rlimits/{i}/type: {rlimit.type!r} is no resource limit")
    for name, members in (process.capabilities or {}).items():
        for i, member in enumerate(members):
            if member not in NUMBERS:
                raise SpecError(f"/process/capabilities/{name}/{i}: {member!r} is no capability")
