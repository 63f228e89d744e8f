"""Facts -> findings: whether a move can be made, said before anything is touched. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from migrate.facts import ContainerFacts, HostFacts


class Severity(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """`code` is stable; `words` name the thing; `remedy` says what to do."""

    code: str
    severity: Severity
    words: str
    remedy: str = ""

    def as_dict(self) -> dict[str, str]:
        return {"code": self.code, "severity": str(self.severity), "words": self.words, "remedy": self.remedy}


_MIB = 1 << 20
_CLOCK_WARN_S = 1.0
_SLACK_BYTES = 16 * _MIB
# What `runtime checkpoint --check` says of the host, or of image directories that a move does not use.
_TOLD_OF_HOSTS = {"criu-missing", "criu-version", "kernel-rseq", "ready", "space"}
# Its caller gives a container on this host the file again; on the target it is not there.
_FATAL_ELSEWHERE = {"file-outside"}


def examine(container_id: str, source: HostFacts, container: ContainerFacts | None, target: HostFacts) -> list[Finding]:
    """Return all findings, the failures first."""
    findings = [*_hosts(source, target), *_container(container_id, container, target)]
    if container is not None:
        findings += [*_files(container, target), *_space(container, source, target)]
    order = [Severity.FAIL, Severity.WARN, Severity.OK]
    return sorted(findings, key=lambda f: order.index(f.severity))


def refusals(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity == Severity.FAIL]


def _fail(code: str, words: str, remedy: str = "") -> Finding:
    return Finding(code, Severity.FAIL, words, remedy)


def _hosts(source: HostFacts, target: HostFacts) -> list[Finding]:
    found = []
    for side, host in (("source", source), ("target", target)):
        name = host.hostname
        if host.uid != 0:
            found.append(_fail(f"{side}-not-root", f"the agent on {name} is not root", "log in there as root"))
        if host.runtime_error:
            found.append(_fail(f"{side}-runtime", f"{name}: {host.runtime_error}", "install Ferry there"))
        elif host.criu_error:
            found.append(_fail(f"{side}-criu", f"{name}: {host.criu_error}", "run scripts/install-criu there"))
        else:
            found.append(Finding(f"{side}-criu", Severity.OK, f"{name}: CRIU {host.criu_version}"))
    if (source.hostname, source.boot_id) == (target.hostname, target.boot_id):
        found.append(_fail("same-host", f"{target.hostname} is the host that the container is on", "name another one"))
    if source.machine != target.machine:
        found.append(_fail("architecture", f"{source.hostname} is {source.machine}, {target.hostname} is {target.machine}"))
    if target.cpu_error:
        words = f"the processor of {target.hostname} lacks what {source.hostname}'s has: {target.cpu_error}"
        found.append(_fail("cpu", words, "move it to a host with the same processor, or a newer one"))
    offset_s = abs(source.clock_ns - target.clock_ns) / 1e9
    if offset_s > _CLOCK_WARN_S:
        words = f"the clocks of the hosts differ by {offset_s:.1f} s; the container will see its time of day jump"
        found.append(Finding("clock-offset", Severity.WARN, words, "synchronise both with NTP"))
    return found


def _container(container_id: str, container: ContainerFacts | None, target: HostFacts) -> list[Finding]:
    found = []
    if container is None:
        found.append(_fail("container-unknown", f"container does not exist: {container_id}", "see: runtime list"))
    elif container.moved_by:
        found.append(_fail("container-moving", f"container {container_id} is being moved already, by {container.moved_by}"))
    elif container.status == "paused":
        found.append(_fail("container-paused", f"container {container_id} is paused", f"runtime resume {container_id}"))
    elif container.status != "running":
        found.append(_fail("container-not-running", f"container {container_id} is {container.status}, not running"))
    else:
        found.append(Finding("container-running", Severity.OK, f"container {container_id} runs, pid {container.pid}"))
    if container is not None:
        for f in container.findings:
            if f["code"] not in _TOLD_OF_HOSTS:
                severity = Severity.FAIL if f["code"] in _FATAL_ELSEWHERE else Severity(f["severity"])
                found.append(Finding(f["code"], severity, f["words"], f["remedy"]))
    if target.container_exists:
        remedy = f"delete it there: runtime delete {container_id}"
        found.append(_fail("container-exists", f"{target.hostname} has a container {container_id} already", remedy))
    return found


def _files(container: ContainerFacts, target: HostFacts) -> list[Finding]:
    found = []
    bundle = container.bundle
    if target.bundle_exists and not target.container_exists:
        words = f"{target.hostname} has something at {bundle.path} already"
        found.append(_fail("bundle-exists", words, "move it away there, or delete it"))
    if not _inside(bundle.rootfs, bundle.path):
        words = f"the rootfs {bundle.rootfs} is outside of the bundle {bundle.path}"
        found.append(_fail("rootfs-outside", words, "only bundles with their rootfs inside can be moved"))
    if bundle.rootfs_is_mount:
        words = f"the rootfs {bundle.rootfs} is a mount point"
        found.append(_fail("rootfs-mount", words, "only a rootfs that is a plain directory can be moved"))
    for mount in bundle.mounts_inside:
        words = f"{mount} is mounted inside of the bundle; what is on it would not be copied"
        found.append(_fail("bundle-has-mounts", words, "unmount it, or mount it into the container by config.json"))
    if container.sharers:
        words = f"the bundle is used by other containers, too: {', '.join(container.sharers)}"
        found.append(_fail("bundle-shared", words, "give each container a bundle of its own"))
    for source in target.missing_bind_sources:
        words = f"{target.hostname} has no {source}, which the container has mounted"
        found.append(_fail("bind-source-missing", words, "make it there: what is bind-mounted is not copied"))
    for source in bundle.bind_sources:
        if source not in target.missing_bind_sources:
            words = f"{source} is mounted into the container; it is not copied: the container will see {target.hostname}'s"
            found.append(Finding("bind-source", Severity.WARN, words))
    for path in bundle.namespace_paths:
        found.append(_fail("namespace-path", f"the container joins the namespace {path}, which is of this host"))
    return found


def _inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")


def _space(container: ContainerFacts, source: HostFacts, target: HostFacts) -> list[Finding]:
    found = []
    bundle = container.bundle
    for host, side in ((source, "source"), (target, "target")):
        needed = container.memory_bytes + _SLACK_BYTES
        if host.images_free_bytes < needed:
            words = (
                f"{host.hostname} has {host.images_free_bytes // _MIB} MiB free in /run for the images; "
                f"the container has {container.memory_bytes // _MIB} MiB of memory"
            )
            found.append(_fail(f"{side}-space-images", words, "enlarge it: mount -o remount,size=... /run"))
    needed = bundle.size_bytes + _SLACK_BYTES
    if target.bundle_free_bytes < needed:
        words = (
            f"{target.hostname} has {target.bundle_free_bytes // _MIB} MiB free for {bundle.path}; "
            f"{needed // _MIB} MiB are needed"
        )
        found.append(_fail("target-space-bundle", words, "free some space there"))
    if 0 < target.bundle_free_inodes < bundle.entries + 100:
        words = f"{target.hostname} has {target.bundle_free_inodes} inodes free for {bundle.path}, {bundle.entries} are needed"
        found.append(_fail("target-space-inodes", words, "free some files there"))
    return found
