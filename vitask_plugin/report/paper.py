"""The paper's published numbers (`paper.json`), marked as such wherever they are shown."""

import json
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from typing import Any

from markupsafe import Markup

from vitask_plugin.report.page import Cell

# Of table 1. Its accuracy of the multi-label chest set can only be the share of images whose whole list is right.
METRICS = ("subset_accuracy", "macro_f1")


@lru_cache(maxsize=1)
def published() -> dict[str, Any]:
    """The file: `main` (table 1), `ablation` (table 2), `incomplete` (figure 4), `external`, and their `source`."""
    text = resources.files("vitask_plugin.report").joinpath("paper.json").read_text(encoding="utf-8")
    return json.loads(text)


def note() -> Markup:
    """Where numbers in the paper's style are from."""
    source = published()["source"]
    text = Markup('In italics: the figures of the paper, {title}, <a href="{url}">{url}</a> ({setting}).')
    return text.format(**source)


def ablation_name(row: Mapping[str, Any]) -> str:
    """What a row of table 2 is called: "vanilla + RDA"."""
    return " ".join(["vanilla", *["+ RDA"] * row["rda"], *["+ CRT"] * row["crt"]])


def heading(model: str) -> Cell:
    """A column or row of the paper's."""
    return Cell(model, "paper", paper=True)


def cell(*values: float) -> Cell:
    """Metrics of the paper, for instance accuracy and F1."""
    return Cell(" / ".join(f"{value:.3f}" for value in values), paper=True)
