"""`runtime checkpoint`: dump a container that we froze ourselves, held or not.

The cgroup is frozen by us before CRIU looks at it, and CRIU is told so (freeze_cgroup). That saves CRIU's own wait,
and it is the belt of the hold: whatever happens to this process or to CRIU, the container does not run again before
somebody thaws it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import time
from pathlib import Path
from typing import Any

from runtime.container.container import Container
from runtime.container.lifecycle import require
from runtime.criu import images, mounts, network, request
from runtime.criu.hold import Controller, Decision
from runtime.criu.options import CheckpointOptions
from runtime.criu.request import ContainerFacts
from runtime.criu.session import Session
from runtime.errors import ContainerError, HoldAborted, KernelError
from runtime.linux.const import NAMESPACES


def checkpoint(container: Container, options: CheckpointOptions, controller: Controller | None = None) -> dict[str, Any]:
    """Dump a running container; return CRIU's statistics.

    With a controller, the dump is held until it decides.

    Raises: ContainerError; the container then runs on. HoldAborted when the controller said so.
    """
    images.make(options.image_path)
    images.make(options.work_path)
    with container.store.locked(container.id):
        container.refresh()
        require("checkpoint", container.id, container.status())
        facts, stdio = look(container, rebuild_network=controller is not None)
        images.save_stdio(options.image_path, stdio)
        images.save_notes(options.image_path, {"network": "rebuild" if facts.rebuild_network else "restore"})
        dump = _Dump(container, controller, leave_running=options.leave_running)
        try:
            with Session() as session:
                session.run(
                    "DUMP",
                    request.dump(options, facts),
                    options.image_path,
                    options.work_path,
                    request.DUMP_LOG,
                    dump.on_notify,
                )
        finally:
            dump.let_go()
        if not options.leave_running:
            _wait_dead(container)
    return images.stats(options.work_path, "dump") or images.stats(options.image_path, "dump")


class _Dump:
    """Answers CRIU's notifies, and remembers whether the container is to be thawed at the end."""

    def __init__(self, container: Container, controller: Controller | None, leave_running: bool) -> None:
        self._container, self._controller, self._leave_running = container, controller, leave_running
        self._manager = container.manager()
        self._thaw = self._committed = False

    def on_notify(self, script: str, pid: int, fd: int | None) -> bool:
        if script == "pre-dump":
            self._freeze()
        elif script == "post-dump" and self._controller is not None:
            self._hold(self._controller)
        return True

    def _freeze(self) -> None:
        if self._controller is not None:
            self._controller.say("ready")
            if not self._controller.wait_go():
                raise HoldAborted(f"checkpoint of {self._container.id} was aborted before it began")
        self._thaw = True
        self._manager.freeze()
        if self._controller is not None:
            self._controller.say("frozen")

    def _hold(self, controller: Controller) -> None:
        controller.say("held", pid=self._container.state.pid)
        decision = controller.wait_decision()
        if decision == Decision.LEAVE_FROZEN:
            self._thaw = False
            raise HoldAborted(
                f"the controller of {self._container.id} is gone, but it had decided to commit: the container is left frozen",
                hint=f"when it does not run elsewhere: runtime resume {self._container.id}",
            )
        if decision == Decision.ABORT:
            raise HoldAborted(f"checkpoint of {self._container.id} was aborted: it runs on")
        self._committed = True

    def let_go(self) -> None:
        """Thaw: what CRIU left alive runs on, what it killed dies for good."""
        if self._committed:
            # It runs elsewhere by now: also when CRIU failed to kill it, it must not run here again.
            self._manager.signal_all(signal.SIGKILL)
        if self._thaw:
            with contextlib.suppress(KernelError):
                self._manager.thaw()


def look(container: Container, *, rebuild_network: bool) -> tuple[ContainerFacts, tuple[str, ...]]:
    """Gather what a dump must know; also the names of descriptors 0-2 as the image will have them.

    `rebuild_network` allows a network namespace that holds nothing of its own to be left out of the images: a
    restore by this runtime makes an equal one faster than CRIU dumps and restores it.
    """
    pid = container.state.pid
    bundle = container.bundle()
    binds = mounts.external(bundle.spec, str(bundle.path), container.manager())
    external, stdio = [], []
    for number in range(3):
        name = _stdio_name(pid, number)
        stdio.append(name)
        if name.startswith("file["):
            external.append(name)
    namespaces = []
    for kind in network.NAMESPACE_KEY:
        n = bundle.spec.linux.namespace(kind)
        if n is not None and n.path:
            inode = os.stat(f"/proc/{pid}/ns/{NAMESPACES[kind][1]}").st_ino
            namespaces.append(f"{NAMESPACES[kind][1]}[{inode}]:{network.NAMESPACE_KEY[kind]}")
    only_loopback = _only_loopback(pid)
    rebuild = rebuild_network and only_loopback and network.can_rebuild(bundle.spec)
    if rebuild:
        namespaces.append(f"net[{os.stat(f'/proc/{pid}/ns/net').st_ino}]:{network.NAMESPACE_KEY['network']}")
    facts = ContainerFacts(
        pid=pid,
        rootfs=container.state.rootfs,
        binds=binds,
        external_namespaces=tuple(namespaces),
        external_files=tuple(external),
        freezer_path=container.manager().freezer_path,
        only_loopback=only_loopback,
        rebuild_network=rebuild,
        has_nft=_has("nft"),
        has_iptables=_has("iptables-restore"),
    )
    return facts, tuple(stdio)


def _has(command: str) -> bool:
    return shutil.which(command, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is not None


def _only_loopback(pid: int) -> bool:
    if os.stat(f"/proc/{pid}/ns/net").st_ino == os.stat("/proc/self/ns/net").st_ino:
        return False
    lines = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    return {line.split(":")[0].strip() for line in lines} <= {"lo"}


def _stdio_name(pid: int, number: int) -> str:
    """Name what a descriptor is: a pipe or socket by itself, a file outside the container by its mount and inode."""
    path = f"/proc/{pid}/fd/{number}"
    try:
        target, found = os.readlink(path), os.stat(path)
    except OSError:
        return ""
    if not stat.S_ISREG(found.st_mode):
        return target
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/fdinfo/{number}").read_text().splitlines() if ":" in line)
    mount_id = int(fields["mnt_id"])
    inside = {int(line.split(" ", 1)[0]) for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines()}
    return target if mount_id in inside else f"file[{mount_id:x}:{found.st_ino:x}]"


def _wait_dead(container: Container, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while container.alive() or container.manager().pids():
        if time.monotonic() > deadline:
            raise ContainerError(f"container {container.id} was dumped, but its processes do not end")
        time.sleep(0.001)
