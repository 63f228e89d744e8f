"""A container whose program can say what is in its memory: to see that a restore brought all of it back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from runtime.memory import tracker
from tests.helpers.bundle import BundleMaker, Config
from tests.helpers.oci import Oci, wait_for

following = pytest.mark.skipif(not tracker.supported(), reason="the kernel cannot follow writes to memory: Linux 6.7 can")

# Holds MiB of its own pattern; writes a line for each change that it is asked for by a file, with the digest of it all.
# A change is one page in every fourth MiB, or, of as many MiB as are named, nearly all pages.
PROGRAM = """
import hashlib, os, time
m = [bytearray(hashlib.sha256(b'%d' % i).digest() * 32768) for i in range({mib})]
n = 0
def note():
    h = hashlib.sha256()
    for b in m: h.update(b)
    with open('/answer.new', 'w') as f: f.write('%d %s' % (n, h.hexdigest()))
    os.rename('/answer.new', '/answer')
note()
while True:
    if os.path.exists('/ask'):
        n += 1
        for i in range(0, len(m), 4) if not {changed} else range({changed}):
            for at in range(5000, 1 << 20 if {changed} else 5001, 4096): m[i][at] = n & 255
        os.unlink('/ask')
        note()
    time.sleep(0.01)
"""


def system(config: Config) -> None:
    """Give a container the host's own programs."""
    for directory in ("/usr", "/lib", "/lib64", "/bin"):
        if Path(directory).exists() and (directory != "/bin"):
            source = str(Path(directory).resolve())
            config["mounts"].append({"destination": directory, "type": "bind", "source": source, "options": ["rbind", "ro"]})


def make(bundles: BundleMaker, mib: int, changed_mib: int = 0) -> Path:
    return bundles("/usr/bin/python3", "-c", PROGRAM.format(mib=mib, changed=changed_mib), change=system)


def expected(mib: int, asked: int, changed_mib: int = 0) -> str:
    """Return what the program must answer when it was asked so many times."""
    h = hashlib.sha256()
    for i in range(mib):
        content = bytearray(hashlib.sha256(b"%d" % i).digest() * 32768)
        if asked and (i < changed_mib if changed_mib else i % 4 == 0):
            for at in range(5000, 1 << 20 if changed_mib else 5001, 4096):
                content[at] = asked & 255
        h.update(content)
    return f"{asked} {h.hexdigest()}"


class Memory:
    def __init__(self, oci: Oci, bundles: BundleMaker, mib: int) -> None:
        self.mib, self.bundle = mib, make(bundles, mib)
        self._asked = 0
        self._answer = self.bundle / "rootfs/answer"
        oci.detached(self.bundle, "c")
        wait_for(self._answer.exists, "the first answer", 60)

    def ask(self) -> None:
        """Have a quarter of its MiB changed, one page each, and see that all of its memory is right."""
        self._asked += 1
        (self.bundle / "rootfs/ask").touch()
        wait_for(lambda: self._answer.read_text().startswith(f"{self._asked} "), "an answer", 60)
        assert self._answer.read_text() == expected(self.mib, self._asked)
