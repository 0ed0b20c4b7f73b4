"""`vitask estimate-memory`: what one rank needs under each DeepSpeed configuration, beside DeepSpeed's own estimate."""

import argparse
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table

from vitask_plugin.deepspeed.configs import NAMES, read_zero
from vitask_plugin.deepspeed.memory import CARDS, GIB, USABLE, Memory, Step, deepspeed_estimate, memory_of
from vitask_plugin.deepspeed.sizes import Sizes
from vitask_plugin.hf import sizes as hf_sizes
from vitask_plugin.llava import sizes as llava_sizes
from vitask_plugin.llava.sizes import SHAPES
from vitask_plugin.options import COUNT
from vitask_plugin.record.host import host_of

COUNTED = {"llava": llava_sizes.sizes_of, "hf": hf_sizes.sizes_of}
WIDTH = 120  # of the tables at least: narrower, they lose figures


def gib(size: float) -> str:
    return f"{size / GIB:.1f}"


def first_that_fits(memories: Iterable[tuple[str, Memory]], card: float) -> str:
    """The first configuration that fits a card of `card` GiB; "none" if none does."""
    return next((name for name, memory in memories if memory.fits(card)), "none")


def counts(model: str, sizes: Sizes) -> str:
    """One sentence of what was counted."""
    parts = {
        "LLM": sizes.llm,
        "LoRA": sizes.adapters,
        "projector": sizes.projector,
        "connector": sizes.connector,
        "vision tower": sizes.tower,
    }
    listed = ", ".join(f"{name} {count / 1e9:.3f}" for name, count in parts.items() if count)
    return (
        f"{model}: {sizes.total / 1e9:.3f} billion parameters ({listed}), {sizes.trained / 1e9:.3f} of them trained; "
        f"largest layer {sizes.largest_layer / 1e9:.3f}"
    )


def table_of(
    sizes: Sizes, configs: Sequence[str], step: Step, *, gpus_per_node: int, nodes: int, lora: bool
) -> tuple[Table, dict[str, Memory]]:
    """The table for people, and the figures in it by configuration.

    Raises:
        VITaskError: see `read_zero` and `memory_of`.
    """
    ranks = gpus_per_node * nodes
    title = f"GiB on {nodes} x {gpus_per_node} GPUs, per rank; host: per node"
    table = Table(title=title, title_justify="left")
    table.add_column("config", no_wrap=True)
    ours = ("weights", "gathered", "gradients", "AdamW", "activations", "peak", "host")
    for column in (*ours, "DeepSpeed\nGPU", "DeepSpeed\nhost", "card"):
        table.add_column(column, justify="right")
    memories = {}
    for config in configs:
        zero = read_zero(config)
        memory = memories[config] = memory_of(sizes, zero, step, ranks=ranks, nodes=nodes, lora=lora)
        own = deepspeed_estimate(sizes, zero, ranks=ranks, nodes=nodes)
        smallest = next((f"{card} GB" for card in CARDS if memory.fits(card)), "none")
        parts = (memory.weights, memory.gathered, memory.gradients, memory.optimizer, memory.activations)
        own_figures = ("n/a", "n/a") if own is None else (gib(own[1]), gib(own[0]))
        table.add_row(zero.name, *map(gib, parts), gib(memory.peak), gib(memory.host), *own_figures, smallest)
    return table, memories


def configure(parser: argparse.ArgumentParser) -> None:
    """`vitask estimate-memory`."""
    add = parser.add_argument
    models = f"{', '.join(SHAPES)}, or the folder of a LLaVA or of an HF model, of which only config.json is read"
    add("--model", required=True, help=models)
    add("--config", nargs="+", default=list(NAMES), metavar="NAME", help="of ours, or a JSON file (default: all ours)")
    add("--gpus-per-node", type=int, action=COUNT, default=8, metavar="N", help="one rank each (default 8)")
    add("--nodes", type=int, action=COUNT, default=1, metavar="N", help="(default 1)")
    add("--lora-r", type=int, action=COUNT, metavar="R", help="LoRA of this rank; full fine-tuning if not given")
    add(
        "--batch-size",
        type=int,
        action=COUNT,
        default=Step.batch,
        metavar="B",
        help=f"samples per rank (default {Step.batch})",
    )
    add(
        "--tokens",
        type=int,
        action=COUNT,
        nargs=3,
        default=[Step.prefix, Step.continuation, Step.answer],
        metavar=("PREFIX", "TEXT", "ANSWER"),
        help="up to the last image token (of an HF model it depends on its processor and the images), question and "
        "answer behind it, the answer alone (default "
        f"{Step.prefix} {Step.continuation} {Step.answer})",
    )
    add("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=True, help="(default: yes)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the counts, the table, and how to read it."""
    prefix, continuation, answer = args.tokens
    step = Step(args.batch_size, prefix, continuation, answer, gradient_checkpointing=args.gradient_checkpointing)
    sizes = COUNTED[host_of(args.model) or "llava"](args.model, args.lora_r)
    table, memories = table_of(
        sizes, args.config, step, gpus_per_node=args.gpus_per_node, nodes=args.nodes, lora=args.lora_r is not None
    )
    console = Console(width=max(WIDTH, Console().width))
    console.print(counts(args.model, sizes), highlight=False)
    console.print(table)
    picks = [f"{card} GB: {first_that_fits(memories.items(), card)}" for card in CARDS]
    console.print(f"The first that fits a card of {'; '.join(picks)}.", highlight=False)
    notes = [
        "peak = weights + gradients + AdamW + the larger of gathered + activations (stage 2, packed, batch "
        f"{step.batch}, {step.positions} positions) and of the optimizer's step.",
        f"card: the smallest that it fits, {USABLE:.0%} of it counted. gathered: at most (stage3_max_live_parameters).",
        "DeepSpeed's estimators take every parameter for trained, the frozen tower too, count a float32 gradient "
        "through the whole step and no activations, and add half on the host.",
    ]
    for note in notes:
        console.print(note, highlight=False)
