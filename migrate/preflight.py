"""Facts -> findings: whether a move can be made, said before anything is touched. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum

from migrate import places
from migrate.errors import Refused
from migrate.facts import ContainerFacts, HostFacts
from migrate.overlay import Overlay
from migrate.volume import Policy, Volume, is_inside


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
    """Return all findings."""
    findings = [*_hosts(source, target), *_container(container_id, container, target)]
    if container is not None:
        findings += [*_files(container, target), *_volumes(container, target)]
        findings += [*_place(container, source, target), *_network(container, target)]
        findings += _space(container, source, target)
    return findings


def refusals(findings: list[Finding]) -> list[Finding]:
    return [f for f in findings if f.severity == Severity.FAIL]


def _fail(code: str, words: str, remedy: str = "") -> Finding:
    return Finding(code, Severity.FAIL, words, remedy)


def _ok(code: str, words: str) -> Finding:
    return Finding(code, Severity.OK, words)


def _warn(code: str, words: str, remedy: str = "") -> Finding:
    return Finding(code, Severity.WARN, words, remedy)


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
            features = f" with {', '.join(host.criu_features)}" if host.criu_features else ""
            found.append(_ok(f"{side}-criu", f"{name}: CRIU {host.criu_version}{features}, kernel {host.kernel}"))
        if host.images_on not in ("tmpfs", "ramfs"):
            words = f"{name}: the images, which hold the memory's secrets, would be on {host.images_on or 'a disk'} in /run"
            found.append(_warn(f"{side}-images-on-disk", words, "mount a tmpfs at /run/ferry"))
    if (source.hostname, source.boot_id) == (target.hostname, target.boot_id):
        found.append(_fail("same-host", f"{target.hostname} is the host that the container is on", "name another one"))
    return [*found, *_alike(source, target), _clocks(source, target)]


def _alike(source: HostFacts, target: HostFacts) -> list[Finding]:
    found = []
    if source.machine != target.machine:
        found.append(_fail("architecture", f"{source.hostname} is {source.machine}, {target.hostname} is {target.machine}"))
    elif target.cpu_error:
        words = f"the processor of {target.hostname} lacks what {source.hostname}'s has: {target.cpu_error}"
        found.append(_fail("cpu", words, "move it to a host with the same processor, or a newer one"))
    else:
        found.append(_ok("cpu", f"both are {source.machine}, and the processor of {target.hostname} has what is needed"))
    if _version(target.kernel) < _version(source.kernel):
        words = (
            f"the kernel of {target.hostname} is older: {target.kernel}, not {source.kernel}; it may lack what the container uses"
        )
        found.append(_warn("kernel-older", words))
    if target.criu_version and _version(target.criu_version) < _version(source.criu_version):
        words = f"CRIU on {target.hostname} is older: {target.criu_version}; it may not read what {source.criu_version} writes"
        found.append(_fail("criu-older", words, "run scripts/install-criu there"))
    if (source.cgroup == "v2") != (target.cgroup == "v2"):
        words = f"cgroups are {source.cgroup} on {source.hostname} and {target.cgroup} on {target.hostname}"
        found.append(
            _warn("cgroup-version", words, "limits are made anew there; a program that looks at its cgroups sees others")
        )
    else:
        found.append(_ok("cgroup-version", f"cgroups are {target.cgroup} on {target.hostname}"))
    return found


def _version(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(n) for n in re.findall(r"\d+", text)[:2])


def _clocks(source: HostFacts, target: HostFacts) -> Finding:
    offset_s = abs(source.clock_ns - target.clock_ns) / 1e9
    if offset_s <= _CLOCK_WARN_S:
        return _ok("clock-offset", "the clocks of the hosts agree")
    words = f"the clocks of the hosts differ by {offset_s:.1f} s; the container will see its time of day jump"
    return _warn("clock-offset", words, "synchronise both with NTP")


def route(source: str, target: str, unreached: str | None) -> list[Finding]:
    """Return what is to say of the way that the data takes; `unreached` is None where the source was not asked."""
    if unreached is None:
        return []
    if not unreached:
        return [_ok("data-direct", f"data goes from {source} to {target} directly")]
    words = f"data goes through this host, since {source} does not reach {target}: {unreached}"
    return [_warn("data-relayed", words, f"to have it go directly, let `ssh {target}` work on {source} without asking")]


# What no word of a user's makes possible.
_FINAL = {
    "container-unknown", "container-not-running", "container-paused", "container-moving", "container-exists", "move-unfinished",
    "same-host", "source-not-root", "target-not-root", "source-runtime", "target-runtime", "source-criu", "target-criu",
    "architecture", "bundle-exists", "rootfs-outside", "network-exists", "network-bridge", "network-cni", "network-unsupported",
    "network-shared", "volume-unknown", "volume-no-directory", "volume-overlaps", "volume-exists",
    "volume-shared", "network-cni-nft", "overlay-unsupported",
}  # fmt: skip


def ignore(findings: list[Finding], codes: tuple[str, ...]) -> list[Finding]:
    """Make warnings of the failures that the user wants ignored, and sort, failures first. Raises: Refused for what is final."""
    if final := sorted(_FINAL & set(codes)):
        raise Refused(f"{', '.join(final)} cannot be ignored: the move would fail")
    result = [
        replace(f, severity=Severity.WARN, words=f"{f.words} (ignored)") if f.severity == Severity.FAIL and f.code in codes else f
        for f in findings
    ]
    order = [Severity.FAIL, Severity.WARN, Severity.OK]
    return sorted(result, key=lambda f: order.index(f.severity))


def _container(container_id: str, container: ContainerFacts | None, target: HostFacts) -> list[Finding]:
    found = []
    if container is None:
        found.append(_fail("container-unknown", f"container does not exist: {container_id}", "see: runtime list"))
    elif container.moved_by:
        found.append(_fail("container-moving", f"container {container_id} is being moved already, by {container.moved_by}"))
    elif container.unfinished:
        words = f"an earlier move of {container_id} is not over: {container.unfinished}"
        found.append(_fail("move-unfinished", words, f"migrate recover {container.unfinished}"))
    elif container.status == "paused":
        found.append(_fail("container-paused", f"container {container_id} is paused", f"runtime resume {container_id}"))
    elif container.status != "running":
        found.append(_fail("container-not-running", f"container {container_id} is {container.status}, not running"))
    else:
        found.append(_ok("container-running", f"container {container_id} runs, pid {container.pid}"))
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
    if bundle.overlay is not None:
        found += _layers(bundle.overlay, bundle.path, target)
    elif bundle.rootfs_is_mount:
        words = f"the rootfs {bundle.rootfs} is a mount point"
        found.append(_fail("rootfs-mount", words, "only a rootfs that is a plain directory, or an overlay, can be moved"))
    for mount in bundle.mounts_inside:
        words = f"{mount} is mounted inside of the bundle; what is on it would not be copied"
        found.append(_fail("bundle-has-mounts", words, "unmount it, or mount it into the container by config.json"))
    if container.sharers:
        words = f"the bundle is used by other containers, too: {', '.join(container.sharers)}"
        found.append(_fail("bundle-shared", words, "give each container a bundle of its own"))
    if bundle.users:
        words = (
            f"{', '.join(bundle.users)} have files of {bundle.path} open: they will not see what the container writes elsewhere"
        )
        found.append(_warn("bundle-in-use", words, "end them, or ignore this"))
    for source in target.missing_bind_sources:
        words = f"{target.hostname} has no {source}, which the container has mounted"
        found.append(_fail("bind-source-missing", words, "make it there: what is bind-mounted is not copied"))
    spoken_of = {v.source for v in container.volumes}
    for source in bundle.bind_sources:
        if source not in target.missing_bind_sources and source not in spoken_of:
            words = f"{source} is mounted into the container; it is not copied: the container will see {target.hostname}'s"
            found.append(_warn("bind-source", words))
    for path in bundle.namespace_paths:
        found.append(_fail("namespace-path", f"the container joins the namespace {path}, which is of this host"))
    return found


def _layers(overlay: Overlay, bundle: str, target: HostFacts) -> list[Finding]:
    """What is to say of a root that is an overlay."""
    words = f"the rootfs {overlay.root} is an overlay"
    if overlay.unsupported:
        return [_fail("overlay-unsupported", f"{words} with {thing}") for thing in overlay.unsupported]
    try:
        overlay.elsewhere(bundle, str(places.LAYERS))
    except ValueError as e:
        return [_fail("overlay-unsupported", f"{words} that cannot be made on {target.hostname}: {e}")]
    known, missing = len(target.layers), len(set(overlay.digests)) - len(target.layers)
    what = f"{len(overlay.layers)} layers below the container's own; {target.hostname} has {known}"
    return [_ok("overlay", f"{words} of {what}, {missing} are sent")]


def _volumes(container: ContainerFacts, target: HostFacts) -> list[Finding]:
    """What is to say of the bind mounts that the user spoke of."""
    name = target.hostname
    found = [
        _fail("volume-unknown", f"nothing that is mounted into the container is called {v}", "name it by its path there, or here")
        for v in container.unknown_volumes
    ]
    for v in container.volumes:
        what = f"{v.source}, which is mounted at {v.destination}"
        if v.policy == Policy.REFUSE:
            found.append(_fail("volume-refused", f"{what}, is not to be moved", f"--volume {v.destination}=copy moves it along"))
        elif v.policy == Policy.SHARED:
            found.append(_ok("volume", f"{what}, must be the same storage on {name}, which is checked before anything is copied"))
        else:
            found += _copied(v, what, container.bundle.path, target)
    return found


def _copied(v: Volume, what: str, bundle: str, target: HostFacts) -> list[Finding]:
    found, name = [], target.hostname
    if not v.is_plain:
        words = f"{what}, is no directory, is reached by a symbolic link, or is a mount point of its own"
        found.append(_fail("volume-no-directory", words, "only plain directories can be copied: mount that, or one below it"))
    if is_inside(bundle, v.source):
        found.append(_fail("volume-overlaps", f"{what}, overlaps with what is copied anyway", "give each a directory of its own"))
    for mount in v.mounts_inside:
        found.append(_fail("volume-has-mounts", f"{mount} is mounted inside of {what}; what is on it would not be copied"))
    if v.sharers:
        words = f"{what}, is used by other containers, too: {', '.join(v.sharers)}"
        found.append(_fail("volume-shared", words, "what is copied is removed here when the container runs there"))
    if v.users:
        found.append(_warn("volume-in-use", f"{', '.join(v.users)} have files open of {what}", "end them, or ignore this"))
    if v.source in target.existing_volumes:
        found.append(_fail("volume-exists", f"{name} has something at {v.source} already", "move it away there"))
    if v.source in target.full_volumes:
        found.append(_fail("target-space-volume", f"{name} has no space for the {v.size_bytes // _MIB} MiB of {v.source}"))
    return found or [_ok("volume", f"{what}, moves along")]


def _place(container: ContainerFacts, source: HostFacts, target: HostFacts) -> list[Finding]:
    """What the container needs of the host that it is on, besides space."""
    found = []
    needs, name = container.needs, target.hostname
    missing = sorted(set(needs.controllers) - set(target.controllers) - ({"io"} if "blkio" in target.controllers else set()))
    if missing:
        words = f"{name} has no cgroup controller {', '.join(missing)}, on which the container has limits"
        found.append(_fail("cgroup-controller", words, "turn it on there, or take the limit off: runtime update"))
    if lsm := sorted(set(needs.lsm) - set(target.lsm)):
        words = f"the container's processes are labelled by {', '.join(lsm)}, which is not on at {name}"
        found.append(_fail("lsm", words, "move it to a host with the same security module"))
    if "ssh" not in source.tools:
        found.append(_fail("tool-ssh", f"{source.hostname} has no ssh command, which carries the data", "install openssh-client"))
    if needs.network_lock and not {"nft", "iptables-restore"} & set(target.tools):
        words = f"{name} has neither nft nor iptables to lock the network of the container while it is restored"
        found.append(_fail("target-network-lock", words, "install nftables there"))
    for kind in target.missing_filesystems:
        found.append(
            _fail("filesystem", f"{name} has no file system {kind}, which the container has mounted", f"modprobe {kind} there")
        )
    for port in target.ports_in_use:
        kind, _, where = port.partition(" ")
        number = int(where.rpartition(":")[2], 16)
        words = f"{kind} port {number}, on which the container listens in the host's network, is taken on {name}"
        found.append(_fail("port-in-use", words, f"end what has it there: ss -lnp 'sport = {number}'"))
    return found


def _network(container: ContainerFacts, target: HostFacts) -> list[Finding]:
    """What the container's network namespace needs, when it has one that moves along."""
    network, name = container.network, target.hostname
    if network is None:
        return []
    found = []
    for thing in network.unsupported:
        words = f"the network namespace {network.name} has what cannot be made anew on {name}: {thing}"
        found.append(_fail("network-unsupported", words, "take it away, or make the namespace there and use its own tools"))
    if network.sharers:
        words = f"the network namespace {network.name} is used by others, too: {', '.join(network.sharers)}"
        found.append(_fail("network-shared", words, "end them, or give the container a network namespace of its own"))
    if target.network_exists:
        words = f"{name} has a network namespace {network.name} already"
        found.append(_fail("network-exists", words, f"remove it there: ip netns del {network.name}"))
    for cni in sorted({a.network for a in network.attachments} - set(target.cni)):
        words = f"{name} has no CNI network {cni}, which the container is attached to, or not all of its plugins"
        found.append(
            _fail(
                "network-cni",
                words,
                "configure it in /etc/cni/net.d there; its plugins are those of /opt/cni/bin or /usr/lib/cni",
            )
        )
    if network.attachments and "nft" not in target.tools:
        words = f"{name} has no nft to keep an interface silent while CNI's plugins make it"
        found.append(_fail("network-cni-nft", words, "install nftables there"))
    plain = {i.bridge for i in network.interfaces if network.attachment_of(i) is None}
    for bridge in sorted(plain - set(target.bridges)):
        words = f"{name} has no bridge {bridge}, to which the container's network is joined, or one that filters VLANs"
        found.append(_fail("network-bridge", words, f"make it there: ip link add {bridge} type bridge"))
    for address in sorted(set(network.addresses) & set(target.addresses)):
        words = f"{address}, which is the container's, is an address of {name} itself"
        found.append(_fail("network-address", words, "take it away there"))
    if network.has_rules:
        words = f"the firewall rules inside of the network namespace {network.name} do not move along"
        found.append(_warn("network-rules", words, "set them there again"))
    return found or [_ok("network", f"the network moves along: {network.words()}")]


