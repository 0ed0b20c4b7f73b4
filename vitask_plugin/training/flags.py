"""What VITask does with each flag of transformers' Trainer: honour it, or refuse it at the start with the reason.

A flag that the Trainer would take and a VITask step would not act on is refused: a run must not differ from its command
line without a word. `HONOURED` and `REFUSED` name every field of `TrainingArguments` (4.57 and 5); a host adds its own.
"""

import difflib
import importlib.metadata
import json
from argparse import Namespace
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available

from vitask_plugin.deepspeed.reading import configuration, zero_section
from vitask_plugin.errors import VITaskError
from vitask_plugin.training import ranges

# As transformers does it, or without effect there too.
_HONOURED = """
    output_dir overwrite_output_dir per_device_train_batch_size per_gpu_train_batch_size gradient_accumulation_steps
    num_train_epochs max_steps learning_rate lr_scheduler_kwargs warmup_ratio warmup_steps optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon adafactor max_grad_norm average_tokens_across_devices
    bf16 fp16 tf32 fp16_opt_level half_precision_backend fp16_backend
    activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs
    use_cache torch_empty_cache_steps no_cuda use_cpu use_mps_device full_determinism seed local_rank
    logging_dir logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id skip_memory_metrics debug
    save_steps save_total_limit save_only_model save_on_each_node save_safetensors ignore_data_skip
    restore_callback_states_from_checkpoint do_train
    dataloader_drop_last dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory
    dataloader_persistent_workers dataloader_multiprocessing_context length_column_name label_names
    ddp_backend ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph
    deepspeed
    per_device_eval_batch_size per_gpu_eval_batch_size eval_steps eval_delay eval_accumulation_steps
    prediction_loss_only eval_do_concat_batches eval_use_gather_object include_for_metrics include_inputs_for_metrics
    batch_eval_metrics use_legacy_prediction_loop past_index ray_scope
    eval_strategy eval_on_start do_eval load_best_model_at_end metric_for_best_model greater_is_better save_strategy
    push_to_hub hub_token hub_private_repo hub_model_id hub_always_push hub_revision push_to_hub_model_id
    push_to_hub_organization push_to_hub_token
"""
HONOURED = frozenset(_HONOURED.split())


@dataclass(frozen=True)
class Refusal:
    """Which values of a flag are refused, and why.

    Attributes:
        allows: of a value as parsed; None is always allowed.
        why: continues "--flag VALUE: ..."; ends with what to do.
    """

    allows: Callable[[Any], bool]
    why: str


def plain(value: Any) -> Any:
    """A member of one of transformers' enumerations as it is typed."""
    return getattr(value, "value", value)


def one_of(*values: Any) -> Callable[[Any], bool]:
    return lambda value: plain(value) in values


def off(value: Any) -> bool:
    return not value


def never(value: Any) -> bool:
    return False


_NO_DATA = "there is no data to validate on during training; give --vitask_eval_data JSON, or leave it out"
_AS_A_STEP = "a validation round computes in what a step computes in; leave it out"
_NOT_IN_THE_STEP = "a VITask step computes its losses without it; leave it out"
_NOT_TRIED = "it has not been tried with a VITask step, whose shape differs from batch to batch; leave it out"
_ORDER = "order and negatives follow --seed and the samples per step alone; leave it out"
# Names of optimizers that build their own groups of weights begin so.
_OWN_GROUPS = ("galore", "apollo", "lomo", "adalomo", "muon", "dion", "schedule_free")

