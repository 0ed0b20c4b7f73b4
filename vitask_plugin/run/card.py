"""The model card of a run: what was tuned, on what, how, and what came of it."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vitask_plugin.data.dataset import LABELS_FILE, SPLITS
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.files import read_json
from vitask_plugin.run.judging_stages import ARMS, RECIPE_FILE
from vitask_plugin.run.plan import exemplar_kind, sources_of
from vitask_plugin.run.recipe import TINY, Recipe


def card(out: Path, recipe: Recipe, results: Mapping[str, Any]) -> str:
    """The card as Markdown.

    Args:
        recipe: with its settings decided. results: what `results.json` holds.
    """
    return "\n".join([*_head(recipe), *_data(out, recipe), *_training(recipe), *_figures(results), *_versions(results)])


def _base(recipe: Recipe) -> str:
    return "a tiny model of random weights" if recipe.model == TINY else Path(recipe.model).name


def _head(recipe: Recipe) -> Iterator[str]:
    yield from ("---", "tags: [vitask, vision-language-model, image-classification]", "---", "")
    yield f"# {_base(recipe)}, tuned by VITask"
    yield ""
    yield "**Not for clinical use.** It answers with one of the labels below, for images like those it was tuned on."
    yield ""
    yield f"- base model: {_base(recipe)}; its licence holds for this one too"
    yield "- method: VITask (arXiv 2410.06456)"
    yield ""


def _data(out: Path, recipe: Recipe) -> Iterator[str]:
    yield from ("## Data", "")
    for one in sources_of(recipe, out):
        labels = read_json(one.folder / LABELS_FILE, "label set")
        counts = {split: _counts(one.folder / f"{split}.json", labels["choices"]) for split in SPLITS}
        there = [split for split in SPLITS if counts[split]]
        yield f"**{one.name}**: {labels['modality']}"
        yield ""
        yield f"| class | {' | '.join(there)} |"
        yield f"|---|{'---:|' * len(there)}"
        for name in counts["train"]:
            yield f"| {name} | {' | '.join(str(counts[split][name]) for split in there)} |"
        yield ""


def _counts(path: Path, choices: list[str]) -> dict[str, int]:
    """{class: images}; of several labels an image counts for each of its own."""
    if not path.is_file():
        return {}
    found: Counter[int] = Counter()
    for sample in read_samples(path):
        label = sample["vitask"]["label"]
        found.update(label if isinstance(label, list) else [label])
    return {name: found[index] for index, name in enumerate(choices)}


def _training(recipe: Recipe) -> Iterator[str]:
    tsm, training = recipe.tsm, recipe.training
    weights = f"LoRA of rank {training.lora_r}" if training.lora else "all weights"
    start = "pretrained" if tsm.pretrained else "from random weights"
    more = ", ".join(f"{name}={value}" for name, value in training.flags.items()) or "none"
    yield from ("## Training", "")
    if tsm.folder is None:
        yield f"- task-specific model: {tsm.arch} ({start}), {tsm.epochs} epochs"
    else:
        yield f"- task-specific model: {Path(tsm.folder).name}, made before"
    yield f"- exemplar: {exemplar_kind(recipe)}"
    yield f"- stage 1: {training.stage1_epochs:g} epochs, stage 2: {training.stage2_epochs:g} epochs; {weights}"
    batch = f"{training.batch_size} x {training.accumulation} samples per process"
    yield f"- learning rate {training.learning_rate:g}, {batch}"
    yield f"- more flags: {more}"
    yield f"- seed: {recipe.seed}; the whole recipe: `{RECIPE_FILE}`"
    yield ""


def _figures(results: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Results", "", "Judged by lmms-eval. EP: the task-specific model's exemplar is in the prompt.", "")
    yield "| set | split | model | accuracy | macro-F1 | AUC | n | unmapped |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    for row in results["rows"]:
        figures = (row[name] for name in ("accuracy", "macro_f1", "auc"))
        cells = ["n/a" if value is None else f"{value:.3f}" for value in figures]
        counts = row["n"], row["unmapped"]
        yield f"| {' | '.join([row['set'], row['split'], ARMS[row['arm']], *cells, *map(str, counts)])} |"
    yield ""


def _versions(results: Mapping[str, Any]) -> Iterator[str]:
    yield from ("## Versions", "")
    yield ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    yield ""
