"""Terminals: through a console socket, and relayed in the foreground."""

from __future__ import annotations

import array
import os
import pty
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci


def _terminal(c: Config) -> None:
    c["process"]["terminal"] = True
    c["process"]["consoleSize"] = {"height": 33, "width": 77}


def _read_until(fd: int, what: bytes, timeout_s: float = 10.0) -> bytes:
    data, deadline = b"", time.monotonic() + timeout_s
    os.set_blocking(fd, False)
    while what not in data:
        assert time.monotonic() < deadline, data
        try:
            data += os.read(fd, 4096)
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    return data


def test_console_socket_gets_the_master(oci: Oci, bundles: BundleMaker, tmp_path: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "console.sock"))
    listener.listen()
    bundle = bundles("sh", "-c", "tty; stty size; readlink /proc/self/fd/0; read x; echo got $x", change=_terminal)
    null = subprocess.DEVNULL
    done = oci.run(
        "run", "--detach", "--console-socket", tmp_path / "console.sock", "--bundle", bundle, "c", stdout=null, stderr=null
    )
    assert done.returncode == 0
    connection, _ = listener.accept()
    _, ancillary, _, _ = connection.recvmsg(100, socket.CMSG_LEN(4))
    fds = array.array("i", ancillary[0][2])
    assert b"/dev/console" in (start := _read_until(fds[0], b"33 77")) or b"/dev/pts/0" in start
    os.write(fds[0], b"it\n")
    assert b"got it" in _read_until(fds[0], b"got it")
    os.close(fds[0])
    listener.close()
    connection.close()


def test_foreground_terminal_is_relayed(oci: Oci, bundles: BundleMaker) -> None:
    bundle = bundles(
        "sh", "-c", "tty; stty size; read x; echo got $x; exit 5", change=lambda c: c["process"].update(terminal=True)
    )
    master, slave = pty.openpty()
    subprocess.run(["stty", "rows", "21", "cols", "43"], stdin=slave, check=True)
    process = subprocess.Popen(
        oci.argv("run", "--bundle", bundle, "c"), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    assert b"21 43" in _read_until(master, b"21 43")
    os.write(master, b"hello\r")
    assert b"got hello" in _read_until(master, b"got hello")
    assert process.wait(10) == 5
    os.close(master)


def test_a_detached_terminal_without_a_socket_is_refused(oci: Oci, bundles: BundleMaker) -> None:
    done = oci.run("run", "--detach", "--bundle", bundles("sh", change=_terminal), "c")
    assert done.returncode != 0 and ("terminal" in done.stderr or "tty" in done.stderr)
    assert "does not exist" in oci.run("state", "c").stderr


@pytest.mark.ferry
def test_the_refusal_says_what_to_do(oci: Oci, bundles: BundleMaker) -> None:
    assert "--console-socket" in oci.run("run", "--detach", "--bundle", bundles("sh", change=_terminal), "c").stderr
