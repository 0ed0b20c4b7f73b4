"""The page of a training run: loss curves, one table, confusion matrices and a few answers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.report import charts
from vitask_plugin.report.charts import Points
from vitask_plugin.report.page import Chart, Confusion, Grid, Page, Sample, Section, Table, write_html

# log_history key -> name in the chart; the keys are those of `VITaskTrainer` and of the stock Trainer.
_TERMS = {
    "loss": "total",
    "loss_vanilla": "vanilla",
    "loss_ep": "EP",
    "loss_rda": "RDA",
    "loss_crt": "CRT",
}


def loss_curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """{term: [(step, value)]} from the `log_history` of a `trainer_state.json`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, name in _TERMS.items():
            if key in entry:
                curves.setdefault(name, []).append((entry["step"], entry[key]))
    return curves


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Points]],
    confusions: Sequence[Confusion],
    samples: Sequence[Sample],
    notes: Sequence[str] = (),
) -> None:
    """Writes one HTML page that needs nothing else (see `page.write_html`).

    Args:
        rows: the results table; the keys of the first row are the columns.
        curves: {run: {term: [(step, value)]}}, one chart per run (see `loss_curves`).
        confusions: one per model.
        samples: a few of the images judged.
        notes: sentences above the table, for instance what was run.
    """
    drawn = [Chart(run, charts.loss_curves(terms)) for run, terms in curves.items() if terms]
    table = Table(list(rows[0]) if rows else [], [[_cell(value) for value in row.values()] for row in rows])
    answer_key = ['Row: the label. Column: the answer. "no label": the answer named no label, or several.']
    sections = [
        Section("Results", [table]),
        *([Section("Loss by term", [Grid(drawn)])] if drawn else []),
        *([Section("Confusion matrices", [Grid(confusions, 30)], answer_key)] if confusions else []),
        *([Section("Samples", [Grid(samples, 15)])] if samples else []),
    ]
    write_html(path, Page(title, sections, notes))


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