REFUSED: dict[str, Refusal] = {
    "optim": Refusal(
        lambda value: not plain(value).startswith(_OWN_GROUPS),
        "the optimizer is built from groups of weights, which this one does not take; use adamw_torch",
    ),
    "optim_target_modules": Refusal(never, "the optimizer is built without it; leave it out"),
    "lr_scheduler_type": Refusal(
        lambda value: plain(value) not in ("reduce_lr_on_plateau", "greedy"),
        "it goes by validation figures and has not been tried beside the connector's own rate; use cosine",
    ),
    "remove_unused_columns": Refusal(off, "it would take the TSM's features out of each sample; leave it out"),
    "label_smoothing_factor": Refusal(off, _NOT_IN_THE_STEP),
    "neftune_noise_alpha": Refusal(off, _NOT_IN_THE_STEP),
    "use_liger_kernel": Refusal(off, _NOT_IN_THE_STEP),
    "liger_kernel_config": Refusal(never, _NOT_IN_THE_STEP),
    "torch_compile": Refusal(off, _NOT_TRIED),
    "torch_compile_backend": Refusal(off, _NOT_TRIED),
    "torch_compile_mode": Refusal(off, _NOT_TRIED),
    "torchdynamo": Refusal(off, _NOT_TRIED),
    "jit_mode_eval": Refusal(off, _NOT_TRIED),
    "fsdp": Refusal(off, "VITask trains under DDP and DeepSpeed; use --deepspeed with a ZeRO-3 configuration"),
    "fsdp_config": Refusal(never, "VITask trains under DDP and DeepSpeed; leave it out"),
    "fsdp_min_num_params": Refusal(off, "VITask trains under DDP and DeepSpeed; leave it out"),
    "fsdp_transformer_layer_cls_to_wrap": Refusal(off, "VITask trains under DDP and DeepSpeed; leave it out"),
    "parallelism_config": Refusal(never, "VITask trains under DDP and DeepSpeed; leave it out"),
    "mp_parameters": Refusal(off, "VITask trains under DDP and DeepSpeed; leave it out"),
    "tpu_num_cores": Refusal(off, "VITask was not tried on TPUs; leave it out"),
    "tpu_metrics_debug": Refusal(off, "VITask was not tried on TPUs; leave it out"),
    "auto_find_batch_size": Refusal(
        off,
        "the samples per step, and so the curve, would change without a word; leave it out (a step that does not fit "
        "ends with what helps)",
    ),
    "accelerator_config": Refusal(never, _ORDER),
    "train_sampling_strategy": Refusal(one_of("random"), _ORDER),
    "group_by_length": Refusal(off, f"{_ORDER}, or use --group_by_modality_length"),
    "data_seed": Refusal(never, _ORDER),
    "dataloader_in_order": Refusal(bool, _ORDER),
    "include_num_input_tokens_seen": Refusal(
        one_of("no", "False", "false", False),
        "transformers counts neither image tokens nor branches, so the figure would be wrong; leave it out",
    ),
    "include_tokens_per_second": Refusal(
        off, "transformers counts neither image tokens nor branches, so the figure would be wrong; leave it out"
    ),
    "do_predict": Refusal(off, "a training run judges no test data; leave it out, and judge with lmms-eval"),
    "bf16_full_eval": Refusal(off, _AS_A_STEP),
    "fp16_full_eval": Refusal(off, _AS_A_STEP),
    "resume_from_checkpoint": Refusal(
        never, "a run resumes from the newest checkpoint in its --output_dir by itself; leave it out"
    ),
    "enable_jit_checkpoint": Refusal(off, "checkpoints are written by all ranks at a step; use --save_steps"),
    "hub_strategy": Refusal(
        one_of("every_save", "end"),
        "a checkpoint's folder has optimizer states and places of this machine, so the finished folder alone is "
        "pushed, after the last step; leave it out",
    ),
}

# Without --vitask_eval_data.
_OF_VALIDATION: dict[str, Refusal] = {
    "eval_strategy": Refusal(one_of("no"), _NO_DATA),
    "eval_on_start": Refusal(off, _NO_DATA),
    "do_eval": Refusal(off, _NO_DATA),
    "load_best_model_at_end": Refusal(off, _NO_DATA),
    "metric_for_best_model": Refusal(never, _NO_DATA),
    "greater_is_better": Refusal(never, _NO_DATA),
    "save_strategy": Refusal(lambda value: plain(value) != "best", _NO_DATA),
    "vitask_eval_samples": Refusal(off, _NO_DATA),
    "vitask_early_stopping_patience": Refusal(off, _NO_DATA),
}


def check(parsed: Namespace, refused: Mapping[str, Refusal] = REFUSED) -> None:
    """Refuses what VITask would not act on.

    Args:
        parsed: all flags with their defaults, typed, see `HfArgumentParser`. refused: those that may be.

    Raises:
        VITaskError: naming the first such flag, its value, the reason, and what to do.
    """
    validates = getattr(parsed, "vitask_eval_data", None) is not None
    for name, refusal in {**refused, **({} if validates else _OF_VALIDATION)}.items():
        value = getattr(parsed, name, None)
        if value is not None and not refusal.allows(value):
            raise VITaskError(f"--vitask True does not go with --{name} {plain(value)}: {refusal.why}")
    if validates:
        _check_validation(parsed)
    ranges.check(parsed)
    _check_json(parsed)
    check_precision(parsed)
    check_bits(parsed)


