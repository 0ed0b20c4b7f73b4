"""The model card of a run: what was tuned, on what, how, and what came of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.data.dataset import LABELS_FILE, SPLITS
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.formats.json_text import read_json
from vitask_plugin.run.judging_stages import ARMS, RECIPE_FILE
from vitask_plugin.run.plan import exemplar_kind, sources_of
from vitask_plugin.run.recipe import TINY, Recipe
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import text
from vitask_plugin.sharing.facts import BaseModel, Counts, DataSet, Facts, Row, class_counts, license_of

_OWN = ("vitask", "vitask-ep")  # arms of the model that the card is about


def card(out: Path, recipe: Recipe, results: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        recipe: with its settings decided. results: what `results.json` holds.
    """
    base = BaseModel("a tiny model of random weights") if recipe.model == TINY else base_model(recipe.model)
    facts = Facts(
        title=f"{base.name}, tuned by VITask",
        library="vitask",
        base=base,
        data=tuple(_data(out, recipe)),
        training=tuple(_training(recipe)),
        versions=results["versions"],
        rows=tuple(_row(row) for row in results["rows"]),
    )
    return text(facts)


def _data(out: Path, recipe: Recipe) -> Iterator[DataSet]:
    for one in sources_of(recipe, out):
        labels = read_json(one.folder / LABELS_FILE, "label set")
        counts = {split: _counts(one.folder / f"{split}.json", labels["task"]) for split in SPLITS}
        yield DataSet(one.name, labels["modality"], license_of(labels["task"]) if one.medmnist else None, counts)


def _counts(path: Path, task: str) -> Counts:
    return class_counts(read_samples(path)).get(task, {}) if path.is_file() else {}


def _training(recipe: Recipe) -> Iterator[str]:
    tsm, training = recipe.tsm, recipe.training
    weights = f"LoRA of rank {training.lora_r}" if training.lora else "all weights"
    start = "pretrained" if tsm.pretrained else "from random weights"
    if tsm.folder is None:
        yield f"task-specific model: {tsm.arch} ({start}), {tsm.epochs} epochs; more flags: {_listed(tsm.flags)}"
    else:
        yield f"task-specific model: {Path(tsm.folder).name}, made before"
    yield f"exemplar: {exemplar_kind(recipe)}"
    yield f"stage 1: {training.stage1_epochs:g} epochs, stage 2: {training.stage2_epochs:g} epochs; {weights}"
    batch = f"{training.batch_size} x {training.accumulation} samples per process"
    yield f"learning rate {training.learning_rate:g}, {batch}"
    yield f"more flags: {_listed(training.flags)}"
    yield f"seed: {recipe.seed}; the whole recipe: `{RECIPE_FILE}`"


def _listed(flags: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in flags.items()) or "none"


def _row(row: Mapping[str, Any]) -> Row:
    return Row(
        set=row["set"],
        split=row["split"],
        model=ARMS[row["arm"]],
        figures={name: row[name] for name in ("accuracy", "macro_f1", "auc")},
        intervals=row["intervals"],
        n=row["n"],
        unmapped=row["unmapped"],
        own=row["arm"] in _OWN,
    )
