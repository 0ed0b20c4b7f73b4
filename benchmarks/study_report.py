"""docs/STUDY.md out of the rows of `study.py`: `python benchmarks/study_report.py [--rows FILE] [--out FILE]`.

Nothing is computed but from rows; what has no row is said to be missing.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from study import ROWS, SETTINGS_ROWS, read_rows
from study_claims import ABSENT, MARGIN, UNMEASURED, Answer, Rows, allowed_together, answers, by_key
from study_plan import ARMS, SEEDS, SETS, plan

from vitask_plugin.evaluation.paired import FEWEST_SEEDS, over_seeds
from vitask_plugin.files import atomic_path

OUT = Path(__file__).resolve().parents[1] / "docs" / "STUDY.md"
RUNBOOK = Path(__file__).resolve().parent / "study_runbook.md"

METHOD = """\
# Does it work?

Made by `python benchmarks/study_report.py` from `benchmarks/results/study.jsonl`, one row a run; nothing here is
written by hand but the words. `python benchmarks/study.py` makes the rows (its docstring has the commands), and goes on
where it was stopped.

**Question.** On real images, with a model that has seen pictures before: does VITask beat plain tuning and the
classifier that it is taught by, which of its parts does it, and do simpler ways do as well?

**Method.** A small real VLM (`benchmarks/generalist.py`: SmolLM2 behind a frozen DINOv2, aligned on captioned pictures)
is tuned with LoRA by `python -m vitask_plugin.hf.train`; the TSM is an EfficientNet-Lite0 from ImageNet weights,
trained by `vitask tsm train` on the same images. Vanilla tuning sees as many images as VITask's two stages, in batches
of the same size; `vanilla_compute` as many as take as long. Answers are the label that the model finds likeliest, by
the scores of the `_score` tasks. Splits are those of the archives, by patient or source picture where these are known.
Everything is chosen on val; the test split is read once per row.

**How to read the claims.** Differences are in accuracy on test, means over sets. The first interval is over seeds
(paired t-test of the mean over sets; another seed is another TSM and another tuning), the second over test images
(paired bootstrap, these very weights). A claim *holds* where the interval over seeds is above 0, or, of "at least",
above -{margin}; it *does not hold* where that interval is below; else it is *unclear*. With fewer than {fewest} seeds
it is unclear whatever the mean says.
"""


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *lines)) + "\n"


def figure(value: float | None, *, sign: bool = False) -> str:
    """.815, or +.012."""
    if value is None:
        return ""
    text = f"{value:+.3f}" if sign else f"{value:.3f}"
    return text.replace("0.", ".", 1) if abs(value) < 1 else text


def span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{figure(interval[0], sign=True)} to {figure(interval[1], sign=True)}"


def state(rows: Rows) -> str:
    """How much of the plan there is."""
    wanted = plan([name for name in SETS if name != "breast"], list(ARMS), SEEDS)
    there = {(data, arm, seed) for data, arm, seed, _, _ in rows}
    done = [run for run in wanted if (run.data, run.arm, run.seed) in there]
    said = f"**State.** {len(done)} of {len(wanted)} runs of the plan have rows"
    lines = []
    for arm in ARMS:
        own = [run for run in wanted if run.arm == arm]
        mine = [run for run in done if run.arm == arm]
        if len(mine) < len(own):
            lines.append(f"{arm} {len(mine)}/{len(own)}")
    return f"{said}; not whole: {', '.join(lines)}.\n" if lines else f"{said}.\n"


def claims_table(found: Sequence[Answer], corrected: Sequence[float | None]) -> str:
    lines = []
    for one, p in zip(found, corrected, strict=True):
        seeds = "" if one.sets is None else ", ".join(f"{data} ({len(own)})" for data, own in one.sets.items())
        cells = [one.claim.text, f"**{one.verdict}**", figure(one.mean, sign=True), span(one.seeds_interval)]
        lines.append(
            [*cells, "" if p is None else f"{p:.3f}", span(one.images_interval), figure(one.f1, sign=True), seeds]
        )
    lines += [[text, f"**{ABSENT}**", *[""] * 6] for text in UNMEASURED]
    head = ["claim", "", "mean", "95 % over seeds", "p (Holm)", "95 % over images", "macro-F1", "sets (seeds)"]
    return table(head, lines)


def arm_lines(rows: Rows, sets: Sequence[str], cell: Callable[[list[Any]], str], instructions: str) -> list[list[str]]:
    """A line for each arm and way of asking that has rows: its name, and of each set a cell out of the test figures."""
    lines = []
    for arm in ARMS:
        for ep in (False, True):
            found = {
                data: [rows[key] for key in sorted(rows) if key[:2] == (data, arm) and key[3:] == (ep, instructions)]
                for data in sets
            }
            if any(found.values()):
                name = f"{arm}{' + EP' if ep else ''}"
                lines.append([name, *(cell([row["test"] for row in own]) if own else "" for own in found.values())])
    return lines


def mean_of(name: str) -> Callable[[list[Any]], str]:
    """Mean and, of enough seeds, half the width of its 95 % interval; of fewer, how many there are."""

    def cell(found: list[Any]) -> str:
        values = [one[name] for one in found if one.get(name) is not None]
        if not values:
            return ""
        text = figure(statistics.fmean(values))
        if len(values) >= FEWEST_SEEDS:
            interval = over_seeds(values).interval
            return f"{text} ± {figure((interval[1] - interval[0]) / 2)}" if interval else text
        return f"{text} (n={len(values)})" if len(values) > 1 else text

    return cell


def differing(found: list[Any]) -> str:
    """How often the answers are the TSM's, and who was right where they are not."""
    apart = [one["where_they_differ"] for one in found if "where_they_differ" in one]
    if not apart:
        return ""
    agrees = statistics.fmean(one["agrees_with_tsm"] for one in found)
    counts = [sum(one[name] for one in apart) for name in ("model_right", "tsm_right", "neither")]
    return f"{figure(agrees)}: {counts[0]} / {counts[1]} / {counts[2]}"


