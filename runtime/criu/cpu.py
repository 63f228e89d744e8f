"""Whether processes of one processor can go on on another: CRIU writes what this one has, and compares.

Source: criu(8), cpuinfo; CRIU's images/cpuinfo.proto.
"""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path

from runtime.criu.findings import REMEDY
from runtime.criu.options import CpuCap
from runtime.criu.request import CPU_DEMANDED, CPU_FILE
from runtime.criu.session import Session
from runtime.errors import CriuError, KernelError, SpecError

_IMAGE, _LOG = CPU_FILE, "cpuinfo.log"
_MAGIC = struct.pack("<II", 0x54564319, 0x61404013)


def dump() -> bytes:
    """Return this host's processor as CRIU's image. Raises: CriuError."""
    with tempfile.TemporaryDirectory(prefix="ferry-cpu-") as directory:
        _run("CPUINFO_DUMP", Path(directory), None)
        return (Path(directory) / _IMAGE).read_bytes()


def check(image: bytes, demanded: CpuCap | None) -> None:
    """See whether this host's processor has what another's image says. Raises: CriuError saying so; SpecError."""
    with tempfile.TemporaryDirectory(prefix="ferry-cpu-") as directory:
        if not image.startswith(_MAGIC):
            raise SpecError("this is nothing that `runtime cpu dump` has written")
        (Path(directory) / _IMAGE).write_bytes(image)
        _run("CPUINFO_CHECK", Path(directory), demanded)


def _run(kind: str, directory: Path, demanded: CpuCap | None) -> None:
    opts = {"log_file": _LOG, "log_level": 2, "cpu_cap": int(CPU_DEMANDED if demanded is None else demanded)}
    try:
        with Session() as session:
            session.run(kind, opts, directory, directory, _LOG, lambda script, pid, fd: True)
    except CriuError as e:
        if kind != "CPUINFO_CHECK":
            raise
        hint = f"{REMEDY['cpu']} [cpu]"
        raise CriuError("this host's processor lacks what the other has", log_lines=e.log_lines, hint=hint) from e
    except OSError as e:
        raise KernelError(f"cannot write to {directory}", e.errno or 0) from e
