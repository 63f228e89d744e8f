"""Send a container's memory while it runs, and when it stands still what is left: the memory descriptor of a held checkpoint.

    runtime checkpoint --hold --memory-fd N    controller                  reader of N
     | {"event": "following"} ------------------>|  nothing was touched yet     |
     | <------------------------------- "pass"   |                              |
     | -- records of runtime/memory/records.py, to an end ---------------------->|
     | {"event": "passed", "pages": ...} -------->|                              |
     | <------------------------ "throttle 50"   |  the container gets half of the CPU time that it took so far
     | {"event": "throttled", "cpus": ...} ------>|  until it is frozen, or this is over
     | <---------------------------- "prepare"   |                              |
     | {"event": "ready"} ----------------------->|  from here on as in hold.py; "pass" is still understood
     | <--------------------------------- "go"   |                              |
     | {"event": "frozen"} ---------------------->|                              |
     | -- the last pass, while CRIU dumps all else ----------------------------->|
     | {"event": "held", "memory": {...}} ------->|                              |

With "later" before "go" the last pass is left out, and sent while all else is restored, and runs, elsewhere (post-copy):

     | <------------------------------- "serve"   |                              |
     | -- records; "page ..." "ack ..." "enough" say which, and how many: runtime/memory/later.py ------>|
     | {"event": "served", "error": ""} --------->|  "commit" and "abort" end it before, and mean what they always do

CRIU dumps lazily: it writes down which pages of anonymous memory there are, and keeps their content for a page server that nobody
asks. Its images say what has to be there, so what was missed for whatever reason is sent at last. Of memory that processes share
it writes the content, too, which is left out of the images where all of it was sent.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime.criu import pagemap, sharedmem
from runtime.criu.hold import Controller, Decision
from runtime.errors import ContainerError, KernelError
from runtime.files import write_all
from runtime.linux.process import die_with_parent
from runtime.linux.procfs import number_inside
from runtime.memory import later, spans
from runtime.memory.records import MAX_ADDRESS, PAGE_BYTES
from runtime.memory.sender import Sender
from runtime.memory.shared import Shared, mapped
from runtime.memory.spans import Span
from runtime.memory.tracker import Process, Tracker, writes_unseen

_SERVE_WAIT_S = 1.0
_GONE = (errno.ESRCH, errno.ENOENT)


class Follow:
    """Sends the memory of a container's processes to `fd`, which it owns. `pids` tells which there are."""

    def __init__(self, fd: int, pids: Callable[[], list[int]]) -> None:
        os.set_inheritable(fd, False)
        # Two descriptors for each process that is followed; and CRIU, which gets our limit, keeps memory in pipes of 256 pages.
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        pagemap.preload()
        self._fd, self._pids = fd, pids
        self._tracker, self._shared, self._sender = Tracker(), Shared(), Sender(fd)
        self._child = self._result_fd = 0
        # By the number of a process; None: nothing is left for later.
        self._later: dict[int, tuple[int, list[Span]]] | None = None
        self._began = self._scan_s = 0.0

    def close(self) -> None:
        """Let the processes be as they were. Idempotent."""
        if self._child:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = 0
        self._tracker.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def one_pass(self) -> dict[str, Any]:
        """Send what changed since the last pass; of what was never sent, all. Raises: ContainerError."""
        started = time.monotonic()
        pids = self._pids()
        self._tracker.refresh(pids)
        try:
            for process in list(self._tracker.processes.values()):
                try:
                    self._send(process, process.changed())
                except OSError as e:
                    if e.errno not in _GONE:
                        raise
                    self._tracker.forget(process.pid)
            self._shared.send(mapped(pids), self._sender)
            sent = self._sender.end()
        except OSError as e:
            raise _failed(e) from e
        left_out = [f"process {pid}: {reason}" for pid, reason in self._tracker.left_out.items()]
        elapsed_s = time.monotonic() - started
        return {
            "pages": sent.pages,
            "written_bytes": sent.written_bytes,
            "seconds": elapsed_s,
            "processes": len(self._tracker.processes),
            "left_out": left_out,
        }

    def _send(self, process: Process, changed: list[Span]) -> None:
        missing = self._sender.send(process.pid, process.number, changed)
        process.sent = spans.minus(spans.union([*process.sent, *changed]), spans.union(missing))

    def leave_for_later(self) -> None:
        """What a freeze finds changed is not sent in it, but by `serve`. Idempotent."""
        self._later = {}

    def begin_last(self) -> None:
        """Begin to send what changed since the last pass, while the processes stand still. Raises: ContainerError."""
        started = time.monotonic()
        pids = self._pids()
        self._tracker.keep(pids)
        places = mapped(pids)  # before CRIU maps some for itself
        changed: list[tuple[Process, list[Span]]] = []
        for process in list(self._tracker.processes.values()):
            try:
                changed.append((process, process.changed()))
            except OSError as e:
                if e.errno not in _GONE:
                    raise _failed(e) from e
                self._tracker.forget(process.pid)
        self._began, self._scan_s = started, time.monotonic() - started
        for process, runs in changed:
            process.sent = spans.union([*process.sent, *runs]) if self._later is None else spans.minus(process.sent, runs)
        if self._later is not None:
            changed = [(process, []) for process, _ in changed]
        ours, theirs = os.pipe()
        # Beside CRIU, which is busy with all the rest meanwhile.
        self._child = os.fork()
        if self._child:
            os.close(theirs)
            self._result_fd = ours
            return
        try:
            die_with_parent()
            missing = {process.pid: self._sender.send(process.pid, process.number, runs) for process, runs in changed}
            # What cannot be trusted to be what was sent is missing, too.
            missing |= {p.pid: [(0, MAX_ADDRESS)] for p, _ in changed if writes_unseen(p.pid)}
            self._shared.send(places, self._sender)
            shared = {inode: [segment.number, segment.sent] for inode, segment in self._shared.segments.items()}
            told = [self._sender.pages, self._sender.written_bytes, [[p, a, b] for p, m in missing.items() for a, b in m], shared]
            write_all(theirs, json.dumps(told).encode())
        finally:
            os._exit(0)

    def end_last(self, image_path: Path) -> dict[str, Any]:
        """See all sent that CRIU's images want, and end the last pass. Raises: ContainerError."""
        with os.fdopen(self._result_fd, "rb") as results:
            result = results.read()
        os.waitpid(self._child, 0)
        self._child = 0
        if not result:
            raise ContainerError("the memory that changed last could not be sent", hint="does anybody read it still?")
        pages, written_bytes, missing, shared = json.loads(result)
        for pid, start, end in missing:  # the images say whether it matters
            process = self._tracker.processes[pid]
            process.sent = spans.minus(process.sent, [(start, end)])
        by_number = {p.number: p for p in self._tracker.processes.values()}
        pids = {number_inside(pid): pid for pid in self._pids()}
        try:
            for number, wanted in wanted_of(image_path).items():
                followed = by_number.get(number)
                rest = spans.minus(wanted, followed.sent if followed else [])
                if rest and self._later is not None:
                    self._later[number] = (pids[number], rest)
                elif rest and self._sender.send(pids[number], number, rest):
                    raise ContainerError(f"memory of process {number} cannot be read")
            if self._later is not None:
                later.note(image_path, {number: runs for number, (_, runs) in self._later.items()})
            late = self._sender.end()
        except KeyError as e:
            raise ContainerError(f"the images tell of a process {e} that is not there") from e
        except OSError as e:
            raise _failed(e) from e
        sharedmem.leave_out(image_path, {int(inode): (number, runs) for inode, (number, runs) in shared.items()})
        return {
            "pages": pages + late.pages,
            "late_pages": late.pages,
            "later_pages": sum(spans.size(runs) for _, runs in (self._later or {}).values()) // PAGE_BYTES,
            "written_bytes": written_bytes + late.written_bytes,
            "scan_seconds": self._scan_s,
            "seconds": time.monotonic() - self._began,
        }

    def serve(self, controller: Controller) -> None:
        """Send what was left for later, until all is there, or the decision is said; tell how it went."""
        server = later.Server(self._fd, self._later or {})
        try:
            while not server.through:
                words = controller.words(0 if server.may_send else _SERVE_WAIT_S)
                if words is None:
                    return
                for at, word in enumerate(words):
                    if word in (Decision.COMMIT, Decision.ABORT):
                        controller.unread(words[at:])
                        return
                    server.hear(word)
                if server.may_send:
                    server.go_on()
            sent = server.end()
            controller.say("served", pages=sent.pages, written_bytes=sent.written_bytes, error="")
        except (ContainerError, OSError) as e:
            # Whether it runs on is not for us to say: the decision is still to come.
            controller.say("served", pages=0, written_bytes=0, error=str(e))


def wanted_of(image_path: Path) -> dict[int, list[Span]]:
    """Return the ranges, by the number of a process, whose content the images leave to somebody else. Raises: ContainerError."""
    found: dict[int, list[Span]] = {}
    for path in image_path.glob("pagemap-*.img"):
        number = path.name[8:-4]
        if number.isdigit():
            _, entries = pagemap.load(path)
            found[int(number)] = spans.union((e.start, e.end) for e in entries if pagemap.is_elsewhere(e))
    return found


def _failed(error: OSError) -> ContainerError:
    if error.errno == errno.EPIPE:
        return ContainerError("nobody reads the memory any more")
    return KernelError("the memory cannot be sent", error.errno or 0)
