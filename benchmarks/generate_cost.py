"""What an answer in free text costs when an image is asked one question or several.

    python benchmarks/generate_cost.py [--questions 1 2 4] [--batch 4] [--repeats 5] [--json FILE]

Several tasks in one run of lmms-eval ask about the same images (with and without the label set, say). `vitask_llava`
takes such questions in one batch, encodes each image once and computes the prefix they share once. Three ways, from
requests to answers, `--new-tokens` each:

- "shared": `vitask_llava`, all questions handed over together;
- "apart": `vitask_llava`, one task after the other, so that nothing is shared;
- "stock": lmms-eval's stock `llava`, its own code on the same weights, all questions together.

The questions differ in their words and are equally long, `--instruction` tokens. Every batch holds `--batch` images
times the number of questions. The ways take turns in one process; a ratio is the median over rounds.
"""

import argparse
from typing import Any

from answering import Run, StockLlava, add_flags, lengthened, measure_time, models, request, show_images
from lmms_eval.api.instance import Instance
from measuring import append_line, end_with_a_sentence, machine, median_ratio, percentiles
from rich.console import Console
from rich.table import Table

from vitask_plugin.evaluation.lmms_llava import VITaskLlava

WAYS = {"shared": "shared", "apart": "one task at a time", "stock": "stock llava"}


def runs(ours: VITaskLlava, stock: StockLlava, questions: int, args: argparse.Namespace) -> dict[str, Run]:
    """By way, what to time, and how many answers it gives."""
    tasks, stock_requests = [], []
    for number in range(questions):
        task = f"task {number}"
        show_images(ours, task, args.batch)
        question = lengthened(ours, request("generate_until", task, f"Analyze {number}", {}, 0), args.instruction)

        def made(task: str = task, question: str = question) -> list[Instance]:
            settings = {"max_new_tokens": args.new_tokens}
            return [request("generate_until", task, question, dict(settings), image) for image in range(args.batch)]

        tasks.append(made())
        stock_requests += made()  # its own, for it changes their settings
    together = [each for task in tasks for each in task]

    def apart() -> list[str]:
        return [answer for task in tasks for answer in ours.generate_until(task)]

    return {
        "shared": (lambda: ours.generate_until(together), len(together)),
        "apart": (apart, len(together)),
        "stock": (lambda: stock.generate_until(stock_requests), len(together)),
    }


def measure(args: argparse.Namespace, questions: int) -> dict[str, Any]:
    """The figures for one number of questions."""
    with models(args, args.batch * questions) as (ours, stock):
        ways = runs(ours, stock, questions, args)
        same = ways["shared"][0]() == ways["apart"][0]()
        seconds = measure_time(ways, args.repeats, args.device)
    return {
        "questions": questions,
        "same_answers": same,
        "apart_over_shared": median_ratio(seconds["apart"], seconds["shared"]),
        "stock_over_shared": median_ratio(seconds["stock"], seconds["shared"]),
        "seconds_per_answer": {name: percentiles(values) for name, values in seconds.items()},
    }


def table_of(result: dict[str, Any]) -> Table:
    config = result["config"]
    table = Table(
        title=f"free text: {config['batch']} images at a time, decoder {config['layers']} x {config['hidden']}, "
        f"{config['dtype']}, {config['new_tokens']} new tokens; milliseconds per answer",
        title_justify="left",
    )
    for column in ("questions", *WAYS.values(), "apart / shared", "stock / shared", "same answers"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["questions"]),
            *(f"{1000 * row['seconds_per_answer'][name]['p50']:.0f}" for name in WAYS),
            f"{row['apart_over_shared']:.2f}",
            f"{row['stock_over_shared']:.2f}",
            "yes" if row["same_answers"] else "no",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--questions", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="about each image")
    parser.add_argument("--new-tokens", type=int, default=8, metavar="N", help="of an answer (default 8)")
    args = parser.parse_args(argv)
    console = Console()
    rows = []
    with console.status("") as status:
        for questions in args.questions:
            status.update(f"{questions} questions")
            rows.append(measure(args, questions))
    config = {name: value for name, value in vars(args).items() if name not in ("json", "questions")}
    result = {"config": config, "rows": rows, "machine": machine(args.device, args.threads)}
    console.print(table_of(result))
    if args.json:
        append_line(args.json, result)


if __name__ == "__main__":
    end_with_a_sentence(main)
