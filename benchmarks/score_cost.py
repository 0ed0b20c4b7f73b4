"""What it costs to score every label of an image, beside other ways to get an answer from the same checkpoint.

    python benchmarks/score_cost.py [--labels 2 8 11 14] [--batch 4] [--repeats 5] [--json FILE]

Everything goes through models of lmms-eval, from requests to results: images are preprocessed, prompts tokenized, the
vision tower runs. "score" is `vitask_llava`'s label scoring. It is compared with

- "prefill": the least that any answer needs, one forward of the same prompts and the logits of their last position;
- "per_label": lmms-eval's stock `llava` model, its own code on the same weights, which gives each label a forward of
  its own, one request at a time;
- "generate": free text by `vitask_llava`, as many tokens as the longest label has. A random model never stops by
  itself, so every sample takes them all.

The variants run in turn in one process, in an order that rotates; a ratio is the median over rounds of the ratio within
a round. Seconds are per image; the stock model is timed on one image of the batch. It rounds pixels to float16, so the
probabilities are compared with those of a plain forward per label without that rounding.
"""

import argparse
from typing import Any

import torch
from answering import LABEL_SETS, Run, StockLlava, add_flags, after_image, lengthened, models, request, show_images
from answering import measure_time as timed
from lmms_eval.api.instance import Instance
from measuring import append_line, end_with_a_sentence, machine, median_ratio, percentiles
from rich.console import Console
from rich.table import Table

from vitask_plugin.data.instructions import instruction, label_set, response
from vitask_plugin.evaluation.lmms_llava import VITaskLlava

VARIANTS = {
    "score": "scoring",
    "prefill": "prefill only",
    "per_label": "stock llava",
    "generate": "free text",
}
TASK = "labels"


def requests_for(ours: VITaskLlava, labels: int, args: argparse.Namespace) -> list[Instance]:
    """Requests to score all labels of `args.batch` images, in the harness' order."""
    known = label_set(LABEL_SETS[labels])
    show_images(ours, TASK, args.batch)
    answers = [response(known.choices, label) for label in range(labels)]
    question = instruction(known.modality, known.choices)
    question = lengthened(ours, request("loglikelihood", TASK, question, answers[0], 0), args.instruction)
    return [
        request("loglikelihood", TASK, question, answer, number, index)
        for number in range(args.batch)
        for index, answer in enumerate(answers)
    ]


def label_lengths(ours: VITaskLlava, requests: list[Instance]) -> list[int]:
    """Tokens of each request's label, end token included."""
    queries = [(ours._query(each), each.args[1]) for each in requests]
    return [len(ours.asker.prompt_ids(query, label)) - len(ours.asker.prompt_ids(query)) for query, label in queries]


def runs(ours: VITaskLlava, stock: StockLlava, requests: list[Instance], labels: int) -> dict[str, Run]:
    """By variant, what to time, and how many images that answers."""
    settings = {"max_new_tokens": max(label_lengths(ours, requests[:labels]))}
    one_each = requests[::labels]
    free = [request("generate_until", TASK, each.args[0], settings, each.args[3]) for each in one_each]
    return {
        "score": (lambda: ours.loglikelihood(requests), len(one_each)),
        "prefill": (lambda: prefill(ours, one_each), len(one_each)),
        "per_label": (lambda: stock.loglikelihood(requests[:labels]), 1),
        "generate": (lambda: ours.generate_until(free), len(one_each)),
    }


