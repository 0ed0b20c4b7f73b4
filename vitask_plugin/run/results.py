"""`python -m vitask_plugin.run.results OUT`: the figures of a run as `results.json`, and its model card `README.md`.

`results.json` holds no time and no path, so that the same recipe on the same machine gives the same bytes.
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.intervals import interval_of_mean
from vitask_plugin.files import atomic_path, write_json
from vitask_plugin.report.results import TaskResult, headline, own_task, read_file, results_files, split_of, split_task
from vitask_plugin.run.card import card
from vitask_plugin.run.judging_stages import ARMS, CARD_FILE, EVALUATION, RECIPE_FILE, RESULTS_FILE
from vitask_plugin.run.plan import sources_of
from vitask_plugin.run.recipe import Recipe, filled
from vitask_plugin.run.recipe_file import parsed, read_recipe
from vitask_plugin.run.versions import versions

SPLITS = ("val", "test")


def results(out: Path, recipe: Recipe, arms: Sequence[str]) -> dict[str, Any]:
    """What `results.json` holds: a row for each arm, split and set, and the mean over several sets.

    Raises:
        VITaskError: an arm without results of lmms-eval, or without those of a set of the recipe on one of its splits.
    """
    rows = [row for arm in arms for row in _rows(arm, out / EVALUATION / arm)]
    found = {(row["arm"], row["split"], row["set"]) for row in rows if row["n"]}
    for arm, split, one in product(arms, recipe.evaluate.splits, sources_of(recipe, out)):
        name = _set_name(own_task(one.folder.name) if one.medmnist is None else one.medmnist.task)
        if (arm, split, name) not in found:
            raise VITaskError(
                f"{str(out / EVALUATION / arm)!r} holds no judged image of {name} on {split}: that evaluation failed "
                "or its files were removed; remove the folder, and run the same `vitask run` again"
            )
    return {
        "recipe": recipe.digest,
        "model": Path(recipe.model or "").name,
        "seed": recipe.seed,
        "versions": versions(),
        "rows": rows,
    }


def _rows(arm: str, folder: Path) -> list[dict[str, Any]]:
    """Split by split: each set, and where there are several their mean."""
    latest: dict[str, TaskResult] = {}
    for path in results_files(folder):
        latest |= read_file(path)[1]
    rows = []
    for split in SPLITS:
        own = [_row(arm, split, task, latest) for task in sorted(latest) if _is_of(task, split, latest)]
        rows += [*own, *([_mean(own)] if len(own) > 1 else [])]
    return rows


def _is_of(task: str, split: str, results: Mapping[str, TaskResult]) -> bool:
    """Whether it is a set on this split: no group, and not the same set by another way of asking."""
    return split_of(task)[1] == split and not split_task(split_of(task)[0])[1] and not results[task].group


def _set_name(task: str) -> str:
    return task.removeprefix("vitask_")


def _row(arm: str, split: str, task: str, results: Mapping[str, TaskResult]) -> dict[str, Any]:
    own, (figures, intervals) = results[task], headline(results, task)
    return {
        "set": _set_name(split_of(task)[0]),
        "split": split,
        "arm": arm,
        **figures,
        "intervals": intervals,
        "n": len(own.answers),
        "unmapped": own.metrics.get("unmapped"),
    }


def _mean(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The plain mean over sets, as in the paper, and all their images."""
    means: dict[str, float | None] = {}
    for name in ("accuracy", "macro_f1", "auc"):
        values = [row[name] for row in rows]
        means[name] = None if None in values else sum(values) / len(values)
    sums = {name: sum(row[name] for row in rows) for name in ("n", "unmapped")}
    known = [name for name in means if all(name in row["intervals"] for row in rows)]
    between = {name: interval_of_mean([row["intervals"][name] for row in rows]) for name in known}
    place = {"set": f"mean of {len(rows)} sets", "split": rows[0]["split"], "arm": rows[0]["arm"]}
    return {**place, **means, "intervals": between, **sums}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Writes the figures of a `vitask run` and its model card.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the run")
    parser.add_argument("--arms", nargs="+", required=True, choices=ARMS, help="what was judged")
    parser.add_argument("--digest", metavar="HEX", help="of the recipe that was run; the one in OUT has to have it")
    args = parser.parse_args()
    path = args.out / RECIPE_FILE
    recipe = filled(parsed(read_recipe(str(path))))
    if args.digest not in (None, recipe.digest):
        raise VITaskError(
            f"{str(path)!r} has the digest {recipe.digest[:12]}, and the recipe that was run {args.digest[:12]}: it "
            "has changed meanwhile; run the same `vitask run` again"
        )
    found = results(args.out, recipe, args.arms)
    write_json(args.out / RESULTS_FILE, found)
    with atomic_path(args.out / CARD_FILE) as path:
        path.write_text(card(args.out, recipe, found), encoding="utf-8")


if __name__ == "__main__":
    main()