def _inside(path: str, directory: str) -> bool:
    return path.startswith(directory.rstrip("/") + "/")


def _space(container: ContainerFacts, source: HostFacts, target: HostFacts) -> list[Finding]:
    found = []
    bundle = container.bundle
    for host, side in ((source, "source"), (target, "target")):
        # On the target what is shared lies there twice for a moment: as it came, and as CRIU takes it.
        needed = container.memory_bytes + _SLACK_BYTES + (container.shared_bytes if side == "target" else 0)
        if host.images_free_bytes < needed:
            words = (
                f"{host.hostname} has {host.images_free_bytes // _MIB} MiB free in /run for the images; "
                f"the container has {container.memory_bytes // _MIB} MiB of memory, {needed // _MIB} MiB are needed"
            )
            found.append(_fail(f"{side}-space-images", words, "enlarge it: mount -o remount,size=... /run"))
    needed = 2 * container.memory_bytes + container.shared_bytes + _SLACK_BYTES  # the images are memory, too
    if target.memory_free_bytes < needed:
        words = (
            f"{target.hostname} has {target.memory_free_bytes // _MIB} MiB of memory free; "
            f"{needed // _MIB} MiB are needed, for the container and its images"
        )
        found.append(_fail("target-memory", words, "free some memory there"))
    needed = bundle.size_bytes + (bundle.overlay.size_without(target.layers) if bundle.overlay else 0) + _SLACK_BYTES
    if target.bundle_free_bytes < needed:
        words = (
            f"{target.hostname} has {target.bundle_free_bytes // _MIB} MiB free for {bundle.path}; "
            f"{needed // _MIB} MiB are needed"
        )
        found.append(_fail("target-space-bundle", words, "free some space there"))
    if 0 < target.bundle_free_inodes < bundle.entries + 100:
        words = f"{target.hostname} has {target.bundle_free_inodes} inodes free for {bundle.path}, {bundle.entries} are needed"
        found.append(_fail("target-space-inodes", words, "free some files there"))
    if not found:
        found.append(_ok("space", f"{target.hostname} has space and memory for it"))
    return found