@torch.no_grad()
def prefill(ours: VITaskLlava, requests: list[Instance]) -> torch.Tensor:
    """Logits [B, V] after each prompt. The prompts are equally long, so there is nothing to mask."""
    queries = [ours._query(each) for each in requests]
    prompts = ours._prompts(queries, [ours.asker.prompt_ids(query) for query in queries])
    source = torch.stack([torch.cat([one.prefix, one.continuations[0].tokens]) for one in prompts.documents])
    embeds = prompts.pool[source.to(prompts.pool.device)]
    hidden = ours.model.model(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return ours.model.lm_head(hidden[:, -1]).cpu()


@torch.no_grad()
def reference(ours: VITaskLlava, asked: Instance) -> float:
    """The summed loss of one label (nats), by upstream's own forward of the whole conversation."""
    query = ours._query(asked)
    prompt, whole = ours.asker.prompt_ids(query), ours.asker.prompt_ids(query, asked.args[1])
    ids = torch.tensor([whole], device=ours.device)
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    pixels = ours.image_processor.preprocess(query.images, return_tensors="pt")["pixel_values"]
    pixels = pixels.to(ours.device, ours.model.dtype)
    return float(ours.model(input_ids=ids, labels=labels, images=pixels).loss) * (len(whole) - len(prompt))


def differences(ours: VITaskLlava, requests: list[Instance], labels: int) -> dict[str, float]:
    """The largest differences between scoring the batch at once and a forward per label, over the first image and the
    last one: of a label's probability, and relative of its log-likelihood (which a random model's probabilities, close
    to 0 and 1 where labels differ in length, would hide)."""
    losses = torch.tensor([loss for loss, _ in ours.loglikelihood(requests)], dtype=torch.float64).view(-1, labels)
    some = [0, len(losses) - 1]
    expected = torch.tensor(
        [[reference(ours, each) for each in requests[labels * row : labels * (row + 1)]] for row in some],
        dtype=torch.float64,
    )
    found = losses[some]
    probabilities = found.neg().softmax(-1) - expected.neg().softmax(-1)
    return {
        "max_probability_diff": float(probabilities.abs().max()),
        "max_rel_log_likelihood_diff": float(((found - expected) / expected).abs().max()),
    }


def measure(ours: VITaskLlava, stock: StockLlava, labels: int, args: argparse.Namespace) -> dict[str, Any]:
    """The figures for one number of labels."""
    requests = requests_for(ours, labels, args)
    lengths = label_lengths(ours, requests[:labels])
    prompt = ours.asker.prompt_ids(ours._query(requests[0]))
    positions = len(prompt) - 1 + ours.model.get_vision_tower().num_patches
    seconds = timed(runs(ours, stock, requests, labels), args.repeats, args.device)
    return {
        "labels": labels,
        "label_set": LABEL_SETS[labels],
        "prompt_tokens": positions,
        "instruction_tokens": after_image(prompt),
        "label_tokens": lengths,
        # The last token of a label predicts nothing.
        "predicted_score_over_prefill": (positions + sum(lengths) - labels) / positions,
        "score_over_prefill": median_ratio(seconds["score"], seconds["prefill"]),
        "per_label_over_score": median_ratio(seconds["per_label"], seconds["score"]),
        "generate_over_score": median_ratio(seconds["generate"], seconds["score"]),
        **differences(ours, requests, labels),
        "seconds_per_image": {name: percentiles(values) for name, values in seconds.items()},
    }


def table_of(result: dict[str, Any]) -> Table:
    config = result["config"]
    table = Table(
        title=f"labels scored: batch {config['batch']}, decoder {config['layers']} x {config['hidden']}, "
        f"{config['dtype']}; milliseconds per image",
        title_justify="left",
    )
    for column in (
        "labels",
        "tokens",
        *VARIANTS.values(),
        "score / prefill",
        "by tokens",
        "stock / score",
        "dp",
        "d log p",
    ):
        table.add_column(column, justify="right")
    for row in result["rows"]:
        table.add_row(
            str(row["labels"]),
            f"{row['prompt_tokens']} + {sum(row['label_tokens'])}",
            *(f"{1000 * row['seconds_per_image'][name]['p50']:.0f}" for name in VARIANTS),
            f"{row['score_over_prefill']:.2f}",
            f"{row['predicted_score_over_prefill']:.2f}",
            f"{row['per_label_over_score']:.1f}",
            f"{row['max_probability_diff']:.0e}",
            f"{row['max_rel_log_likelihood_diff']:.0e}",
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--labels", type=int, nargs="+", choices=LABEL_SETS, default=list(LABEL_SETS), metavar="K")
    args = parser.parse_args(argv)
    console = Console()
    with console.status("making the model") as status, models(args, args.batch) as (ours, stock):
        rows = []
        for labels in args.labels:
            status.update(f"{labels} labels")
            rows.append(measure(ours, stock, labels, args))
    config = {name: value for name, value in vars(args).items() if name not in ("json", "labels")}
    result = {"config": config, "rows": rows, "machine": machine(args.device, args.threads)}
    console.print(table_of(result))
    if args.json:
        append_line(args.json, result)


if __name__ == "__main__":
    end_with_a_sentence(main)
