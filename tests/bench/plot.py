"""Draw what served.py measured: plot.py JSON SVG."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

COLOURS = {"ferry": "#0b6e99", "lazy": "#5fb3d4", "runc": "#c2783a", "podman": "#8a8a8a"}


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Draw the downtimes, medians, for each load and tool; logarithmic, since they differ by so much."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures make the same file.
    matplotlib.rcParams["svg.hashsalt"] = "ferry"
    from matplotlib import pyplot

    loads = list(dict.fromkeys(f["load"] for f in found))[::-1]
    figure, axes = pyplot.subplots(figsize=(8, 0.8 + 0.75 * len(loads)), layout="constrained")
    for at, (tool, colour) in enumerate(COLOURS.items()):
        for row, load in enumerate(loads):
            values = [f["downtime_ms"] for f in found if (f["load"], f["tool"]) == (load, tool)]
            if values:
                bar = axes.barh(row + 0.3 - at * 0.2, statistics.median(values) / 1000, 0.18, color=colour, label=tool)
                axes.bar_label(bar, fmt="%.1f s", padding=3, fontsize=8)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    axes.legend(handles.values(), handles.keys(), loc="lower right", frameon=False)
    axes.set_yticks(range(len(loads)), loads, fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("downtime that a client saw, in seconds")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
