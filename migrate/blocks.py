"""What the other side has of a large file, block by block: of one that has changed only other blocks are sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import xxhash

from migrate.wire import PIECE_BYTES

# A smaller file is sent again as a whole: that is one piece or a few.
LEAST_FILE_BYTES = 1 << 20
# Databases write pages of 4 to 16 KiB, here and there. Smaller blocks would save little on the link for the time that they take.
_LEAST_BLOCK_BYTES, _BLOCKS = 16 << 10, 16 << 10

# Where a file has data: (start, end) in bytes, in order.
Extents = Sequence[tuple[int, int]]


class Blocks:
    """A digest for each block of one file that has data.

    Units: bytes. `block_bytes` divides PIECE_BYTES; it is chosen for the size that the file has first.
    """

    def __init__(self, file_bytes: int) -> None:
        wanted = 1 << max(file_bytes // _BLOCKS - 1, 0).bit_length()
        self.block_bytes = min(max(wanted, _LEAST_BLOCK_BYTES), PIECE_BYTES)
        # By number: a file of few blocks may be of any size.
        self._digests: dict[int, bytes] = {}

    def take(self, offset: int, content: memoryview) -> Iterator[tuple[int, memoryview]]:
        """Note what a piece of the file holds now, and give what of it the other side has not: (offset, content).

        A piece begins where a block does, and ends where one does or the file ends.
        """
        begin: int | None = None
        for at in range(0, len(content), self.block_bytes):
            digest = xxhash.xxh3_128_digest(content[at : at + self.block_bytes])
            number = (offset + at) // self.block_bytes
            same = self._digests.get(number) == digest
            if same and begin is not None:
                yield offset + begin, content[begin:at]
                begin = None
            elif not same:
                self._digests[number] = digest
                begin = at if begin is None else begin
        if begin is not None:
            yield offset + begin, content[begin:]

    def loses(self, extents: Extents, file_bytes: int) -> bool:
        """Say whether something that the other side has is a hole now, which nothing that is sent could make of it."""
        left = {n for n in self._digests if n * self.block_bytes < file_bytes}
        for start, end in self.around(extents):
            left.difference_update(range(start // self.block_bytes, end // self.block_bytes))
        return bool(left)

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
        count = self._count(file_bytes)
        for number in [n for n in self._digests if n >= count]:
            del self._digests[number]

    def _count(self, size: int) -> int:
        return -(-size // self.block_bytes)
