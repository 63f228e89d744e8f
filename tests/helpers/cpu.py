"""An image of a processor that has all there is: no host's can stand in for it."""

from __future__ import annotations

import struct


def of_everything(image: bytes) -> bytes:
    """Return a cpuinfo image (or its inventory's twin) with every ability set that the format has a bit for."""
    from pycriu.images import cpuinfo_pb2

    (length,) = struct.unpack_from("<I", image, 8)
    entry = cpuinfo_pb2.cpuinfo_entry.FromString(image[12 : 12 + length])
    for x86 in entry.x86_entry:
        for i in range(len(x86.capability)):
            x86.capability[i] = 0xFFFFFFFF
    raw = entry.SerializeToString()
    return image[:8] + struct.pack("<I", len(raw)) + raw
