"""A checkpoint that follows what a container writes to its memory, and what reads its passes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

from runtime.memory import records
from runtime.memory.later import CONTENT_FILE
from tests.helpers.oci import Oci

null = subprocess.DEVNULL


class Following:
    """A checkpoint that is held and sends the memory, and what reads it: into memory-N.img in `place`."""

    def __init__(self, oci: Oci, images: Path, place: Path) -> None:
        self.images, self.place = images, place
        place.mkdir()
        self.later = False  # what comes from now on is not a pass, but what follows the restore
        self._read, write = os.pipe()
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(60)
        argv = oci.argv("checkpoint", "--hold", "--control-fd", str(theirs.fileno()), "--memory-fd", str(write))
        self.process = subprocess.Popen(
            [*argv, "--image-path", images, "c"], pass_fds=(theirs.fileno(), write), stdin=null, stdout=null, stderr=null
        )
        theirs.close()
        os.close(write)
        self._file = self._sock.makefile("r")
        self._reader = threading.Thread(target=self._pump, daemon=True)
        self._reader.start()
        oci.at_end.append(self.close)
        assert self.event()["event"] == "following"

    def _pump(self) -> None:
        """Cut the stream at its ends."""
        number = 1
        with os.fdopen(self._read, "rb") as stream:
            out = None
            while head := stream.read(records.PAGE_BYTES):
                out = out or (self.place / (CONTENT_FILE if self.later else "arriving")).open("wb", buffering=0)
                regions = records.parse(head)
                out.write(head + stream.read(sum(r.pages for r in regions) * records.PAGE_BYTES))
                if not regions:
                    out.close()
                    if self.later:
                        break
                    (self.place / "arriving").rename(self.place / records.name(number))
                    out, number = None, number + 1

    def event(self) -> dict[str, Any]:
        line = self._file.readline()
        found: dict[str, Any] = json.loads(line) if line else {"event": "EOF"}
        return found

    def say(self, word: str, *expected: str) -> dict[str, Any]:
        """Say a word; return the last of the events that must follow."""
        self._sock.sendall(word.encode() + b"\n")
        event: dict[str, Any] = {}
        for name in expected:
            event = self.event()
            assert event["event"] == name, event
        return event

    def to_the_hold(self) -> dict[str, Any]:
        self.say("prepare", "ready")
        return self.say("go", "frozen", "held")

    def finish(self) -> None:
        """Commit, and put the images beside the memory."""
        self.say("commit", "done")
        assert self.close() == 0
        for file in self.images.iterdir():
            file.rename(self.place / file.name)

    def close(self) -> int:
        self._file.close()
        self._sock.close()
        status = self.process.wait(30)
        self._reader.join(30)
        return status


def restored(oci: Oci, bundle: Path, place: Path) -> None:
    oci.ok("delete", "c")
    oci.ok("restore", "--detach", "--image-path", place, "--bundle", bundle, "c", stdout=null, stderr=null)
