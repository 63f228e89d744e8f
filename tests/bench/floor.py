"""floor.py BUNDLE NAME [FLAG...]: print what CRIU's own dump and restore of a running container take, in ms, on this host."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import tempfile
import time

null = subprocess.DEVNULL


def held(*args: str) -> float:
    """Run a held verb up to its hold and commit it; return the time from its go (or its freeze) to the hold."""
    ours, theirs = socket.socketpair()
    argv = ["runtime", *args[:1], "--hold", "--control-fd", str(theirs.fileno()), *args[1:]]
    process = subprocess.Popen(argv, pass_fds=(theirs.fileno(),), stdin=null, stdout=null, stderr=null)
    theirs.close()
    lines = ours.makefile("r")

    def event() -> str:
        return str(json.loads(lines.readline())["event"])

    assert event() == "ready"
    started = time.monotonic()
    ours.sendall(b"go\n")
    while (got := event()) != "held":
        assert got == "frozen"
    elapsed = (time.monotonic() - started) * 1000
    ours.sendall(b"commit\n")
    while event() != "done":
        pass
    process.wait()
    return elapsed


def main() -> None:
    bundle, name, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory(dir="/run") as images:
        dump = held("checkpoint", "--image-path", images, *flags, name)
        subprocess.run(["runtime", "delete", name], check=True)
        restore = held("restore", "--detach", "--image-path", images, "--bundle", bundle, *flags, name)
    print(dump + restore)


if __name__ == "__main__":
    main()