def _check_validation(parsed: Namespace) -> None:
    given = f"--vitask_eval_data {parsed.vitask_eval_data}"
    if plain(parsed.eval_strategy) == "no":
        raise VITaskError(f"{given} is never looked at with --eval_strategy no; give --eval_strategy steps or epoch")
    best = parsed.load_best_model_at_end or parsed.metric_for_best_model is not None
    if parsed.vitask_early_stopping_patience and not best:
        raise VITaskError(
            f"--vitask_early_stopping_patience {parsed.vitask_early_stopping_patience} does not say with which figure; "
            "give --metric_for_best_model, such as accuracy"
        )
    if plain(parsed.save_strategy) == "best" and not best:
        raise VITaskError("--save_strategy best does not say by what; give --metric_for_best_model, such as accuracy")
    if parsed.load_best_model_at_end and parsed.save_only_model and parsed.deepspeed:
        raise VITaskError(
            "--load_best_model_at_end True needs DeepSpeed's own checkpoints, which --save_only_model True leaves out; "
            "leave one of them out"
        )


def _check_json(parsed: Namespace) -> None:
    for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs"):
        value = getattr(parsed, name, None)
        if isinstance(value, str):
            try:
                found = json.loads(value)
            except ValueError as error:
                raise VITaskError(f"--{name} {value!r} is not readable JSON ({error}); correct it") from None
            if not isinstance(found, dict):
                raise VITaskError(f'--{name} {value!r} is no JSON object; give one, such as {{"name": 1}}')


def check_known(left: Sequence[str], parsed: Namespace, names: Collection[str], hosts: str) -> None:
    """Refuses words of the command line that are no flag of anybody's, or of no flag.

    Args:
        left: what parsing has left of it. parsed: the flags that there are. names: those that some version of
            transformers has. hosts: who else could have a flag, as a sentence names them.

    Raises:
        VITaskError: naming the first word, and the flag that it may have meant.
    """
    if not left:
        return
    word = left[0].partition("=")[0]
    name = word.lstrip("-").replace("-", "_")
    close = difflib.get_close_matches(name, vars(parsed), 1)
    if word.startswith("--"):
        if name in names:
            raise VITaskError(f"the installed transformers has no {word} any more; leave it out")
        meant = f"; perhaps --{close[0]} was meant" if close else "; leave it out"
        raise VITaskError(f"neither {hosts} nor VITask has a flag {word}{meant}")
    raise VITaskError(f"{word!r} on the command line belongs to no flag; give each value after its --flag")


def check_makes(args: Any) -> None:
    """Refuses a schedule or a tracker that cannot be made, before anything long begins.

    Args:
        args: transformers' training arguments.

    Raises:
        VITaskError: naming it and what it lacks.
    """
    _check_schedule(args)
    for name in args.report_to:
        try:
            for tracker in get_reporting_integration_callbacks([name]):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            raise VITaskError(f"--report_to {name} cannot be used ({error}); give another, or none") from None


def _check_schedule(args: Any) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    given = args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(args.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(given))
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise VITaskError(
            f"--lr_scheduler_type {plain(args.lr_scheduler_type)} does not go with --lr_scheduler_kwargs "
            f"{json.dumps(given)} ({error}) at --learning_rate {args.learning_rate}; give the settings that it needs, "
            "as JSON, or use cosine"
        ) from None


def check_precision(parsed: Namespace) -> None:
    """Refuses bfloat16 where transformers would, before it does so with a traceback, and with the flags for a CPU."""
    on_cpu = getattr(parsed, "use_cpu", False) or getattr(parsed, "no_cuda", False)
    if getattr(parsed, "bf16", False) and not (on_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
        found = "the GPU here does not compute in it" if torch.cuda.is_available() else "there is no GPU here"
        raise VITaskError(
            f"--bf16 True needs a GPU that computes in bfloat16, and {found}; give --bf16 False, and --use_cpu True to "
            "train on the CPU"
        )


def check_bits(parsed: Namespace) -> None:
    """Quantized weights are frozen: they need adapters, and bitsandbytes, which is no requirement of ours."""
    bits = getattr(parsed, "bits", 16)
    if bits == 16:
        return
    if not parsed.lora_enable:
        raise VITaskError(
            f"--bits {bits} freezes the quantized weights, so nothing of the LLM would be trained; add "
            "--lora_enable True, or leave --bits out"
        )
    if parsed.deepspeed and zero_section(configuration(parsed.deepspeed), parsed.deepspeed).stage == 3:
        raise VITaskError(
            f"--bits {bits} does not go with ZeRO-3, which divides the weights before they are quantized; give a "
            "ZeRO-2 configuration, or leave --bits out"
        )
    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise VITaskError(
            f"--bits {bits} needs bitsandbytes, which is not installed; install it with "
            "`pip install 'vitask-plugin[bits]'`, or leave --bits out"
        ) from None
