"""`runtime restore`: make a container out of images, held or not.

CRIU runs inside the container's new cgroups and in a cgroup namespace of them, so that what it restores is born
there, and in a mount namespace of ours, so that the bind mount of the rootfs that it needs is gone with us.

The hold is at `pre-resume`: all that can fail has been done. But there CRIU does not listen to a no, and resumes the
processes when we die. Therefore the container's cgroup is told to freeze before we hold: the processes cannot run
before somebody thaws it, and to abort we kill them before we answer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runtime.cgroups import systemd
from runtime.cgroups.manager import Manager, container_paths, host_layout
from runtime.container.bundle import Bundle
from runtime.container.container import Container
from runtime.container.create import cgroups_path, owner, systemd_scope, timestamp
from runtime.container.store import Store
from runtime.criu import images, mounts, network, pagemap, request, sharedmem
from runtime.criu import lazy as lazy_module
from runtime.criu.follow import wanted_of
from runtime.criu.hold import Controller, Decision
from runtime.criu.lazy import CriuDaemon, LazyPages, OwnDaemon
from runtime.criu.options import CgroupsMode, RestoreOptions
from runtime.criu.session import Session
from runtime.errors import ContainerError, CriuError, HoldAborted, KernelError, UsageError
from runtime.linux import const, mount, namespace
from runtime.memory.passes import Passes, present
from runtime.process.create import open_namespaces
from runtime.spec.state import State
from runtime.values import replace

_DYING_S = 10.0


def restore(
    store: Store,
    container_id: str,
    bundle: Bundle,
    options: RestoreOptions,
    on_console: Callable[[int], None] | None = None,
    controller: Controller | None = None,
    *,
    wipe: bool = False,
) -> Container:
    """Restore a container from an image directory; its first process becomes our child.

    With a controller, the restored processes are held until it decides. With `wipe` the images are destroyed once nobody
    needs them any more; a daemon of the caller's may need them longer than we know.

    Raises: ContainerError; nothing of the container is then left. HoldAborted when the controller said so.
    """
    if controller is None:
        images.require(options.image_path)
        sharedmem.rebuild(options.image_path, Passes(options.image_path))
        # CRIU never ends a restore that lacks pages. Who holds it has had no images yet, and answers for them.
        pagemap.require_whole(options.image_path)
        _require_memory(options)
    images.make(options.work_path)
    spec = bundle.spec
    preserved = range(3, 3 + options.preserve_fds)
    for fd in preserved:
        try:
            os.set_inheritable(fd, False)
        except OSError as e:
            raise UsageError(f"--preserve-fds {options.preserve_fds}: descriptor {fd} is not open") from e
    if options.drained_fd is not None:
        try:
            os.set_inheritable(options.drained_fd, False)
        except OSError as e:
            raise UsageError(f"--drained-fd {options.drained_fd} is not open") from e
    layout = host_layout()
    scope = systemd_scope(spec, container_id) if options.systemd_cgroup else None
    manager = Manager(layout, container_paths(layout, cgroups_path(spec, scope), container_id))
    joins = _joined_namespaces(bundle)
    with store.made(container_id):
        container = Container(store, container_id)
        made_cgroups = False
        try:
            state = State(
                id=container_id,
                bundle=str(bundle.path),
                rootfs=str(bundle.rootfs),
                created=timestamp(),
                owner=owner(),
                cgroup_paths=manager.paths,
                systemd_unit=(scope.slice, scope.unit) if scope else None,
            )
            store.save(state)
            store.save_config(container_id, bundle.document)
            container.state = state
            if manager.pids():
                raise ContainerError(f"cgroup of container {container_id} holds processes already: {manager.pids()}")
            made_cgroups = True
            # Strict means that CRIU makes the cgroups, and refuses to when they are there.
            makes = options.cgroups_mode != CgroupsMode.STRICT
            if makes and scope is None:
                container.make_cgroups(manager, spec.linux.resources, False)
            root = bundle.rootfs if options.mounted_root else _private_root(bundle.rootfs)
            own_network = network.make_namespace(spec) if network.can_rebuild(spec) else None
            own_cgroups = spec.linux.namespace("cgroup") is not None and options.cgroups_mode == CgroupsMode.IGNORE

            def in_child() -> None:
                if scope is not None:
                    scope.start(os.getpid(), container_id, systemd.properties(spec.linux.resources, unified=layout.mode == "v2"))
                    container.make_cgroups(manager, spec.linux.resources, False)
                if makes:
                    manager.apply(os.getpid())
                if own_cgroups:
                    namespace.unshare(const.CLONE_NEWCGROUP)

            passed = (*(fd for fd, _ in joins), *([] if own_network is None else [own_network]), *preserved)
            memory = Passes(options.image_path)
            with contextlib.ExitStack() as stack, Session(in_child, passed) as session:
                if controller is not None:
                    pagemap.preload()
                    controller.say("ready")
                    if not controller.wait_go(on_idle=lambda: _look_ahead(memory, free=wipe)):
                        raise HoldAborted(f"restore of {container_id} was aborted before it began")
                    images.require(options.image_path)
                    sharedmem.rebuild(options.image_path, memory)
                own = present(options.image_path)
                if own:
                    options = replace(options, lazy_pages=True)
                daemon = (
                    OwnDaemon(options.image_path, options.work_path, memory, options.memory_requests)
                    if own
                    else CriuDaemon(options.image_path, options.work_path, options.page_server)
                )
                lazy = stack.enter_context(_lazy_pages(container, manager, options, daemon, wipe=wipe))
                held = _Restore(container, manager, session.process, on_console, controller, lazy)
                notes = images.load_notes(options.image_path)
                if notes.get("memory") == "sent" and not own:
                    raise _lacks_memory(options)
                names = images.load_stdio(options.image_path) + notes.get("descriptors", [])[3:]
                inherit = [
                    (n, fd)
                    for fd, n in enumerate(names)
                    if n.startswith(("pipe:[", "file[", "socket:[", "tty[")) and (fd < 3 or fd in preserved)
                ]
                external = [(key, fd) for fd, key in joins]
                if notes.get("network") == "rebuild":
                    if own_network is None:
                        raise ContainerError(
                            f"the images in {options.image_path} need a container with a network namespace of its own"
                        )
                    external.append((network.NAMESPACE_KEY["network"], own_network))
                if options.mounted_root and not os.path.ismount(root):
                    raise ContainerError(f"nothing is mounted at {root}, the root of {container_id}")
                stack.enter_context(_place_for_pivot(bundle))
                # CRIU does not follow links to a source, as mount(2) does.
                sources = {d: os.path.realpath(p) for d, p in mounts.external(spec, str(bundle.path), manager).items()}
                mounts.require_sources(sources)
                mounts.make_places(spec, str(root), sources)
                opts = request.restore(
                    options,
                    str(root),
                    {**mounts.RUNC_MASK, **sources},
                    inherit,
                    tuple(external),
                    manager.relative_paths(),
                    knows_cpu=(options.image_path / request.CPU_FILE).is_file(),
                )
                if lazy is not None:
                    try:
                        pagemap.flatten(options.image_path)
                    except OSError as e:
                        raise KernelError(f"cannot bring the images in {options.image_path} together", e.errno or 0) from e
                    lazy.start()
                held.began()
                with images.readable_inside(options.image_path, spec, writable=options.auto_dedup) as image_fd:
                    try:
                        session.run("RESTORE", opts, image_fd, options.work_path, request.RESTORE_LOG, held.on_notify)
                    except CriuError as e:
                        raise e if lazy is None else lazy.explained(e) from None
                if wipe and own:
                    memory.forget()
                held.resume()
                if lazy is not None:
                    lazy.keep()
        except BaseException:
            with contextlib.suppress(ContainerError, OSError):
                if made_cgroups:
                    if scope is not None:
                        scope.stop()
                    manager.signal_all(signal.SIGKILL)
                    manager.thaw()
                    _reap(container.state.pid)
                    manager.remove(container.state.cgroup_parents)
            store.remove(container_id)
            raise
    if wipe and not options.lazy_pages:
        images.wipe(options.image_path)
    return container


def _require_memory(options: RestoreOptions) -> None:
    """Refuse images whose memory is nowhere: CRIU would never end. Raises: ContainerError."""
    served = options.page_server is not None or lazy_module.listening(options.work_path) or present(options.image_path)
    if not served and any(wanted_of(options.image_path).values()):
        raise _lacks_memory(options)


def _look_ahead(memory: Passes, *, free: bool) -> None:
    """Do what is to be done with the memory that is here already, as long as nobody waits."""
    # Passes over memory that goes on changing would fill the file system. Not the newest: the next may be that of the freeze.
    memory.bring_together(free=free)
    memory.look(but_last=True)


def _lacks_memory(options: RestoreOptions) -> ContainerError:
    return ContainerError(
        f"the images in {options.image_path} lack the memory, which was sent elsewhere",
        hint="put its passes, memory-N.img, beside them, or name its --page-server",
    )


@contextlib.contextmanager
def _lazy_pages(
    container: Container, manager: Manager, options: RestoreOptions, daemon: CriuDaemon | OwnDaemon, *, wipe: bool
) -> Iterator[LazyPages | None]:
    """Return the daemon that a lazy restore needs, unless the caller has one listening in the work directory already."""
    if not options.lazy_pages or lazy_module.listening(options.work_path):
        yield None
        return

    def failed(reason: str) -> None:
        container.record_failure(f"killed, since its memory cannot be completed: {reason}")
        manager.signal_all(signal.SIGKILL)
        with contextlib.suppress(ContainerError):
            manager.thaw()
        deadline = time.monotonic() + _DYING_S
        while manager.pids() and time.monotonic() < deadline:
            time.sleep(0.01)  # who waits for our end finds it dead

    def drained() -> None:
        if wipe:
            images.wipe(options.image_path)

    lazy = LazyPages(daemon, options.work_path, failed, drained, options.drained_fd)
    try:
        yield lazy
    finally:
        lazy.close()


class _Restore:
    """Answers CRIU's notifies."""

    def __init__(
        self,
        container: Container,
        manager: Manager,
        criu: subprocess.Popen[bytes],
        on_console: Callable[[int], None] | None,
        controller: Controller | None,
        lazy: LazyPages | None,
    ) -> None:
        self._container, self._manager, self._criu, self._lazy = container, manager, criu, lazy
        self._on_console, self._controller = on_console, controller
        self._frozen = False
        self._began_s = 0.0

    def began(self) -> None:
        """CRIU is about to be asked."""
        self._began_s = time.monotonic()

    def on_notify(self, script: str, pid: int, fd: int | None) -> bool:
        if script == "orphan-pts-master" and fd is not None:
            (self._on_console or os.close)(fd)
        elif script == "setup-namespaces":
            self._container.run_setup_hooks(pid)
        elif script == "post-restore":
            self._container.adopt(pid)
        elif script == "pre-resume":
            try:
                self._before_they_run()
            except BaseException:
                self._kill()
                raise
        return True

    def _before_they_run(self) -> None:
        # CRIU itself must not be limited, frozen or killed with the container. It leaves the freezer first: until it
        # has, nothing could be frozen, and what it holds would run if we ended here.
        own = _own_paths(self._manager)
        if self._controller is not None:
            freezer = {key: path for key, path in own.items() if self._manager.paths[key] == self._manager.freezer_path}
            Manager(self._manager.layout, freezer).apply(self._criu.pid)
            self._frozen = True
            self._manager.freeze_soon()
        Manager(self._manager.layout, own).apply(self._criu.pid)
        if self._lazy is not None:
            self._lazy.restored(self._container.state.pid)
        if self._controller is not None:
            self._hold(self._controller)

    def _hold(self, controller: Controller) -> None:
        controller.say("held", pid=self._container.state.pid, criu_seconds=time.monotonic() - self._began_s)
        decision = controller.wait_decision()
        if decision == Decision.LEAVE_FROZEN:
            decision = Decision.COMMIT  # it was let go: whoever decided so was gone before it could say it
        if decision == Decision.COMMIT and self._lazy is not None and self._lazy.failed_meanwhile():
            raise ContainerError(f"container {self._container.id} is killed: its memory cannot be completed")
        if decision != Decision.COMMIT:
            raise HoldAborted(f"restore of {self._container.id} was aborted: nothing of it is left")

    def _kill(self) -> None:
        """End what is restored, before CRIU lets it run: here it does not listen to a no."""
        self._manager.signal_all(signal.SIGKILL)
        self._manager.thaw()  # with the signal pending none of them runs again, but frozen they would not die
        # CRIU has nothing left to undo, and would wait for a first process that cannot end before CRIU, as the
        # tracer of its children, has ended.
        self._criu.kill()

    def resume(self) -> None:
        """Let a held container run; says so at once, since its users wait for nothing else."""
        # Also what was not held: with its own ways of managing cgroups CRIU restores the freezer's state, too, and
        # at the dump that was frozen.
        self._manager.thaw()
        if self._frozen and self._controller is not None:
            self._controller.say("resumed")


