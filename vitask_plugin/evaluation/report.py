"""What lmms-eval wrote, read back; and one self-contained page with a table, curves, confusion matrices and samples."""

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.metrics import Outcome
from vitask_plugin.files import atomic_path, read_json

Points = Sequence[tuple[float, float]]  # (step, value)

# log_history key -> name in the figure; the keys are those of `VITaskTrainer` and of the stock Trainer.
_TERMS = {
    "loss": "total",
    "loss_vanilla": "vanilla",
    "loss_ep": "EP",
    "loss_rda": "RDA",
    "loss_crt": "CRT",
}


# Reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One document's outcome. `text` is empty for a task that scores labels, `probabilities` for one that answers."""

    outcome: Outcome
    text: str = ""
    probabilities: tuple[float, ...] = ()


@dataclass(frozen=True)
class TaskResult:
    """One task of an evaluation.

    Attributes:
        metrics: by name; None where lmms-eval wrote no finite number.
        answers: by document number, i.e. row of the test split; empty without `--log_samples`.
    """

    metrics: dict[str, float | None]
    answers: dict[int, Answer] = field(default_factory=dict)

    @property
    def outcomes(self) -> list[Outcome]:
        return [answer.outcome for answer in self.answers.values()]


def read_results(directory: str | Path) -> dict[str, TaskResult]:
    """{task: result} of the latest evaluation that lmms-eval wrote below `directory` (its `--output_path`).

    Raises:
        VITaskError: if there is none: lmms-eval exits with status 0 after most of its errors.
    """
    # The names begin with the date.
    found = sorted(Path(directory).rglob("*_results.json"), key=lambda path: path.name)
    if not found:
        raise VITaskError(f"{str(directory)!r} holds no results of lmms-eval; the evaluation failed, see its output")
    prefix = found[-1].name.removesuffix("results.json")
    return {
        task: TaskResult(
            {key.removesuffix(",none"): _finite(value) for key, value in figures.items() if _is_metric(key)},
            _read_answers(found[-1].parent / f"{prefix}samples_{task}.jsonl"),
        )
        for task, figures in read_json(found[-1], "lmms-eval results")["results"].items()
    }


def _is_metric(key: str) -> bool:
    return key.endswith(",none") and "_stderr" not in key


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _read_answers(path: Path) -> dict[int, Answer]:
    if not path.is_file():
        return {}
    answers = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        text = sample["filtered_resps"] if isinstance(sample["filtered_resps"], str) else ""
        likely = tuple(sample["auc"][1]) if "auc" in sample else ()
        answers[sample["doc_id"]] = Answer(Outcome(*sample["macro_f1"]), text, likely)
    return dict(sorted(answers.items()))


