"""Decompression by what a stream begins with, not by what it is called."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from typing import IO, Any, cast

from runtime.errors import Unsupported


def decompressed(stream: Any) -> IO[bytes]:
    """Return a stream of what another one holds: gzip, zstd, bzip2, xz, or nothing of these.

    Raises: Unsupported for zstd without its module.
    """
    buffered = io.BufferedReader(stream, 1 << 20)
    magic = buffered.peek(6)[:6]
    if magic.startswith(b"\x1f\x8b"):
        return cast(IO[bytes], gzip.GzipFile(fileobj=buffered))
    if magic.startswith(b"\x28\xb5\x2f\xfd"):
        try:
            import zstandard
        except ImportError:
            raise Unsupported("the layer is compressed with zstd", hint="pip install zstandard") from None
        return cast(IO[bytes], io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(buffered, read_across_frames=True)))
    if magic.startswith(b"BZh"):
        return cast(IO[bytes], bz2.BZ2File(buffered))
    if magic.startswith(b"\xfd7zXZ"):
        return cast(IO[bytes], lzma.LZMAFile(buffered))
    return buffered