def below_probe(rows: Rows, sets: Sequence[str]) -> str:
    """Where vanilla stays below the linear probe on its own tower."""
    found = []
    for data in sets:
        probe = next((row for key, row in rows.items() if key[:2] == (data, "linear_probe")), None)
        own = [
            row["test"]["accuracy"]
            for key, row in rows.items()
            if key[:2] == (data, "vanilla") and key[4] == "complete"
        ]
        if probe and own and statistics.fmean(own) < probe["test"]["accuracy"]:
            found.append(f"{data} ({figure(statistics.fmean(own))} against {figure(probe['test']['accuracy'])})")
    if not found:
        return ""
    return (
        f"Vanilla stays below the linear probe on its own tower, so it is no baseline there, on {', '.join(found)}.\n"
    )


def on_training(rows: Rows, sets: Sequence[str]) -> str:
    found = []
    for data in sets:
        own = [row for key, row in rows.items() if key[:2] == (data, "tsm") and "train" in row]
        if own:
            pair = (statistics.fmean(row[split]["accuracy"] for row in own) for split in ("train", "test"))
            found.append(f"{data} {' / '.join(map(figure, pair))}")
    return f"The TSM on its own training images / on test: {'; '.join(found)}.\n" if found else ""


def costs(rows: Rows) -> str:
    lines = []
    for arm in ARMS:
        own = {(key[0], key[2]): row for key, row in rows.items() if key[1] == arm}
        if own:
            wall, computed = ([row[name] / 60 for row in own.values()] for name in ("seconds", "cpu_seconds"))
            lines.append([arm, str(len(own)), f"{statistics.fmean(wall):.1f}", f"{statistics.fmean(computed):.1f}"])
    return table(["arm", "runs", "minutes a run", "of which computed"], lines)


def about(rows: Rows) -> str:
    """What the rows were made with: settings, machines, versions."""
    settings, machines = {}, {}
    for row in rows.values():
        key = ", ".join(f"{name} {value}" for name, value in row["config"]["settings"].items())
        if row["arm"] != "tsm":
            settings[key] = settings.get(key, 0) + 1
        versions = ", ".join(f"{name} {value}" for name, value in row["versions"].items() if value)
        machines[f"{row['processor']}, {row['threads']} thread(s): {versions}"] = True
    lines = [f"- settings of {count} rows: {key}" for key, count in settings.items()]
    return "\n".join([*lines, *(f"- {one}" for one in machines)]) + "\n"


def chosen(rows: Sequence[dict[str, Any]]) -> str:
    """Rows that settings were chosen by, on val."""
    if not rows:
        return "No row yet: the settings are first guesses.\n"
    lines = []
    for row in rows:
        usual = row["config"]["settings"]
        name = f"{row['data']}, {row['arm']}{' + EP' if row['ep'] else ''}, seed {row['seed']}"
        if row["instructions"] == "complete":
            asked = f"{usual.get('steps', '')} / {usual.get('learning_rate', '')}"
            lines.append([name, asked, figure(row["val"]["accuracy"]), figure(row["val"]["loss"])])
    return table(["run", "steps of a stage / rate", "val accuracy", "val loss"], lines)


def page(rows: Rows, settings_rows: Sequence[dict[str, Any]]) -> str:
    """The whole document."""
    sets = allowed_together(rows)
    parts = [METHOD.format(margin=f"{MARGIN:.2f}".lstrip("0"), fewest=FEWEST_SEEDS), state(rows)]
    if not rows:
        parts.append("There are no rows yet.\n")
    found, corrected = answers(rows, sets)
    parts += ["## The claims\n", claims_table(found, corrected)]
    if rows:
        every = [name for name in SETS if any(key[0] == name for key in rows)]
        n = [str(next(row for key, row in rows.items() if key[0] == data)["test"]["n"]) for data in every]
        head = ["", *(f"{data} ({count})" for data, count in zip(every, n, strict=True))]
        tables = [
            (f"{title} on test (images), mean over seeds", mean_of(name), "complete")
            for title, name in (("Accuracy", "accuracy"), ("Macro-F1", "macro_f1"), ("AUC", "auc"))
        ]
        tables.append(("Accuracy on test with incomplete instructions", mean_of("accuracy"), "incomplete"))
        title = "Agreement with the TSM, and where the answers differ: model right / TSM right / neither"
        tables.append((title, differing, "complete"))
        for title, cell, instructions in tables:
            lines = [line for line in arm_lines(rows, every, cell, instructions) if any(line[1:])]
            parts += [f"## {title}\n", table(head, lines)] if lines else []
        parts += [below_probe(rows, every), on_training(rows, every)]
        parts += ["## Costs\n", costs(rows), "## What the rows were made with\n", about(rows)]
    parts += ["## Settings, chosen on val\n", chosen(settings_rows)]
    parts.append(RUNBOOK.read_text(encoding="utf-8"))
    return "\n".join(part for part in parts if part)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--settings-rows", type=Path, default=SETTINGS_ROWS, metavar="FILE")
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE")
    args = parser.parse_args(argv)
    text = page(by_key(read_rows(args.rows)), read_rows(args.settings_rows))
    with atomic_path(args.out) as path:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
