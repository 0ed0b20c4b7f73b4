"""Draws what `growth.py` measured: python benchmarks/growth_plot.py FILE docs/step_cost.svg

FILE's last line is drawn. Points are measured, lines are what counting tokens predicts.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from measuring import end_with_a_sentence

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path

# On white, as docs/method.svg: it reads the same on a light and a dark page.
INK, GREY, GRID = "#0f172a", "#475569", "#e2e8f0"
SERIES = {  # words, colour, marker
    "stage2_branches": ("stage 2, a forward per branch", "#dc2626", "s"),
    "stage2_packed": ("stage 2, packed", "#1d4ed8", "o"),
    "stage1_packed": ("stage 1, packed", "#0d9488", "^"),
}
PANELS = {"image_tokens": "image tokens", "continuation": "instruction and answer, tokens", "batch": "samples a step"}
# Number of branches -> the variant that has so many, by engine.
BRANCHES = {
    "stage2_branches": ("lean_vanilla", "stage1_branches", "stage2_branches"),
    "stage2_packed": ("lean_vanilla", "stage1_packed", "stage2_packed"),
}
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Helvetica", "Arial"],  # the first, matplotlib's own, sets the widths
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "growth",  # the same figures give the same file
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "axes.axisbelow": True,
}


def draw(result: dict[str, Any]) -> Figure:
    """A panel per sweep, and one over the number of branches at the geometry where the sweeps cross."""
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    panels = figure.subplots(1, len(PANELS) + 1, sharey=True)
    for panel, (field, words) in zip(panels, PANELS.items(), strict=False):
        points = result["sweeps"][field]
        places = [point[field] for point in points]
        for name in SERIES:
            _series(
                panel,
                name,
                places,
                measured=[point["ratio"][name] for point in points],
                predicted=[point["predicted"][name] for point in points],
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(places, [f"{place:,}" for place in places])
        panel.minorticks_off()
        panel.set_xlabel(words)
    base = result["base"]
    for name, variants in BRANCHES.items():
        _series(
            panels[-1],
            name,
            [1, 2, 3],
            measured=[base["ratio"][variant] for variant in variants],
            predicted=[base["predicted"][variant] for variant in variants],
        )
    panels[-1].set_xticks([1, 2, 3], ["1 (vanilla)", "2 (stage 1)", "3 (stage 2)"], fontsize=8.5)
    panels[-1].set_xlim(0.6, 3.4)
    panels[-1].set_xlabel("branches of an image")
    panels[0].set_ylabel("step time / vanilla with\nlogits at the answers only")
    panels[0].set_ylim(0, None)
    keys = [Line2D([], [], color=colour, marker=marker, label=words) for words, colour, marker in SERIES.values()]
    keys += [
        Line2D([], [], color=GREY, marker="o", linestyle="", label="measured"),
        Line2D([], [], color=GREY, label="by counting tokens"),
    ]
    figure.legend(handles=keys, loc="outside upper center", ncols=len(keys), frameon=False)
    return figure


def _series(panel: Axes, name: str, places: list[float], *, measured: list[float], predicted: list[float]) -> None:
    _, colour, marker = SERIES[name]
    panel.plot(places, predicted, color=colour, linewidth=1.4, alpha=0.55)
    panel.plot(places, measured, color=colour, marker=marker, markersize=5.5, linestyle="")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, metavar="FILE", help="what growth.py --json wrote")
    parser.add_argument("picture", type=Path, metavar="SVG", help="file to write")
    args = parser.parse_args(argv)
    try:
        result = json.loads(args.results.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, IndexError, json.JSONDecodeError) as error:
        raise VITaskError(f"{str(args.results)!r} holds no result of growth.py ({error}); run that first") from None
    with matplotlib.rc_context(STYLE), atomic_path(args.picture) as temporary:
        draw(result).savefig(temporary, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    end_with_a_sentence(main)
