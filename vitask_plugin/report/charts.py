"""Charts as inline SVG in the page's own colours, so that they are right in light and in dark mode."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

Points = Sequence[tuple[float, float]]

# Stand-ins that matplotlib takes for colours; the page puts its own in their place.
_INK, _ONE, _TWO = "#010203", "#010204", "#010205"
_COLOURS = {_INK: "currentColor", _ONE: "var(--one)", _TWO: "var(--two)"}


def _svg(draw: Callable[[Any], None], width: float = 5, height: float = 3) -> Markup:
    """What `draw` draws on one pair of axes; width and height in inches of matplotlib's 72 points."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    # A fixed salt: the same figure gives the same bytes. Text stays text, in the page's font.
    settings = {**style, "svg.hashsalt": "vitask", "svg.fonttype": "none", "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.grid(alpha=0.2)
        axes.set_axisbelow(True)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, css in _COLOURS.items():
        svg = svg.replace(colour, css)
    return Markup(svg)  # markup of our own making


def loss_curves(terms: Mapping[str, Points], unit: str = "nats per response token") -> Markup:
    """{term: [(step, value)]} as lines; a single point is one that is seen."""

    def draw(axes: Any) -> None:
        for name, points in terms.items():
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2, marker=marker, markersize=4)
        axes.set(xlabel="step", ylabel=unit)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw)


def reliability(confidence: Sequence[float], correct: Sequence[float], counts: Sequence[int]) -> Markup:
    """A reliability diagram (Guo et al., 2017, figure 1).

    Args:
        confidence, correct: of each bin with samples the mean confidence and the share that is right, in [0, 1].
        counts: samples of each of these bins; a point grows with it.
    """

    def draw(axes: Any) -> None:
        axes.plot([0, 1], [0, 1], color=_INK, linewidth=0.8, linestyle="--", alpha=0.6)
        axes.plot(confidence, correct, color=_ONE, linewidth=1.2)
        sizes = 12 + 150 * np.asarray(counts) / max(sum(counts), 1)
        axes.scatter(confidence, correct, s=sizes, color=_ONE, alpha=0.75)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy", aspect="equal")

    return _svg(draw, 3.4, 3.2)


def densities(
    grid: Sequence[float], positive: Sequence[float], negative: Sequence[float], ends: tuple[float, float]
) -> Markup:
    """Two densities over one grid (see `ranking`), filled, so that one sees what they share; `ends` of the axis."""

    def draw(axes: Any) -> None:
        for values, colour, name in ((positive, _ONE, "own image"), (negative, _TWO, "negative image")):
            axes.fill_between(grid, values, color=colour, alpha=0.3, linewidth=0)
            axes.plot(grid, values, color=colour, linewidth=1.2, label=name)
        axes.set(xlabel="log p(response | image), nats", ylabel="density", ylim=(0, None), xlim=ends)
        axes.legend(frameon=False, fontsize=8)

    return _svg(draw)


Bar = tuple[float, tuple[float, float] | None]  # height, and the two ends of its interval


def paired_bars(names: Sequence[str], first: Sequence[Bar], second: Sequence[Bar], labels: tuple[str, str]) -> Markup:
    """Two horizontal bars per name, with their intervals where there are any."""

    def draw(axes: Any) -> None:
        places = np.arange(len(names))
        for shift, bars, colour, label in ((-0.2, first, _ONE, labels[0]), (0.2, second, _TWO, labels[1])):
            axes.barh(places + shift, [height for height, _ in bars], 0.36, color=colour, alpha=0.75, label=label)
            for place, (_, ends) in zip(places + shift, bars, strict=True):
                if ends is not None:
                    axes.plot(ends, (place, place), color=_INK, linewidth=1.2)
        axes.set(xlim=(0, 1), xlabel="macro-F1", ylim=(len(names) - 0.4, -0.6))
        # A run's name is no formula, whatever dollar signs are in it.
        axes.set_yticks(places, names, parse_math=False)
        axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)

    return _svg(draw, 5.5, 1.2 + 0.55 * len(names))
