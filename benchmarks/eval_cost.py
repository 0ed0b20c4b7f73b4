"""What a validation round of a training run costs, beside the least that any answer needs.

    python benchmarks/eval_cost.py [--labels 2 8 14] [--batch 4] [--repeats 5] [--json FILE]

Everything runs as in a round: images are preprocessed, prompts tokenized, the vision tower and the connector run, all
labels of each image are scored. "both" scores them without and with an exemplar, "plain" without alone. Both are
compared with "prefill", one forward of the same prompts and the logits of their last position (see `score_cost.py`).
The variants run in turn in one process, in an order that rotates; a ratio is the median over rounds of the ratio within
a round. Seconds are per image.
"""

import argparse
from typing import Any

import torch
from answering import LABEL_SETS, add_flags, after_image, lengthened, measure_time, models, request, show_images
from measuring import CLOCKS, append_line, end_with_a_sentence, machine, median_ratio, percentiles
from rich.console import Console
from rich.table import Table
from score_cost import prefill

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.instructions import instruction, label_set, response
from vitask_plugin.evaluation.lmms_llava import VITaskLlava
from vitask_plugin.method.branches import Packed
from vitask_plugin.method.connector import ExemplarConnector
from vitask_plugin.training.validation_round import scores_of
from vitask_plugin.training.validation_samples import Judged

FEATURES = 512  # width of the TSM's
TASK = "validation"


def with_connector(ours: VITaskLlava) -> None:
    """Gives the model what a run of `--vitask_ep cls` has."""
    torch.manual_seed(0)
    weight = ours.model.lm_head.weight
    connector = ExemplarConnector("mlp2x_gelu", FEATURES, ours.model.config.hidden_size)
    ours.model.vitask_connector = connector.to(weight.device, weight.dtype)
    ours.model.vitask_arguments = VITaskArguments(vitask=True, vitask_ep="cls", vitask_tsm="tsm")


def measure(ours: VITaskLlava, labels: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures for one number of labels."""
    known = label_set(LABEL_SETS[labels])
    show_images(ours, TASK, args.batch)
    answers = [response(known.choices, label) for label in range(labels)]
    question = instruction(known.modality, known.choices)
    question = lengthened(ours, request("loglikelihood", TASK, question, answers[0], 0), args.instruction)
    requests = [request("loglikelihood", TASK, question, answers[0], number) for number in range(args.batch)]
    queries = [ours._query(asked) for asked in requests]
    exemplar = torch.randn(1, FEATURES, generator=torch.Generator().manual_seed(0)).to(ours.model.dtype)
    judged = [Judged(query, exemplar.clone(), answers, labels, 0) for query in queries]

    @torch.no_grad()
    def scored(exemplars: bool) -> None:
        scores_of(judged, ours.asker, ours.model, Packed, exemplars, lambda found: found.to(ours.device))

    runs = {
        "both": (lambda: scored(True), args.batch),
        "plain": (lambda: scored(False), args.batch),
        "prefill": (lambda: prefill(ours, requests), args.batch),
    }
    seconds = measure_time(runs, args.repeats, args.device, CLOCKS[args.clock])
    prompt = ours.asker.prompt_ids(queries[0])
    positions = len(prompt) - 1 + ours.model.get_vision_tower().num_patches
    lengths = [len(ours.asker.prompt_ids(queries[0], answer)) - len(prompt) for answer in answers]
    behind = after_image(prompt) + sum(lengths) - labels  # the last token of a label predicts nothing
    return {
        "labels": labels,
        "prompt_tokens": positions,
        "instruction_tokens": after_image(prompt),
        "label_tokens": lengths,
        "predicted_both_over_prefill": (positions - after_image(prompt) + 2 * behind + 1) / positions,
        "both_over_prefill": median_ratio(seconds["both"], seconds["prefill"]),
        "plain_over_prefill": median_ratio(seconds["plain"], seconds["prefill"]),
        "seconds_per_image": {name: percentiles(values) for name, values in seconds.items()},
    }


def table_of(result: dict[str, Any]) -> Table:
    config = result["config"]
    table = Table(
        title=f"a validation round: batch {config['batch']}, decoder {config['layers']} x {config['hidden']}, "
        f"{config['dtype']}; milliseconds per image",
        title_justify="left",
    )
    for column in ("labels", "tokens", "both", "plain", "prefill", "both / prefill", "by tokens", "plain / prefill"):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["labels"]),
            f"{row['prompt_tokens']} + {sum(row['label_tokens'])}",
            *(f"{1000 * row['seconds_per_image'][name]['p50']:.0f}" for name in ("both", "plain", "prefill")),
            f"{row['both_over_prefill']:.2f}",
            f"{row['predicted_both_over_prefill']:.2f}",
            f"{row['plain_over_prefill']:.2f}",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--labels", type=int, nargs="+", choices=LABEL_SETS, default=[2, 8, 14], metavar="K")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: this process's own time (a busy machine)")
    args = parser.parse_args(argv)
    console = Console()
    with console.status("making the model") as status, models(args, args.batch) as (ours, _):
        with_connector(ours)
        rows = []
        for labels in args.labels:
            status.update(f"{labels} labels")
            rows.append(measure(ours, labels, args))
    config = {name: value for name, value in vars(args).items() if name not in ("json", "labels")}
    result = {"config": config, "rows": rows, "machine": machine(args.device, args.threads)}
    console.print(table_of(result))
    if args.json:
        append_line(args.json, result)


if __name__ == "__main__":
    end_with_a_sentence(main)
