"""The page of a report, looked at in a browser."""

from __future__ import annotations

import os
import subprocess
from itertools import groupby
from pathlib import Path

import pytest
from PIL import Image

from migrate.page import page
from migrate.story import tell
from tests.unit.migrate.test_story import report

SOURCE, TARGET, COORDINATOR = (0x2F, 0x7E, 0xD8), (0x1F, 0x9D, 0x57), (0x8A, 0x8F, 0x98)


def picture(path: Path) -> list[list[tuple[int, ...]]]:
    """Return the pixels of an image, row by row."""
    with Image.open(path) as image:
        data, width = image.convert("RGB").tobytes(), image.width
    pixels = list(zip(data[::3], data[1::3], data[2::3], strict=True))
    return [pixels[at : at + width] for at in range(0, len(pixels), width)]


def bars(pixels: list[list[tuple[int, ...]]], colour: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return (left edge, width) of what has a colour, from the top down: the widest run of each band of rows."""
    widest = []
    for row in pixels:
        at, found = 0, (0, 0)
        for is_it, run in groupby(row, key=lambda p: p == colour):
            length = len(list(run))
            if is_it and length > found[1]:
                found = (at, length)
            at += length
        widest.append(found)
    return [
        max(band, key=lambda r: r[1]) for has, rows in groupby(widest, key=lambda r: r[1] > 0) for band in [list(rows)] if has
    ]


@pytest.fixture
def shot(tmp_path: Path) -> list[list[tuple[int, ...]]]:
    (tmp_path / "page.html").write_text(page(tell(report())))
    subprocess.run(
        [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1",
            f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,1400", f"--screenshot={tmp_path / 'shot.png'}",
            (tmp_path / "page.html").as_uri(),
        ],
        env={**os.environ, "HOME": str(tmp_path)}, stdin=subprocess.DEVNULL, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    return picture(tmp_path / "shot.png")


def test_a_browser_draws_what_happened(shot: list[list[tuple[int, ...]]]) -> None:
    """Each phase and each part of the downtime is a bar where it was, as long as it was."""
    phases = bars(shot, COORDINATOR)
    # The squares of the key come last, all in one band.
    assert len(phases) == 6 + 1 and len(bars(shot, TARGET)) == 3 + 1
    lefts, widths = [x for x, _ in phases[:6]], [w for _, w in phases[:6]]
    assert lefts == sorted(lefts)
    assert widths[2] / widths[0] == pytest.approx(900 / 400, rel=0.05)
    target = bars(shot, TARGET)[:3]
    assert target[1][1] / target[2][1] == pytest.approx(34 / 7, rel=0.1)
    assert target[0][0] + target[0][1] == pytest.approx(target[1][0], abs=3)