def loss_curves(log_history: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """{term: [(step, value)]} from the `log_history` of a `trainer_state.json`."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in log_history:
        for key, name in _TERMS.items():
            if key in entry:
                curves.setdefault(name, []).append((entry["step"], entry[key]))
    return curves


# Writing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Confusion:
    """Counts [K][K + 1] of `metrics.confusion`, and the K class names."""

    counts: Sequence[Sequence[int]]
    choices: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """One test image, its label, and {model: what it answered}."""

    image: Image.Image
    label: str
    answers: Mapping[str, str]


def write_report(
    path: str | Path,
    *,
    title: str,
    rows: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Points]],
    confusions: Mapping[str, Confusion],
    samples: Sequence[Sample],
    notes: Sequence[str] = (),
) -> None:
    """Writes one HTML page that needs nothing else: no network, no script, readable on a phone, light or dark.

    Args:
        rows: the results table; the keys of the first row are the columns.
        curves: {run: {term: [(step, value)]}}, one figure per run (see `loss_curves`).
        confusions: {model: confusion matrix}.
        samples: a few test images.
        notes: sentences above the table, for instance what was run.
    """
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_PAGE)
    text = page.render(
        title=title,
        notes=notes,
        columns=list(rows[0]) if rows else [],
        rows=[[_cell(value) for value in row.values()] for row in rows],
        figures={run: _figure(terms) for run, terms in curves.items() if terms},
        confusions={model: _matrix(confusion) for model, confusion in confusions.items()},
        samples=[(_data_url(sample.image), sample.label, sample.answers) for sample in samples],
    )
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _cell(value: Any) -> str:
    if value is None:
        return "n/a"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _matrix(confusion: Confusion) -> dict[str, Any]:
    """Column names, and per class its name and its (count, share of the class) cells."""
    rows = []
    for name, counts in zip(confusion.choices, confusion.counts, strict=True):
        total = max(sum(counts), 1)
        rows.append((name, [(count, round(count / total, 3)) for count in counts]))
    return {"columns": [*confusion.choices, "no label"], "rows": rows}


def _data_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


_INK = "#010203"  # stands for the page's own text colour, which is light in dark mode


def _figure(terms: Mapping[str, Points]) -> Any:
    """Loss curves as inline SVG."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    style = {key: _INK for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")}
    # A fixed salt: the same curves give the same bytes.
    with matplotlib.rc_context({**style, "svg.hashsalt": "vitask", "font.size": 9}):
        figure = Figure(figsize=(5, 3), layout="constrained")
        axes = figure.subplots()
        for name, points in terms.items():
            axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
        axes.set(xlabel="step", ylabel="nats per response token")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False, fontsize=8)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return Markup(svg)  # markup of our own making


_PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  :root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 18%, transparent); --tint: 37 99 235; }
  @media (prefers-color-scheme: dark) { :root { --tint: 96 165 250; } }
  body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
  h3 { font-size: 1rem; font-weight: 600; margin: 0 0 .5rem; }
  .scroll { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; }
  th:first-child, td:first-child { text-align: left; }
  .confusion td { text-align: center; background: rgb(var(--tint) / calc(var(--share) * 65%)); }
  .confusion th { font-weight: 400; font-size: .85rem; hyphens: auto; }
  .confusion th:not(:first-child), .confusion td { padding: .3rem; text-align: center; }
  .grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
  .matrices { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
  .samples { grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
  .grid > * { min-width: 0; }
  @media (max-width: 40rem) { body, .confusion th { font-size: 14px; } th, td { padding: .3rem .4rem; } }
  svg { width: 100%; height: auto; }
  img { width: 8rem; height: 8rem; object-fit: contain; image-rendering: pixelated; }
  dl { margin: .5rem 0 0; font-size: .9rem; } dt { opacity: .7; } dd { margin: 0 0 .35rem; overflow-wrap: anywhere; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for note in notes %}
<p>{{ note }}</p>
{% endfor %}
<h2>Results</h2>
<div class="scroll"><table>
<thead><tr>{% for column in columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}
<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% if figures %}
<h2>Loss by term</h2>
<div class="grid">
{% for run, figure in figures.items() %}
<figure style="margin: 0"><h3>{{ run }}</h3>{{ figure }}</figure>
{% endfor %}
</div>
{% endif %}
{% if confusions %}
<h2>Confusion matrices</h2>
<p>Row: the label. Column: the answer. "no label": the answer named no label, or several.</p>
<div class="grid matrices">
{% for model, matrix in confusions.items() %}
<section class="scroll"><h3>{{ model }}</h3><table class="confusion">
<thead><tr><th></th>{% for column in matrix.columns %}<th scope="col">{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in matrix.rows %}
<tr><th scope="row">{{ name }}</th>
{% for count, share in cells %}<td style="--share: {{ share }}">{{ count }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></section>
{% endfor %}
</div>
{% endif %}
{% if samples %}
<h2>Samples</h2>
<div class="grid samples">
{% for url, label, answers in samples %}
<article><img src="{{ url }}" alt="test image, {{ label }}">
<dl><dt>label</dt><dd><b>{{ label }}</b></dd>
{% for model, answer in answers.items() %}<dt>{{ model }}</dt><dd>{{ answer }}</dd>{% endfor %}
</dl></article>
{% endfor %}
</div>
{% endif %}
</body>
</html>
"""
