"""`python -m vitask_plugin.hf.train ...`: an HF vision-language model tuned by the Trainer, with VITask or without.

Without `--vitask True` it is the stock model under the stock Trainer on LLaVA's JSON.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import HfArgumentParser, Trainer, set_seed
from transformers.trainer_utils import get_last_checkpoint

from vitask_plugin.data.instructions import read_samples
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder
from vitask_plugin.hf import families, loading
from vitask_plugin.hf.arguments import (
    HONOURED,
    REFUSED,
    DataArguments,
    ModelArguments,
    TrainingArguments,
    check_host,
    check_parts,
    check_trained,
)
from vitask_plugin.hf.batch import EncodedSamples, PlainBatches, VITaskDataset
from vitask_plugin.hf.conversation import Template
from vitask_plugin.hf.trainer import HFTrainer, VITaskTrainer
from vitask_plugin.training import agreement, flags, paths, precision, processes, ranges, running, starting, workarounds
from vitask_plugin.training.batches import pad_of

CLASSES = (ModelArguments, DataArguments, TrainingArguments)


def main() -> None:
    """The command; bad input ends it with one sentence, on every process."""
    running.run(lambda: train(sys.argv[1:]), for_good=True)


def train(argv: list[str]) -> None:
    """One run.

    Args:
        argv: the command line, without the program.

    Raises:
        VITaskError: bad input.
    """
    workarounds.prepare(TrainingArguments)
    parser = HfArgumentParser(CLASSES, allow_abbrev=False)
    known, left = parser.parse_known_args(argv)
    check_host(left)
    flags.check_known(left, known, HONOURED | REFUSED.keys(), "the HF host")
    check_parts(known)
    if known.vitask:
        flags.check(known, REFUSED)
        ranges.check_warmup(processes.flags_of(argv))
    else:
        flags.check_precision(known)
        flags.check_bits(known)
    with processes.checked(TrainingArguments, argv, lambda given: paths.check(given, paths.LOOKS)):
        model_args, data_args, args = parser.parse_args_into_dataclasses(argv)
    check_trained(model_args, args)
    set_seed(args.seed)
    if not model_args.model_name_or_path:
        raise VITaskError("--model_name_or_path is missing; give a folder or a Hub name of a model in HF format")
    with agreement.together():
        if model_args.vitask:
            starting.find_connector(model_args, model_args.model_name_or_path)
        config = loading.read_config(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
        template = loading.load_template(model_args.model_name_or_path, config, cache_dir=model_args.cache_dir)
        # Remote code is never run; quantized and plain weights come by one way.
        model = _model(model_args, args, config)
    trainer = (_vitask_trainer if model_args.vitask else _stock_trainer)(model_args, data_args, args, model, template)
    # Which one is the trainer's to say: with VITask all ranks agree on the newest that is whole.
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or _sees_one(args.output_dir))
    _save(trainer, args)


def _model(given: ModelArguments, args: TrainingArguments, config: Any) -> nn.Module:
    dtype = precision.compute_dtype(args, torch.float32)
    own: dict[str, Any] = {"cache_dir": given.cache_dir}
    if given.attn_implementation is not None:
        own["attn_implementation"] = given.attn_implementation
    if args.bits in (4, 8):
        own["quantization_config"] = _quantization(args, dtype)
    model = loading.load_model(given.model_name_or_path, config, dtype=dtype, **own)
    if args.bits in (4, 8):
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    if args.lora_enable:
        model.requires_grad_(False)
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
        return loading.add_lora(model, args, projector=not given.freeze_projector)
    families.freeze(
        model,
        tower=given.freeze_vision_tower,
        projector=given.freeze_projector,
        language_model=given.freeze_language_model,
    )
    return model


def _quantization(args: TrainingArguments, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=args.bits == 4,
        load_in_8bit=args.bits == 8,
        llm_int8_skip_modules=["lm_head", *families.TOWERS, *families.PROJECTORS],
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=args.double_quant,
        bnb_4bit_quant_type=args.quant_type,
    )


def _vitask_trainer(
    vitask: ModelArguments, data: DataArguments, args: TrainingArguments, model: nn.Module, template: Template
) -> Trainer:
    with agreement.together():
        dataset = VITaskDataset(data.data_path, data.image_folder, template, args.model_max_length, vitask)
    return VITaskTrainer(
        model=model,
        args=args,
        train_dataset=dataset,
        processing_class=template.processor,
        vitask=vitask,
        version="chat template",
    )


def _stock_trainer(
    given: ModelArguments, data: DataArguments, args: TrainingArguments, model: nn.Module, template: Template
) -> Trainer:
    check_folder(data.image_folder, "image folder")
    if not args.deepspeed:
        precision.train_in_float32(model)  # as with VITask, which it is held against: 16 bits lose most updates
    samples = EncodedSamples(read_samples(data.data_path), data.image_folder, template, args.model_max_length)
    return HFTrainer(
        model=model,
        args=args,
        train_dataset=samples,
        data_collator=PlainBatches(pad_of(template.tokenizer)),
        processing_class=template.processor,
    )


def _sees_one(output_dir: str) -> bool:
    return Path(output_dir).is_dir() and get_last_checkpoint(output_dir) is not None


def _save(trainer: Trainer, args: TrainingArguments) -> None:
    trainer.save_state()
    precision.as_written(trainer.model)
    trainer.save_model(args.output_dir)
    if isinstance(trainer, VITaskTrainer):
        trainer.finished()


if __name__ == "__main__":
    main()
