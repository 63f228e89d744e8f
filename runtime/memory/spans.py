"""Sets of pages as sorted runs of addresses (start, end) that do not touch. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]


def union(spans: Iterable[Span]) -> list[Span]:
    """Return all that is in any of the spans."""
    joined: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if joined and start <= joined[-1][1]:
            if end > joined[-1][1]:
                joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def minus(left: Sequence[Span], right: Sequence[Span]) -> list[Span]:
    """Return what is in `left` and not in `right`, both sorted and without overlaps; what touches stays apart."""
    rest: list[Span] = []
    i = 0
    for start, end in left:
        while i < len(right) and right[i][1] <= start:
            i += 1
        k = i
        while k < len(right) and right[k][0] < end:
            if right[k][0] > start:
                rest.append((start, right[k][0]))
            start = max(start, right[k][1])
            k += 1
        if start < end:
            rest.append((start, end))
    return rest


def size(spans: Iterable[Span]) -> int:
    """Return how many bytes are in spans that do not overlap."""
    return sum(end - start for start, end in spans)