def _own_paths(manager: Manager) -> dict[str, str]:
    """Return our own cgroup in each tree."""
    return {h.key: h.mount_point + h.own_path for h in manager.layout.hierarchies if h.key in manager.paths}


def _private_root(rootfs: Path) -> Path:
    """Make the rootfs a mount point, as CRIU wants its root, in a mount namespace that ends with us."""
    try:
        namespace.unshare(const.CLONE_NEWNS)
        mount.mount(None, "/", None, const.MS_SLAVE | const.MS_REC)
        mount.mount(str(rootfs), str(rootfs), None, const.MS_BIND | const.MS_REC)
        mount.mount(None, str(rootfs), None, const.MS_PRIVATE | const.MS_REC)
    except OSError as e:
        raise KernelError(f"cannot bind rootfs {rootfs} for the restore", e.errno or 0) from e
    return rootfs


@contextlib.contextmanager
def _place_for_pivot(bundle: Bundle) -> Iterator[None]:
    """Lend CRIU a /tmp inside a read-only rootfs that has none: it puts the old root there for a moment."""
    place = bundle.rootfs / "tmp"
    if not bundle.spec.root_readonly or place.exists() or place.is_symlink():
        yield
        return
    place.mkdir(mode=0o700)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


def _joined_namespaces(bundle: Bundle) -> list[tuple[int, str]]:
    """Open the namespaces that the container joins by path: (descriptor, key in the image)."""
    joined = []
    for n in bundle.spec.linux.namespaces:
        if n.path and n.type in network.NAMESPACE_KEY:
            ((fd, _),) = open_namespaces((n,))
            joined.append((fd, network.NAMESPACE_KEY[n.type]))
    return joined


def _reap(pid: int) -> None:
    if pid:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


def final_stats(options: RestoreOptions) -> dict[str, Any]:
    """Return CRIU's statistics of the restore."""
    return images.stats(options.work_path, "restore") or images.stats(options.image_path, "restore")
