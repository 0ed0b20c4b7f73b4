"""The demo over several seeds: every table, then mean and standard deviation of each row.

    python benchmarks/demo_seeds.py [--host hf] [--data drawn] [--seeds 0 1 2] [--epochs 1] [--out demo-seeds]
        [--split val] [--set CRT_WEIGHT=0.3 ...]

Writes OUT/seed-N (a whole demo each) and OUT/summary.json. `--set` changes one of `demo.Settings`, and `--split val` is
where to choose among them: figures of test are for what was chosen. On the drawn data, without --set, it ends with
status 1 if for any seed VITask with EP is more than 0.02 below the TSM or less than 0.1 above vanilla tuning, or VITask
without EP is not above vanilla.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.demo import SPLITS, demo
from vitask_plugin.demo_hosts import HOSTS, Settings
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.metric_list import MAIN
from vitask_plugin.files import write_json


def changed(settings: Settings, words: Sequence[str]) -> Settings:
    """A host's settings but for those of NAME=VALUE.

    Raises:
        VITaskError: an unknown name, or a value that is no number.
    """
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    values = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            values[name.lower()] = kinds[name.lower()](value)
        except (KeyError, ValueError):
            raise VITaskError(f"--set {word!r} is no NAME=NUMBER; the names are {', '.join(kinds)}") from None
    return replace(settings, **values)


def summary(results: list[dict]) -> list[dict]:
    """Per row of the table {"model", "ep", metric: [mean, sample standard deviation] or None}."""
    rows = []
    for same in zip(*(result["rows"] for result in results), strict=True):
        row = {"model": same[0]["model"], "ep": same[0]["ep"]}
        for metric in MAIN:
            values = [one[metric] for one in same]
            known = None not in values
            row[metric] = (
                [statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0] if known else None
            )
        rows.append(row)
    return rows


def broken_promises(result: dict) -> list[str]:
    """What the demo promises of the drawn data and this run does not hold, in words."""
    accuracy = {(row["model"], row["ep"]): row["accuracy"] for row in result["rows"]}
    tsm, vanilla = accuracy["tsm", False], accuracy["vanilla", False]
    plain, prompted = accuracy["vitask", False], accuracy["vitask", True]
    promises = {
        f"VITask with EP ({prompted:.3f}) is within 0.02 of the TSM ({tsm:.3f})": prompted >= tsm - 0.02,
        f"VITask with EP ({prompted:.3f}) is 0.1 above vanilla ({vanilla:.3f})": prompted >= vanilla + 0.1,
        f"VITask without EP ({plain:.3f}) is above vanilla ({vanilla:.3f})": plain > vanilla,
    }
    return [f"seed {result['seed']}: it does not hold that {text}" for text, held in promises.items() if not held]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host", choices=HOSTS, default="llava", help="as of `vitask demo`")
    parser.add_argument("--data", default="drawn")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("demo-seeds"))
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="images to judge on")
    parser.add_argument("--set", nargs="+", default=[], metavar="NAME=VALUE", help="settings to try in place of these")
    args = parser.parse_args()

    settings = changed(HOSTS[args.host].settings, args.set)
    console = Console()
    results, seconds = [], []
    for seed in args.seeds:
        start = time.monotonic()
        run = {"host": args.host, "seed": seed, "epochs": args.epochs, "split": args.split, "settings": settings}
        results.append(demo(args.data, args.out / f"seed-{seed}", console=console, **run))
        seconds.append(time.monotonic() - start)
    rows = summary(results)
    table = Table(
        title=f"{args.data}, {args.split}: mean ± standard deviation over seeds {', '.join(map(str, args.seeds))}"
    )
    table.add_column("model")
    table.add_column("EP")
    for metric in MAIN:
        table.add_column(metric, justify="right")
    for row in rows:
        cells = ["n/a" if row[metric] is None else "{:.3f} ± {:.3f}".format(*row[metric]) for metric in MAIN]
        table.add_row(row["model"], "yes" if row["ep"] else "no", *cells)
    console.print(table)
    console.print("seconds: " + ", ".join(f"{each:.0f}" for each in seconds), highlight=False)
    write_json(
        args.out / "summary.json",
        {
            **HOSTS[args.host].record,
            **{name: results[0][name] for name in ("data", "split", "settings", "versions")},
            **{"seeds": args.seeds, "seconds": seconds, "rows": rows},
        },
    )
    if (
        args.data == DRAWN.flag
        and not args.set
        and (broken := [line for result in results for line in broken_promises(result)])
    ):
        sys.exit("\n".join(broken))


if __name__ == "__main__":
    try:
        main()
    except VITaskError as error:
        sys.exit(f"demo_seeds: error: {error}")
