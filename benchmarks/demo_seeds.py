"""The demo over several seeds: every table, then mean and standard deviation of each row.

    python benchmarks/demo_seeds.py [--data drawn] [--seeds 0 1 2] [--epochs 1] [--out demo-seeds]

Writes OUT/seed-N (a whole demo each) and OUT/summary.json.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vitask_plugin.demo import demo
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json

METRICS = ("accuracy", "macro_f1", "auc")


def summary(results: list[dict]) -> list[dict]:
    """Per row of the table {"model", "ep", metric: [mean, sample standard deviation] or None}."""
    rows = []
    for same in zip(*(result["rows"] for result in results), strict=True):
        row = {"model": same[0]["model"], "ep": same[0]["ep"]}
        for metric in METRICS:
            values = [one[metric] for one in same]
            known = None not in values
            row[metric] = (
                [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0] if known else None
            )
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("demo-seeds"))
    args = parser.parse_args()

    console = Console()
    results, seconds = [], []
    for seed in args.seeds:
        start = time.monotonic()
        results.append(demo(args.data, args.out / f"seed-{seed}", seed=seed, epochs=args.epochs, console=console))
        seconds.append(time.monotonic() - start)
    rows = summary(results)
    table = Table(title=f"{args.data}: mean ± standard deviation over seeds {', '.join(map(str, args.seeds))}")
    table.add_column("model")
    table.add_column("EP")
    for metric in METRICS:
        table.add_column(metric, justify="right")
    for row in rows:
        figures = ["n/a" if row[metric] is None else "{:.3f} ± {:.3f}".format(*row[metric]) for metric in METRICS]
        table.add_row(row["model"], "yes" if row["ep"] else "no", *figures)
    console.print(table)
    console.print("seconds: " + ", ".join(f"{each:.0f}" for each in seconds), highlight=False)
    write_json(
        args.out / "summary.json",
        {"data": args.data, "seeds": args.seeds, "seconds": seconds, "versions": results[0]["versions"], "rows": rows},
    )


if __name__ == "__main__":
    try:
        main()
    except VITaskError as error:
        sys.exit(f"demo_seeds: error: {error}")
