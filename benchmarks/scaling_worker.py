"""One rank of `scaling.py`: stage-2 steps under each strategy in turn, timed, with the loopback's bytes counted.

    torchrun --nproc_per_node N benchmarks/scaling_worker.py DIRECTORY OUTPUT REPEATS

Rank 0 writes OUTPUT. Model, samples, optimizer and the step itself are those of `step_cost.py`; the DeepSpeed
configurations are the project's own, with "auto" filled in as the Trainer does.
"""

import importlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measuring import percentiles
from steps import LEARNING_RATE, Steps
from workload import VARIANTS, Batches, Settings, Workload

from vitask_plugin.deepspeed import communication
from vitask_plugin.deepspeed.configs import config_path
from vitask_plugin.deepspeed.memory import BRANCHES
from vitask_plugin.files import write_json
from vitask_plugin.formats.json_text import read_json

WARM_UP = 4  # steps; ZeRO-3 learns the order of modules in the first three
FLOAT32 = 4  # bytes
KEPT = 1e9 / 6.74e9  # of a 7B model's elements: DeepSpeed's defaults of what ZeRO-3 keeps gathered


@dataclass(frozen=True)
class Run:
    """A strategy and an engine."""

    words: str
    strategy: str  # ddp, zero2, zero3
    engine: str = "packed"


RUNS = {
    "ddp": Run("DDP, packed", "ddp"),
    "ddp_branches": Run("DDP, branch by branch", "ddp", "branches"),
    "zero2": Run("ZeRO-2, packed", "zero2"),
    "zero2_branches": Run("ZeRO-2, branch by branch", "zero2", "branches"),
    "zero3": Run("ZeRO-3, packed", "zero3"),
    "zero3_branches": Run("ZeRO-3, branch by branch", "zero3", "branches"),
}


def expected_bytes(run: Run, elements: dict[str, int], ranks: int, settings: Settings) -> float:
    """What a rank sends by the formulas, with gloo's reduce-scatter, which is an all-reduce of which a part is kept.

    Args:
        elements: of the model, trained, gathered, in the decoder's layers among these, and trained but not divided.
    """
    trained = elements["trained"]
    if run.strategy == "ddp":
        return communication.ddp(trained, ranks, element=FLOAT32)
    if run.strategy == "zero2":
        return communication.zero2(trained, ranks, element=FLOAT32)
    times = communication.gathers(lora=settings.lora, gradient_checkpointing=settings.gradient_checkpointing)
    forwards = BRANCHES if run.engine == "branches" else 1
    gathered, layers = elements["gathered"], elements["layers"]
    by_ring = communication.zero3(gathered, layers, trained, ranks, times=times, forwards=forwards, element=FLOAT32)
    scattered = FLOAT32 * trained
    by_gloo = communication.all_reduce(scattered, ranks) - communication.reduce_scatter(scattered, ranks)
    persistent = communication.all_gather(FLOAT32 * elements["persistent"], ranks)  # after each optimizer step
    return by_ring + by_gloo + persistent


class Training:
    """One model under one strategy."""

    def __init__(self, run: Run, batches: Batches) -> None:
        settings = batches.workload.settings
        self._steps = Steps(batches)
        self._variant = VARIANTS[f"stage2_{run.engine}"]
        self._batches = batches
        self._steps.prepare(self._variant)
        model = self._steps.model
        # In a list it is no submodule: on every rank it stays whole, as in training.
        tower = model.get_vision_tower()
        del model.model.vision_tower
        model.model.vision_tower = [tower]
        persistence = 10 * settings.hidden
        divided = [weight.numel() for weight in model.parameters()]
        trained = [weight.numel() for weight in self._steps.trainable().values()]
        layers = [weight.numel() for weight in model.model.layers.parameters()]
        self.elements = {
            "trained": sum(trained),
            "gathered": sum(numel for numel in divided if numel > persistence),
            "layers": sum(numel for numel in layers if numel > persistence),
            "persistent": sum(numel for numel in trained if numel <= persistence),
        }
        optimizer = torch.optim.AdamW(self._steps.trainable().values(), lr=LEARNING_RATE, weight_decay=0.0)
        self._deepspeed = run.strategy != "ddp"
        if self._deepspeed:
            import deepspeed

            config = filled(run.strategy, settings, sum(divided))
            self._wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        else:
            self._wrapped = torch.nn.parallel.DistributedDataParallel(model)
            self._optimizer = optimizer

    def step(self, number: int) -> float:
        """Runs one step on this rank's batch; seconds of forward, backward and optimizer."""
        batch, _ = self._batches(self._variant, number * dist.get_world_size() + dist.get_rank())
        dist.barrier()
        start = time.perf_counter()
        loss = self._wrapped(**batch).loss
        if self._deepspeed:
            self._wrapped.backward(loss)
            self._wrapped.step()
        else:
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - start


def filled(name: str, settings: Settings, elements: int) -> dict[str, Any]:
    """The project's configuration `name` with what the Trainer fills in, in float32, and the limit of `KEPT`."""
    config = read_json(config_path(name), "DeepSpeed configuration")
    for key in ("train_batch_size", "gradient_clipping", "bf16", "fp16"):
        del config[key]
    zero = config["zero_optimization"]
    square = settings.hidden**2
    zero["reduce_bucket_size"] = square
    if zero["stage"] == 3:
        kept = int(KEPT * elements)
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * square),
            "stage3_param_persistence_threshold": 10 * settings.hidden,
            "stage3_max_live_parameters": kept,
            "stage3_max_reuse_distance": kept,
        }
    return config | {
        "train_micro_batch_size_per_gpu": settings.batch,
        "gradient_accumulation_steps": 1,
        "zero_allow_untested_optimizer": True,
    }


def sent_bytes() -> int:
    """Bytes that the loopback device has sent, of all processes in this network namespace."""
    for line in Path("/proc/net/dev").read_text(encoding="ascii").splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    raise RuntimeError("no loopback device")


def measure(run: Run, batches: Batches, repeats: int) -> dict[str, Any]:
    """{"seconds": percentiles, "bytes": per rank and step or None, "elements": ...}."""
    training = Training(run, batches)
    for number in range(WARM_UP):
        training.step(number)
    dist.barrier()
    before = sent_bytes()
    seconds = [training.step(number) for number in range(repeats)]
    dist.barrier()
    counted = os.environ["VITASK_COUNT_BYTES"] == "1"
    sent = (sent_bytes() - before) / repeats / dist.get_world_size() if counted else None
    return {"seconds": percentiles(seconds), "bytes": sent, "elements": training.elements}


def main(directory: str, output: str, repeats: str) -> None:
    import deepspeed

    # Its shared-memory all-reduce would be compiled now and is not used in training.
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    settings = Settings(**read_json(Path(directory) / "settings.json", "settings"))
    torch.set_num_threads(settings.threads)
    batches = Batches(Workload(Path(directory), settings), WARM_UP + int(repeats))
    found = {name: measure(run, batches, int(repeats)) for name, run in RUNS.items()}
    if dist.get_rank() == 0:
        write_json(output, found)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # ZeRO-3's threads can abort an ordinary exit


if __name__ == "__main__":
    main(*sys.argv[1:])
