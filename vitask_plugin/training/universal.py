"""DeepSpeed's checkpoints on another number of processes or ZeRO stage: its universal form, and what loads it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from vitask_plugin.files import atomic_directory, atomic_path
from vitask_plugin.training import agreement, disk


def prepare(directory: Path | None, args: Any, config: dict[str, Any], *, convert: bool) -> None:
    """Sets what DeepSpeed has to know about its checkpoints, and converts one. All ranks have to call it.

    Args:
        args: upstream's training arguments.
        config: DeepSpeed's, changed in memory, before its engine is made.

    Raises:
        VITaskError: on every rank, where it cannot be converted.
    """
    settings = config.setdefault("checkpoint", {})
    if args.save_on_each_node:
        settings["use_node_local_storage"] = True
    if not convert:
        return
    sentence = None
    if args.save_on_each_node:
        sentence = (
            f"{str(directory)!r} is of another number of processes or ZeRO stage, and with --save_on_each_node True no "
            "node has all of its parts to convert; go on with the same number and stage, or copy all parts to one disk "
            "that the nodes share"
        )
    elif args.process_index == 0:
        agreement.say(f"converting {directory} for this number of processes and ZeRO stage (DeepSpeed universal)")
        sentence = _convert(directory)
    agreement.agree(sentence)
    settings["load_universal"] = True


def name_latest(directory: str | Path) -> None:
    """Says in a checkpoint just written which step its parts are of: DeepSpeed does so on the first node alone."""
    latest = Path(directory) / "latest"
    if not latest.exists():
        (step,) = Path(directory).glob("global_step*")
        latest.write_text(step.name)


def _convert(directory: Path) -> str | None:
    """DeepSpeed's universal form of a checkpoint, beside its own parts; the sentence for what went wrong."""
    try:
        step = (directory / "latest").read_text().strip()
        target = directory / f"{step}_universal"
        if not target.exists():
            form = f"DeepSpeed's universal form of {directory.name}"
            if sentence := disk.no_room(directory.parent, _converted_bytes(directory / step), form):
                return sentence
            with atomic_directory(target) as temporary:
                _run_converter(directory / step, temporary)
        with atomic_path(directory / "latest_universal") as latest:
            latest.write_text(target.name)
    except (OSError, subprocess.CalledProcessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        return (
            f"DeepSpeed could not convert {str(directory)!r} ({why.strip().splitlines()[-1]}); go on with the same "
            "number of processes and ZeRO stage as before"
        )
    return None


def _converted_bytes(parts: Path) -> int:
    """The most that converting takes: the optimizer's states in pieces, put together beside them, and the rest."""
    sizes = {path.name: path.stat().st_size for path in parts.iterdir()}
    return sum(size * (2 if "optim_states" in name else 1) for name, size in sizes.items())


def _run_converter(parts: Path, output: Path) -> None:
    # In a process of its own: it starts workers, which must not be forked from a rank.
    options = ["--input_folder", str(parts), "--output_folder", str(output), "--inject_missing_state"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options]
    subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def repair_optimizer(optimizer: torch.optim.Optimizer, learning_rates: list[float], weight_decays: list[float]) -> None:
    """Undoes what DeepSpeed 0.19 does to the optimizer when ZeRO-3 loads a universal checkpoint.

    It gives all parameter groups the settings of the first, and all parameters one and the same step tensor, which
    each of them then counts up.

    Args:
        learning_rates, weight_decays: of the parameter groups, in their order.
    """
    for group, rate, decay in zip(optimizer.param_groups, learning_rates, weight_decays, strict=True):
        group["lr"], group["weight_decay"] = rate, decay
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
