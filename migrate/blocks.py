"""What the other side has of a large file, block by block: of one that has changed only other blocks are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from migrate.wire import PIECE_BYTES

# A smaller file is sent again as a whole: that is one piece or a few.
LEAST_FILE_BYTES = 1 << 20
# Databases write pages of 4 to 16 KiB, here and there. Smaller blocks would save little on the link for the time that they take.
_LEAST_BLOCK_BYTES, _BLOCKS = 16 << 10, 16 << 10
_DIGEST_BYTES = 16

# Where a file has data: (start, end) in bytes, in order.
Extents = Sequence[tuple[int, int]]


class Blocks:
    """A digest for each block of one file; a block that has none is a hole there.

    Units: bytes. `block_bytes` divides PIECE_BYTES; it is chosen for the size that the file has first.
    """

    def __init__(self, file_bytes: int) -> None:
        wanted = 1 << max(file_bytes // _BLOCKS - 1, 0).bit_length()
        self.block_bytes = min(max(wanted, _LEAST_BLOCK_BYTES), PIECE_BYTES)
        self._digests = bytearray()

    def take(self, offset: int, content: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Note what a piece of the file holds now, and give what of it the other side has not: (offset, content).

        A piece begins where a block does, and ends where one does or the file ends.
        """
        first, count = offset // self.block_bytes, self._count(len(content))
        missing = (first + count) * _DIGEST_BYTES - len(self._digests)
        if missing > 0:
            self._digests += bytes(missing)
        begin: int | None = None
        for at in range(0, len(content), self.block_bytes):
            digest = xxhash.xxh3_128_digest(content[at : at + self.block_bytes])
            number = first + at // self.block_bytes
            place = slice(number * _DIGEST_BYTES, (number + 1) * _DIGEST_BYTES)
            same = self._digests[place] == digest
            if same and begin is not None:
                yield offset + begin, content[begin:at]
                begin = None
            elif not same:
                self._digests[place] = digest
                begin = at if begin is None else begin
        if begin is not None:
            yield offset + begin, content[begin:]

    def loses(self, extents: Extents, file_bytes: int) -> bool:
        """Say whether something that the other side has is a hole now, which nothing that is sent could make of it."""
        first, blocks = 0, self._count(file_bytes)
        for start, end in [*extents, (blocks * self.block_bytes, 0)]:
            behind = start // self.block_bytes
            if self._digests[first * _DIGEST_BYTES : behind * _DIGEST_BYTES].strip(b"\0"):
                return True
            first = self._count(end)
        return False

    def around(self, extents: Extents) -> Iterator[tuple[int, int]]:
        """Give the whole blocks in which there is data; the last one may reach over the end of the file."""
        begin = end = 0
        for start, behind in extents:
            aligned = start // self.block_bytes * self.block_bytes
            if aligned > end:
                if end > begin:
                    yield begin, end
                begin = aligned
            end = self._count(behind) * self.block_bytes
        if end > begin:
            yield begin, end

    def cut(self, file_bytes: int) -> None:
        """Forget what was behind the end that the file has now."""
        del self._digests[self._count(file_bytes) * _DIGEST_BYTES :]

    def _count(self, size: int) -> int:
        return -(-size // self.block_bytes)
