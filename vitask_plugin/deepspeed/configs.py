"""`vitask deepspeed-config NAME`: the path of a DeepSpeed configuration, for upstream's `--deepspeed`.

    --deepspeed "$(vitask deepspeed-config zero3)"

JSON takes no comments, so what is in the files is explained here. What would only repeat DeepSpeed's default is left
out, `pin_memory` excepted, which older versions left off.

- `"auto"`: the Trainer fills in its own flags (batch sizes, accumulation, `--max_grad_norm`, `--bf16`, `--fp16`), and
  bucket sizes that follow the model's width. `fp16` stands there because the Trainer compares its flag with the field.
- No `optimizer` and no `scheduler`: with them DeepSpeed would build its own, and upstream's parameter groups
  (`--mm_projector_lr`, no weight decay on norms and biases) would be lost without a word.
- ZeRO-2, `overlap_comm`: gradients are reduced while the backward pass goes on. ZeRO-3 does so by default.
- ZeRO-3, `stage3_gather_16bit_weights_on_model_save`: without it the Trainer's checkpoints hold no model that
  `from_pretrained` can read. Saving then takes a whole copy of the weights in rank 0's host memory.
- `offload_optimizer`, `offload_param`: to the host, page-locked (`pin_memory`), which copying beside the computation
  needs. The host must have that memory free; `vitask estimate-memory` says how much.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitask_plugin.deepspeed.reading import ZERO, zero_section
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

NAMES = ("zero2", "zero3", "zero2_offload", "zero3_offload")  # from the fastest that fits to the smallest


@dataclass(frozen=True)
class Zero:
    """What memory and communication depend on in a configuration.

    Attributes:
        name: one of `NAMES`, or a file's. stage: of ZeRO, 0-3.
        offload_optimizer, offload_param: kept in the host's memory.
        max_live_parameters: elements that ZeRO-3 may hold gathered.
    """

    name: str
    stage: int
    offload_optimizer: bool
    offload_param: bool
    max_live_parameters: int


def config_path(name: str) -> Path:
    """The absolute path of one of `NAMES`.

    Raises:
        VITaskError: unknown name; the sentence lists the known ones.
    """
    if name not in NAMES:
        raise VITaskError(f"there is no DeepSpeed configuration {name!r}; choose one of {', '.join(NAMES)}")
    return Path(__file__).resolve().with_name(f"{name}.json")


def read_zero(config: str) -> Zero:
    """The ZeRO settings of one of `NAMES`, or of a JSON file, with DeepSpeed's own defaults for what it leaves out.

    Raises:
        VITaskError: neither a name nor a file, no JSON object, or settings that DeepSpeed refuses.
    """
    if config not in NAMES and not Path(config).is_file():
        raise VITaskError(f"--config {config!r} is neither a file nor one of {', '.join(NAMES)}")
    path = config_path(config) if config in NAMES else Path(config)
    found = read_json(path, "DeepSpeed configuration")
    section = found.get(ZERO, {}) if isinstance(found, dict) else None
    if not isinstance(section, dict):
        raise VITaskError(f"DeepSpeed configuration {config!r} is no JSON object with a {ZERO} object in it")
    # The Trainer fills in what is "auto"; DeepSpeed's own default stands in for it here.
    zero = zero_section(found, config)
    return Zero(
        name=Path(config).name,
        stage=int(zero.stage),
        offload_optimizer=_offloaded(config, zero.offload_optimizer),
        offload_param=_offloaded(config, zero.offload_param),
        max_live_parameters=zero.max_live_parameters,
    )


def _offloaded(config: str, section: Any) -> bool:
    if section is not None and section.device == "nvme":
        raise VITaskError(
            f"DeepSpeed configuration {config!r} offloads to NVMe, which is not estimated; give the device cpu"
        )
    return section is not None and section.device == "cpu"


def configure(parser: argparse.ArgumentParser) -> None:
    """`vitask deepspeed-config`."""
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(NAMES)}")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Nothing but the path, so that a shell can put it into a command."""
    print(config_path(args.name))
