"""How the cost of a VITask step grows with batch size, image tokens, continuation length and number of branches.

    python benchmarks/growth.py --json FILE [--layers 1 --vocabulary 8000 --batch 2 --repeats 4]
    python benchmarks/growth_plot.py FILE docs/step_cost.svg

The flags in brackets are those of the picture in docs/: three minutes on 2 CPU cores instead of half an hour. The
number of layers does not change a ratio, their width does, through attention's share.

Each point is measured as `step_cost.py` measures, and stands beside what counting tokens predicts. The measure is the
step time over that of vanilla tuning with logits at the answers only (see `lean_vanilla` there): counting tokens says
nothing about logits that nobody reads, and those would make every ratio smaller. All labels are equally frequent here,
so that a batch of two or more mostly holds its negatives; `step_cost.py` has the proportions of real data.
"""

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from measuring import append_line, end_with_a_sentence, machine, mean_ratio, median_ratio, percentiles
from rich.console import Console
from rich.table import Table
from steps import Steps, measure_time
from workload import VARIANTS, Batches, Settings, Variant, add_flags, make_workload, settings_of

BASELINE = "lean_vanilla"
MEASURED = {
    BASELINE: VARIANTS[BASELINE],
    "stage1_packed": VARIANTS["stage1_packed"],
    "stage2_packed": VARIANTS["stage2_packed"],
    "stage1_branches": Variant("VITask stage 1, branch by branch", 1, engine="branches"),
    "stage2_branches": VARIANTS["stage2_branches"],
}


def predicted(name: str, *, prefix: int, continuation: int, answer: int, alone: bool) -> float:
    """Decoder positions of a step over vanilla's, counted from the lengths of one sample.

    A prefix is laid out once; stage 1 adds a continuation with one exemplar token, stage 2 an answer to the question
    that the negative image is asked already. Branch by branch, each has a whole sequence of its own.

    Args:
        prefix, continuation, answer: tokens; the continuation ends in the answer.
        alone: a batch of one sample, whose negative image is an extra prefix and asked the whole question.
    """
    vanilla = prefix + continuation
    positions = {
        BASELINE: vanilla,
        "stage1_packed": vanilla + 1 + continuation,
        "stage2_packed": vanilla + 1 + continuation + (vanilla if alone else answer),
        "stage1_branches": 2 * vanilla + 1,
        "stage2_branches": 3 * vanilla + 1,
    }
    return positions[name] / vanilla


def measure_point(settings: Settings, repeats: int) -> dict[str, Any]:
    """Ratio, prediction and counted positions of every variant at one geometry."""
    with tempfile.TemporaryDirectory(prefix="growth-") as directory:
        batches = Batches(make_workload(settings, Path(directory), balanced=True), repeats)
        times = measure_time(Steps(batches), batches, MEASURED, repeats)
        geometry = batches.geometry()
    lengths = {
        "prefix": geometry["prefix_text"] + settings.image_tokens,
        "continuation": round(sum(geometry["continuation"]) / 2),
        "answer": round(sum(geometry["answer"]) / 2),
    }
    seconds = {name: times[name]["seconds"] for name in MEASURED}
    return {
        "batch": settings.batch,
        "image_tokens": settings.image_tokens,
        **lengths,
        "seconds": {name: percentiles(seconds[name]) for name in MEASURED},
        "ratio": {name: median_ratio(seconds[name], seconds[BASELINE]) for name in MEASURED},
        "predicted": {name: predicted(name, **lengths, alone=settings.batch == 1) for name in MEASURED},
        "positions": {name: mean_ratio(times[name]["positions"], times[BASELINE]["positions"]) for name in MEASURED},
    }


def table_of(sweeps: Mapping[str, list[dict[str, Any]]]) -> Table:
    table = Table(
        title="step time / vanilla with logits at the answers: measured (by counting tokens)", title_justify="left"
    )
    for column in ("batch", "image", "text"):
        table.add_column(column, justify="right")
    names = [name for name in MEASURED if name != BASELINE]
    for name in names:
        table.add_column(MEASURED[name].words.removeprefix("VITask ").replace(", ", "\n"), justify="right")
    for points in sweeps.values():
        for point in points:
            table.add_row(
                *(str(point[key]) for key in ("batch", "image_tokens", "continuation")),
                *(f"{point['ratio'][name]:.2f} ({point['predicted'][name]:.2f})" for name in names),
            )
        table.add_section()
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    add = parser.add_argument
    add("--batches", type=int, nargs="*", default=[1, 2, 4, 8], metavar="N", help="(default 1 2 4 8)")
    add("--images", type=int, nargs="*", default=[144, 576, 1296, 2916], metavar="N", help="image tokens, squares")
    add("--continuations", type=int, nargs="*", default=[60, 80, 160, 320], metavar="N", help="(default 60 80 160 320)")
    add("--repeats", type=int, default=5, metavar="N", help="measured rounds per point (default 5)")
    add("--json", type=Path, metavar="FILE", help="append the result as one line")
    args = parser.parse_args(argv)
    base = settings_of(args)
    torch.set_num_threads(base.threads)
    console = Console()
    values = {"batch": args.batches, "image_tokens": args.images, "continuation": args.continuations}
    measured: dict[Settings, dict[str, Any]] = {}  # the sweeps cross at `base`

    def point(settings: Settings) -> dict[str, Any]:
        if settings not in measured:
            with console.status(
                f"batch {settings.batch}, {settings.image_tokens} image tokens, continuation {settings.continuation}"
            ):
                measured[settings] = measure_point(settings, args.repeats)
        return measured[settings]

    sweeps = {
        field: [point(replace(base, **{field: size})) for size in sorted({*sizes, getattr(base, field)})]
        for field, sizes in values.items()
    }
    result = {
        "config": {**asdict(base), "repeats": args.repeats},
        **machine(base.device, base.threads),
        "base": point(base),
        "sweeps": sweeps,
    }
    console.print(table_of(sweeps))
    if args.json:
        append_line(args.json, result)


if __name__ == "__main__":
    end_with_a_sentence(main)
