"""The model card: what was tuned, on what, how, what came of it, and what it is not for."""

from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from vitask_plugin.files import atomic_path
from vitask_plugin.sharing.facts import UNKNOWN_LICENSE, DataSet, Facts, Row, write_facts

CARD_FILE = "README.md"
# Metric -> (the Hub's word, what it is called).
METRICS = {"accuracy": ("accuracy", "accuracy"), "macro_f1": ("f1", "macro-F1"), "auc": ("roc_auc", "AUC")}
_PAPER = "[arXiv 2410.06456](https://arxiv.org/abs/2410.06456)"


def save_card(facts: Facts, folder: str | Path) -> None:
    """Writes `README.md`, in place of what is there, and the facts that it can be written from again."""
    write_facts(facts, folder)
    with atomic_path(Path(folder) / CARD_FILE) as path:
        path.write_text(text(facts), encoding="utf-8")


def text(facts: Facts) -> str:
    """The card as Markdown, with the Hub's metadata in front."""
    parts = (_head(facts), _use(), _data(facts), _training(facts), _figures(facts), _versions(facts))
    return "\n".join(["---", metadata(facts).to_yaml(), "---", "", *(line for part in parts for line in part)])


def metadata(facts: Facts) -> ModelCardData:
    """What the Hub reads; the figures of the card's own model as its `model-index`."""
    own = [result for row in facts.rows if row.own for result in _results(row)]
    return ModelCardData(
        base_model=facts.base.hub,
        library_name=facts.library,
        license=facts.base.license or "unknown",
        pipeline_tag="image-text-to-text",
        tags=["vitask", "vision-language-model", "image-classification"],
        **({"model_name": facts.title, "eval_results": own} if own else {}),
    )


def _results(row: Row) -> Iterator[EvalResult]:
    for name, (kind, title) in METRICS.items():
        value = row.figures.get(name)
        if value is None:
            continue
        interval = row.intervals.get(name)
        yield EvalResult(
            task_type="image-classification",
            dataset_type=row.set,
            dataset_name=row.set,
            dataset_split=row.split,
            metric_type=kind,
            metric_name=f"{title}, {row.model}",
            metric_value=round(value, 4),
            metric_args=None if interval is None else {"interval_95": [round(end, 4) for end in interval]},
        )


def _head(facts: Facts) -> Iterator[str]:
    yield f"# {facts.title}"
    yield ""
    yield "**Not for clinical use.** It answers with one of the labels below, for images like those it was tuned on."
    yield ""
    license = facts.base.license or "unknown: see the base model"
    yield f"- base model: {facts.base.name}; its licence holds for this one too: {license}"
    yield f"- method: VITask ({_PAPER}): a small image classifier, the task-specific model (TSM), teaches the model"
    yield ""


def _use() -> Iterator[str]:
    yield from ("## Intended use and limits", "")
    yield "For research on image classification by vision-language models. It has seen the classes below and no others:"
    yield "an image of anything else is answered with one of them too. Its probabilities are not calibrated unless the"
    yield "folder holds a `calibration.json`. Figures hold for images from the sources below; other scanners, patients"
    yield "and preparations can be far worse. It has not been examined for bias between groups of patients."
    yield ""


def _data(facts: Facts) -> Iterator[str]:
    yield from ("## Data", "")
    for one in facts.data:
        yield f"**{one.name}**{': ' + one.modality if one.modality else ''}; licence: {one.license or UNKNOWN_LICENSE}"
        yield ""
        yield from _classes(one)
    if not facts.data:
        yield from ("General instruction data alone.", "")


def _classes(one: DataSet) -> Iterator[str]:
    splits = [split for split, counts in one.counts.items() if counts]
    if not splits:
        return
    yield f"| class | {' | '.join(splits)} |"
    yield f"|---|{'---:|' * len(splits)}"
    for name in one.counts[splits[0]]:
        yield f"| {name} | {' | '.join(str(one.counts[split].get(name, 0)) for split in splits)} |"
    yield ""


def _training(facts: Facts) -> Iterator[str]:
    yield from ("## Training", "")
    yield from (f"- {line}" for line in facts.training)
    yield ""


def _figures(facts: Facts) -> Iterator[str]:
    yield from ("## Results", "")
    if not facts.rows:
        yield from ("Not judged yet: `vitask card FOLDER --results RESULTS` writes the figures of lmms-eval here.", "")
        return
    yield "Judged by lmms-eval, with 95% intervals. EP: the task-specific model's exemplar is in the prompt."
    yield ""
    yield f"| set | split | model | {' | '.join(title for _, title in METRICS.values())} | n | unmapped |"
    yield f"|---|---|---|{'---:|' * (len(METRICS) + 2)}"
    for row in facts.rows:
        cells = [_cell(row, name) for name in METRICS]
        unmapped = "n/a" if row.unmapped is None else f"{row.unmapped:g}"
        yield f"| {' | '.join([row.set, row.split, row.model, *cells, str(row.n), unmapped])} |"
    yield ""


def _cell(row: Row, name: str) -> str:
    value, interval = row.figures.get(name), row.intervals.get(name)
    if value is None:
        return "n/a"
    return f"{value:.3f}" if interval is None else f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _versions(facts: Facts) -> Iterator[str]:
    yield from ("## Versions", "")
    yield ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    yield ""
