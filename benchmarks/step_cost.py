"""What one VITask training step costs beside upstream LLaVA's vanilla step.

    python benchmarks/step_cost.py [--lora] [--gradient-checkpointing] [--batch 4] [--repeats 9] [--json FILE]
    python benchmarks/step_cost.py --host hf [--families qwen3_vl ...] [...]

A step is forward, backward and optimizer. The variants run in turn in one process, on the same weights and the same
samples, in an order that rotates from round to round. Labels are as frequent as in DermaMNIST, two thirds one label,
and negatives are those of the training's own sampler: where a batch lacks one, its image is one more to compute. Rounds
have as many of such images as a whole epoch has, and a ratio is that of the sums over rounds.

Memory is measured apart: on a CPU the peak resident set of a fresh process per variant (Linux), of which `before` is
there before the first step: interpreter, libraries, weights. On a GPU it is the allocator's peak.

On a GPU the variants are measured with FlexAttention too, and for each the share of the card's matrix rate that the
linear layers alone reach: their floating-point operations in a step, counted by torch, over the step's time, beside the
rate of one large product in the same dtype on the same card.

Two baselines. "vanilla" is upstream's own step, untouched, which computes logits at every position, those of the image
too; `ratio` in the JSON is to it. "lean_vanilla" is the same loss with logits at the answers only. Upstream does not do
that, but it could: `ratio_to_lean_vanilla` is the price of the method without this saving of ours.

With `--host hf` that is done for a scaled model of each family in HF format, whose vanilla step is the stock forward of
the same samples; memory then of the vanilla step and of stage 2 alone, and one line of JSON a family.
"""

import argparse
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from hf_steps import HfSteps
from hf_workload import HfBatches, HfWorkload
from hf_workload import make_workload as make_hf_workload
from measuring import CLOCKS, append_line, end_with_a_sentence, machine, mean_ratio, median_ratio, percentiles, wait
from rich.console import Console
from rich.table import Table
from steps import Steps, measure_time
from torch.utils.flop_counter import FlopCounterMode
from workload import VARIANTS, Batches, Settings, Workload, add_flags, make_workload, settings_of

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.tiny import FAMILIES

MEMORY_ROUNDS = 20  # the batch that lacks most negatives of so many, and the next
MEMORY_STEPS = 2  # from the second on, the optimizer's state is there during forward and backward
STATUS = Path("/proc/self/status")
LIMIT = 1.25  # of the vanilla step, where stage 2 is packed


def opened(workload: Workload, rounds: int, *, upstream: bool = False, clock: str = "wall") -> tuple[Batches, Steps]:
    """What a workload's host measures with."""
    of_hf = isinstance(workload, HfWorkload)
    batches = (HfBatches if of_hf else Batches)(workload, rounds)
    return batches, (HfSteps if of_hf else Steps)(batches, upstream, clock)


# Memory --------------------------------------------------------------------------------------------------------------


def measure_memory(workload: Workload, names: Iterable[str] = VARIANTS) -> dict[str, dict[str, int]]:
    """Per variant {"before": bytes before the first step, "peak": bytes}, each in a fresh process."""
    found = {}
    for name in names:
        # One process per variant: a peak is of a whole process, and memory that was freed stays with it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            found[name] = pool.submit(memory_of, workload, name).result()
    return found


def memory_of(workload: Workload, name: str) -> dict[str, int]:
    """Memory of one variant in this process, which should have done nothing else. For "vanilla" the model is of
    upstream's class from the start."""
    settings = workload.settings
    torch.set_num_threads(settings.threads)
    batches, steps = opened(workload, MEMORY_ROUNDS, upstream=VARIANTS[name].stage is None)
    before = _memory(settings.device, peak=False)
    for number in range(MEMORY_STEPS):
        steps.run(VARIANTS[name], batches(VARIANTS[name], -1 - number)[0])
    return {"before": before, "peak": _memory(settings.device, peak=True)}


