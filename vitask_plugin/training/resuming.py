"""Which checkpoint a run resumes from: one that every rank sees whole, of a run that this one can continue.

    processes, ZeRO stage                       allowed
    without DeepSpeed: any number of processes  if a step has as many samples
    ZeRO-1 and 2, to each other, any number     if a step has as many samples; DeepSpeed's universal checkpoint
    ZeRO-3 to ZeRO-3, any number                the same
    ZeRO-1 or 2 to 3 and back, DeepSpeed or not refused

Another stage of VITask, another exemplar or TSM, LoRA or not, another seed, other data: refused.
"""

from pathlib import Path
from typing import Any

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.errors import VITaskError
from vitask_plugin.record import checkpoint
from vitask_plugin.training import agreement, disk
from vitask_plugin.training.peers import EveryRankError
from vitask_plugin.training.zero import zero_stage

_TRAINER_STATE = "trainer_state.json"
# A run may go on with others of these; what the optimizer and its schedule have taken from the old ones stays.
_SCHEDULE = ("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "num_train_epochs", "max_steps")
_WEIGHTS = ("vitask_connector_lr", "vitask_rda_weight", "vitask_rda_detach", "vitask_crt_weight")
_ORDER = "its order of the data would be another: use the same"


def run_of(args: Any, weight_decays: list[float], digests: dict[str, str]) -> dict[str, Any]:
    """What resuming from a checkpoint depends on, as recorded in it.

    Args:
        args: the training arguments. weight_decays: of the optimizer's parameter groups, in their order.
        digests: `exemplars.digests`.
    """
    return {
        "processes": args.world_size,
        "zero_stage": zero_stage(args),
        "batch": args.train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "seed": args.seed,
        "lora_r": args.lora_r if args.lora_enable else None,
        "save_only_model": args.save_only_model,
        "group_by_modality_length": args.group_by_modality_length,
        "data": digests["data"],
        "tokens": digests["tokens"],
        "tsm": digests.get("TSM"),
        "weight_decays": weight_decays,
        "schedule": {name: str(getattr(args, name)) for name in _SCHEDULE},
    }


# Which one -------------------------------------------------------------------------------------------------------


def newest(output_dir: str | Path) -> Path | None:
    """The newest checkpoint that every rank sees whole, None where no rank sees any. All ranks have to call it.

    Newer ones that are passed over stay where they are, and a line names each.

    Raises:
        VITaskError: there are checkpoints, but none that every rank sees whole.
    """
    found = disk.checkpoints(output_dir)
    seen = agreement.gathered({step: _damage(path) for step, path in found.items()})
    passed_over = []
    for step in sorted(set().union(*seen), reverse=True):
        reasons = [(rank, own.get(step, "it is not there")) for rank, own in enumerate(seen)]
        damage = next((f"{reason} (rank {rank})" for rank, reason in reasons if reason), None)
        if damage is None:
            for line in passed_over:
                agreement.say(f"{line}; resuming from checkpoint-{step}")
            return found[step]
        passed_over.append(f"checkpoint-{step} in {str(output_dir)!r} is passed over: {damage}")
    if passed_over:
        raise EveryRankError(
            f"{'; '.join(passed_over)}; nothing is left to resume from: copy one again, to every node if their disks "
            "are not shared, or remove them to start anew"
        )
    return None


def _damage(path: Path) -> str | None:
    """Why a checkpoint is not whole, None if it is."""
    try:
        record = checkpoint.read_record(path)
    except VITaskError as error:
        return str(error)
    if record is None:
        if (path / _TRAINER_STATE).is_file():
            return None  # whole, and another run's: `check` refuses it
        return "it is of a run without --vitask, or was cut short"
    files = record.get(checkpoint.FILES, {})
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    if record.get(checkpoint.RUN, {}).get("save_only_model"):
        return "it holds no optimizer state (--save_only_model)"
    return None


# Whether this run continues it -------------------------------------------------------------------------------------


def check(directory: str | Path, vitask: VITaskArguments, run: dict[str, Any]) -> bool:
    """Refuses a checkpoint that this run does not continue.

    Args:
        run: this run's `run_of`.

    Returns:
        Whether DeepSpeed's parts have to be converted first.

    Raises:
        VITaskError: naming both sides.
    """
    record = checkpoint.read_record(directory)
    found = record and (record["arguments"]["vitask_stage"], record["ep"])
    if found != (vitask.vitask_stage, vitask.vitask_ep):
        what = f"stage {found[0]} with --vitask_ep {found[1]}" if found else "a run without --vitask"
        raise VITaskError(
            f"{str(directory)!r} is of {what}, this run is stage {vitask.vitask_stage} with --vitask_ep "
            f"{vitask.vitask_ep}; resume with the same flags, or give another --output_dir"
        )
    _check_groups(directory, record["arguments"].get("vitask_connector_lr", 0.0), vitask)
    before = record.get(checkpoint.RUN)
    if before is None:
        return False
    differences = (
        (_kind(before), _kind(run), "start it with the same --lora_enable and --lora_r"),
        (
            _step(before),
            _step(run),
            "its place in the data would be another: choose --per_device_train_batch_size and "
            "--gradient_accumulation_steps so that a step has as many samples",
        ),
        (
            f"data {before['data'][:12]}",
            f"data {run['data'][:12]}",
            "its place in the data would be another: use the same --data_path, or another --output_dir to start anew",
        ),
        (
            f"tokens {before['tokens'][:12]}",
            f"tokens {run['tokens'][:12]}",
            "the same samples would be other tokens: use the same tokenizer, --version and --model_max_length",
        ),
        (
            _tsm(before.get("tsm", record["tsm"] and record["tsm"]["hash"])),
            _tsm(run["tsm"]),
            "its exemplars would mean something else: use the same --vitask_tsm or --vitask_features",
        ),
        (f"--seed {before['seed']}", f"--seed {run['seed']}", _ORDER),
        (
            f"--group_by_modality_length {before['group_by_modality_length']}",
            f"--group_by_modality_length {run['group_by_modality_length']}",
            _ORDER,
        ),
        (
            _family(before["zero_stage"]),
            _family(run["zero_stage"]),
            "DeepSpeed cannot convert one into the other; going on is possible without DeepSpeed, between ZeRO-1 and "
            "2, and within ZeRO-3, on any number of processes",
        ),
    )
    for theirs, ours, advice in differences:
        if theirs != ours:
            raise VITaskError(f"{str(directory)!r} is of a run with {theirs}, this one has {ours}; {advice}")
    stages = before["zero_stage"], run["zero_stage"]
    return bool(stages[0]) and (stages[0] != stages[1] or before["processes"] != run["processes"])


def _check_groups(directory: str | Path, rate: float, vitask: VITaskArguments) -> None:
    """Refuses a state of the optimizer with other parameter groups, which the connector has where it has its own rate.

    Args:
        rate: `--vitask_connector_lr` there; 0 where it was written before there was one.
    """
    if vitask.trains_connector and (rate > 0) != (vitask.vitask_connector_lr > 0):
        there, here = ("a rate of its own" if value else "the run's rate" for value in (rate, vitask.connector_rate))
        raise VITaskError(
            f"{str(directory)!r} is of a run whose connector had {there}, here it has {here}, and the optimizer's "
            f"state cannot be divided otherwise; give --vitask_connector_lr {rate or 0:g} to resume it, or another "
            "--output_dir to start anew"
        )


def changed(directory: str | Path, vitask: VITaskArguments, run: dict[str, Any]) -> list[str]:
    """Each flag that a run may go on with otherwise, and does: "--learning_rate 0.0005 (0.001 there)"."""
    record = checkpoint.read_record(directory)
    before = {**record["arguments"], **record.get(checkpoint.RUN, {}).get("schedule", {})}
    now = {**{name: getattr(vitask, name) for name in _WEIGHTS}, **run["schedule"]}
    return [f"--{name} {now[name]} ({before[name]} there)" for name in now if before.get(name, now[name]) != now[name]]


def _kind(run: dict[str, Any]) -> str:
    return "all weights trained" if run["lora_r"] is None else f"LoRA of rank {run['lora_r']}"


def _tsm(found: str | None) -> str:
    return "no TSM" if found is None else f"TSM {found[:12]}"


def _step(run: dict[str, Any]) -> str:
    samples = run["processes"] * run["batch"] * run["accumulation"]
    return f"{samples} samples per step"


def _family(stage: int | None) -> str:
    if stage is None:
        return "no DeepSpeed"
    return "DeepSpeed ZeRO-3" if stage == 3 else "DeepSpeed ZeRO-1 or 2" if stage else "DeepSpeed without ZeRO"