def _memory(device: str, *, peak: bool) -> int:
    """Bytes held now, or at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if not STATUS.is_file():
        raise VITaskError(f"memory is read from {STATUS}, which this system does not have; give --no-memory")
    # Not getrusage's ru_maxrss: that of a new process starts at its parent's.
    field = "VmHWM" if peak else "VmRSS"
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)[1])


# Rate ----------------------------------------------------------------------------------------------------------------


def linear_flops(steps: Steps, batches: Batches, name: str) -> int:
    """Floating-point operations of the linear layers in one step, attention's own products apart.

    Counted under sdpa: what FlexAttention compiles is not visible to the counter, and the linear layers are the same.
    """
    variant = replace(VARIANTS[name], attention="sdpa")
    batch, _ = batches(variant, 0)
    with FlopCounterMode(display=False) as counter:
        steps.run(variant, batch)
    return sum(
        flops for operation, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(operation)
    )


def matrix_rate(settings: Settings, side: int = 8192, repeats: int = 20) -> float:
    """Floating-point operations per second of square products of `side`, the best of `repeats`."""
    left, right = torch.randn(2, side, side, dtype=getattr(torch, settings.dtype), device=settings.device)
    best = float("inf")
    for _ in range(repeats):
        wait(settings.device)
        start = time.perf_counter()
        left @ right
        wait(settings.device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


# Exactness -----------------------------------------------------------------------------------------------------------


def measure_differences(steps: Steps, batches: Batches) -> dict[str, float]:
    """The largest relative difference between packed and branch by branch, over both stages: of the loss, and over all
    trainable weights of max |difference| / max |gradient|."""
    losses, gradients = [], []
    for stage in (1, 2):
        packed = replace(VARIANTS["stage2_packed"], stage=stage)
        separate = replace(VARIANTS["stage2_branches"], stage=stage)
        loss, found = steps.gradients(packed, batches(packed, -1)[0])
        expected_loss, expected = steps.gradients(separate, batches(separate, -1)[0])
        if not expected or found.keys() != expected.keys():
            raise VITaskError("packed and branch by branch give gradients to different weights")
        losses.append(abs(loss - expected_loss) / abs(expected_loss))
        gradients += [relative_difference(found[name], expected[name]) for name in expected]
    return {"loss": max(losses), "grad": max(gradients)}


def relative_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """max |found - expected| / max |expected|; 0 where both are all zero."""
    difference = (found - expected).abs().max()
    return float(difference / expected.abs().max()) if difference else 0.0


# The report ----------------------------------------------------------------------------------------------------------


def measure(
    settings: Settings,
    repeats: int,
    console: Console,
    *,
    with_memory: bool = True,
    family: str | None = None,
    clock: str = "wall",
) -> dict[str, Any]:
    """Everything the JSON line holds; without memory, those parts are empty.

    Args:
        family: of the HF host; None: LLaVA. clock: of `measuring.CLOCKS`.
    """
    if clock == "cpu" and settings.device != "cpu":
        raise VITaskError(f"--clock cpu does not see what --device {settings.device} computes; leave it out")
    torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory(prefix="step-cost-") as directory, console.status("") as status:
        status.update("making model and data")
        if family is None:
            workload, measured = make_workload(settings, Path(directory)), list(VARIANTS)
        else:
            workload, measured = make_hf_workload(settings, Path(directory), family), ["vanilla", "stage2_packed"]
        status.update("memory, a process per variant")
        memory = measure_memory(workload, measured) if with_memory else {}
        batches, steps = opened(workload, repeats, clock=clock)
        status.update("time")
        times = measure_time(steps, batches, VARIANTS, repeats)
        rate, flops = None, {}
        if settings.device == "cuda":
            rate = matrix_rate(settings)
            flops = {name: linear_flops(steps, batches, name) for name in VARIANTS}
        status.update("gradients")
        differences = measure_differences(steps, batches)
        geometry = batches.geometry()
    ours = [name for name, variant in VARIANTS.items() if variant.stage]
    seconds = {name: times[name]["seconds"] for name in VARIANTS}
    return {
        **({} if family is None else {"host": "hf", "family": family}),
        "config": {**asdict(settings), **geometry, "repeats": repeats, "clock": clock},
        "ratio": {name: mean_ratio(seconds[name], seconds["vanilla"]) for name in ours},
        "negatives": batches.negatives,
        "memory_ratio": _peak_ratios(memory, ours, "vanilla"),
        "max_rel_diff": differences,
        **machine(settings.device, settings.threads),
        "branches_over_packed": median_ratio(seconds["stage2_branches"], seconds["stage2_packed"]),
        "ratio_to_lean_vanilla": {name: mean_ratio(seconds[name], seconds["lean_vanilla"]) for name in ours},
        "memory_ratio_to_lean_vanilla": _peak_ratios(memory, ours, "lean_vanilla"),
        "seconds": {name: percentiles(seconds[name]) for name in VARIANTS},
        "collate_seconds": {name: percentiles(times[name]["collate_seconds"]) for name in VARIANTS},
        "positions": {name: statistics.mean(times[name]["positions"]) for name in VARIANTS},
        "memory": memory,
        "matrix_rate": rate,
        "share_of_matrix_rate": {
            name: count / statistics.median(seconds[name]) / rate for name, count in flops.items()
        },
    }


def _peak_ratios(memory: Mapping[str, dict[str, int]], names: Iterable[str], baseline: str) -> dict[str, float]:
    known = [name for name in names if {name, baseline} <= memory.keys()]
    return {name: memory[name]["peak"] / memory[baseline]["peak"] for name in known}


def table_of(result: dict[str, Any]) -> Table:
    config, of = result["config"], f"{result['family']}, " if "family" in result else ""
    table = Table(
        title=f"{of}one step: batch {config['batch']}, prefix {config['prefix_text']} + {config['image_tokens']}, "
        f"continuation {config['continuation'][1]}, decoder {config['layers']} x {config['hidden']}, {config['dtype']}"
        f"{', LoRA' * config['lora']}{', gradient checkpointing' * config['gradient_checkpointing']}",
        title_justify="left",
    )
    table.add_column("step")
    for column in ("seconds (p20-p80)", "/ vanilla", "/ lean", "positions", "peak MB", "/ vanilla", "collate ms"):
        table.add_column(column, justify="right")
    if result["matrix_rate"]:
        table.add_column(f"of {result['matrix_rate'] / 1e12:.0f} TFLOP/s", justify="right")
    for name, variant in VARIANTS.items():
        seconds, memory = result["seconds"][name], result["memory"].get(name)
        ours = variant.stage is not None
        table.add_row(
            variant.words,
            f"{seconds['p50']:.3f} ({seconds['p20']:.3f}-{seconds['p80']:.3f})",
            f"{result['ratio'][name]:.2f}" if ours else "",
            f"{result['ratio_to_lean_vanilla'][name]:.2f}" if ours else "",
            f"{result['positions'][name]:,.0f}",
            f"{memory['peak'] / 1e6:,.0f}" if memory else "",
            f"{result['memory_ratio'][name]:.2f}" if name in result["memory_ratio"] else "",
            f"{1000 * result['collate_seconds'][name]['p50']:.1f}",
            *([f"{result['share_of_matrix_rate'][name]:.0%}"] if result["matrix_rate"] else []),
        )
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--host", choices=("llava", "hf"), default="llava", help="whose models (default llava)")
    parser.add_argument(
        "--families", nargs="+", choices=FAMILIES, default=FAMILIES, help="of the HF host (default all)"
    )
    parser.add_argument("--repeats", type=int, default=9, metavar="N", help="measured rounds (default 9)")
    clock = "wall, or cpu: what this process alone took, on a machine that others use (default wall)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=clock)
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process per variant")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append the result as one line")
    args = parser.parse_args(argv)
    console = Console()
    settings, above = settings_of(args), []
    how = {"with_memory": not args.no_memory, "clock": args.clock}
    for family in args.families if args.host == "hf" else [None]:
        result = measure(settings, args.repeats, console, **how, family=family)
        show(result, console)
        if args.json:
            append_line(args.json, result)
        if family is not None and result["ratio"]["stage2_packed"] > LIMIT:
            above.append(family)
    if args.host == "hf":
        said = f"above {LIMIT} of their vanilla step in stage 2: {', '.join(above)}" if above else f"all within {LIMIT}"
        console.print(said, highlight=False)


def show(result: dict[str, Any], console: Console) -> None:
    """The table and what goes with it."""
    console.print(table_of(result))
    negatives = result["negatives"]
    console.print(
        f"negatives: {negatives['in_batch']:.0%} are in the batch, the others add {negatives['extra_images']:.3f} "
        "images a sample",
        highlight=False,
    )
    console.print(
        f"branches / packed {result['branches_over_packed']:.2f}; largest relative difference between them: "
        f"loss {result['max_rel_diff']['loss']:.1e}, gradients {result['max_rel_diff']['grad']:.1e}",
        highlight=False,
    )


if __name__ == "__main__":
    end_with_a_sentence(main)
