"""Values of upstream's flags that a run cannot be made with: one sentence at the start, no late traceback."""

import json
import os
import re
from collections.abc import Callable

import pytest
import torch
from ranks import launch
from runs import LORA, arguments

CASES = {
    "--per_device_train_batch_size 0": "is 0; give a number that is 1 or more",
    "--gradient_accumulation_steps 0": "is 0; give a number that is 1 or more",
    "--learning_rate -1": "is -1.0; give a number",
    "--learning_rate nan": "is nan; give a number",
    "--mm_projector_lr inf": "is inf; give a number",
    "--num_train_epochs 0": "is 0.0, which trains nothing",
    "--max_steps 0": "is 0; give a number",
    "--model_max_length -5": "is -5; give a number",
    "--dataloader_num_workers -1": "is -1; give a number",
    "--lora_r 0": "is 0; give a number",
    "--warmup_ratio 1.5": "is 1.5; give a number that is 0 or more and less than 1",
    "--warmup_ratio 1": "is 1.0; give a number that is 0 or more and less than 1",
    "--lora_dropout 2": "is 2.0; give a number",
    "--adam_beta2 1": "is 1.0; give a number",
    "--seed -1": "is -1; give a number that is from 0 to 4294967295",
    "--logging_steps 0": "transformers refuses the flags",
    "--optim foo": "transformers refuses the flags: foo is not a valid OptimizerNames",
    "--quant_type int4": "knows fp4 and nf4",
    "--image_grid_pinpoints [(336,672)]": "neither upstream 1.2.2 nor VITask has a flag --image_grid_pinpoints",
    "--vitask_crt_wieght 1": "perhaps --vitask_crt_weight was meant",
    "--lr_scheduler_type cosine_with_min_lr": "does not go with --lr_scheduler_kwargs {} (One of min_lr",
    "--lr_scheduler_type warmup_stable_decay": "num_decay_steps",
    "--lr_scheduler_kwargs {nope": "is not readable JSON",
    "--lr_scheduler_kwargs [1]": "is no JSON object",
    '--lr_scheduler_type polynomial --learning_rate 2e-5 --lr_scheduler_kwargs {"lr_end":1e-3}': "initial lr (2e-05)",
    '--lr_scheduler_type cosine_with_min_lr --learning_rate 0 --lr_scheduler_kwargs {"min_lr":0}': "division by zero",
    "--bf16 True --use_cpu False": "there is no GPU here; give --bf16 False, and --use_cpu True to train on the CPU",
    "--report_to foo": "cannot be used (foo is not supported",
}


def refuses_to_load() -> None:
    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("the model was loaded")

    VITaskLlavaLlamaForCausalLM.from_pretrained = load


def launched_without_an_address() -> None:
    os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"})
    os.environ.pop("MASTER_ADDR", None)
    refuses_to_load()


@pytest.fixture
def refused(tiny_llava, tiny_checkpoint, mixed_data, feature_store, tmp_path):
    """Runs the training command, in a process of its own; returns the sentence that it ended with."""
    start = ["--vitask", "True", "--model_name_or_path", str(tiny_checkpoint)]
    command = arguments(tiny_llava, mixed_data, tmp_path / "out", *start, "--vitask_features", str(feature_store))

    def run(*flags: str, before: Callable[[], None] = refuses_to_load) -> str:
        ended = launch(1, [*command, *flags], tmp_path / "logs", before={0: before})
        assert ended.statuses == [1] and "Traceback" not in ended.text, ended.text
        (sentence,) = re.findall("^vitask: error: .*$", ended.text, re.MULTILINE)
        assert ended.text.rstrip().endswith(sentence)
        return sentence

    return run


@pytest.mark.parametrize("words", CASES)
def test_one_sentence_at_the_start(words, refused) -> None:
    sentence = refused(*words.split())
    assert CASES[words] in sentence
    assert "transformers refuses" in sentence or words.split()[0] in sentence


def test_a_word_that_belongs_to_no_flag(refused) -> None:
    assert "'args.json' on the command line belongs to no flag" in refused("--bf16", "False", "args.json")


def test_both_precisions_at_once(refused) -> None:
    assert "At most one of fp16 and bf16" in refused("--fp16", "True", "--bf16", "True")


def test_a_projector_of_another_shape(refused, tmp_path) -> None:
    weights = {"model.mm_projector.0.weight": torch.zeros(64, 32), "model.mm_projector.0.bias": torch.zeros(64)}
    torch.save(weights, tmp_path / "linear.bin")
    sentence = refused("--pretrain_mm_mlp_adapter", str(tmp_path / "linear.bin"))
    assert "holds {'0.weight': (64, 32), '0.bias': (64,)}" in sentence and "'2.weight': (64, 64)" in sentence


@pytest.mark.parametrize("lora", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_configuration_that_does_not_turn_the_precision_on(half, lora, refused, tmp_path) -> None:
    """Such as those in transformers' documentation, which have fp16 alone: DeepSpeed would keep no float32 copies."""
    other = {"bf16": "fp16", "fp16": "bf16"}[half]
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}, other: {"enabled": "auto"}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    sentence = refused(f"--{half}", "True", "--deepspeed", str(tmp_path / "zero.json"), *lora)
    assert f'add "{half}": {{"enabled": "auto"}}' in sentence


def test_a_setting_that_differs_from_its_flag(refused, tmp_path) -> None:
    """In this project's words, though DeepSpeed would refuse it too."""
    config = {"train_micro_batch_size_per_gpu": 3, "train_batch_size": 7, "zero_optimization": {"stage": 2}}
    (tmp_path / "zero.json").write_text(json.dumps(config))
    sentence = refused("--deepspeed", str(tmp_path / "zero.json"))
    assert "the DeepSpeed configuration and the flags differ: ds train_micro_batch_size_per_gpu=3" in sentence


@pytest.mark.parametrize("stage", [None, "zero2"])
def test_an_address_that_the_launcher_left_out(stage, refused, zero) -> None:
    sentence = refused(*(["--deepspeed", zero(stage)] if stage else []), before=launched_without_an_address)
    assert "do not find each other" in sentence and "start them with torchrun or deepspeed" in sentence


def test_what_deepspeed_itself_refuses(refused, tmp_path) -> None:
    config = {"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 2}}
    path = tmp_path / "zero.json"
    for name, section, words in (
        ("progressive_layer_drop", {"enabled": True}, "DeepSpeed refuses the configuration"),
        ("tensor_parallel", {"autotp_size": 2}, "has tensor_parallel"),
        ("data_efficiency", {"enabled": True}, "has data_efficiency"),
        ("compression_training", {}, "DeepSpeed refuses the configuration"),
    ):
        path.write_text(json.dumps({**config, name: section}))
        assert words in refused("--deepspeed", str(path))
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(config).encode())
    assert "byte-order mark" in refused("--deepspeed", str(path))


def test_quantized_weights_under_zero_3(refused, zero) -> None:
    assert "--bits 4 does not go with ZeRO-3" in refused("--bits", "4", *LORA, "--deepspeed", zero("zero3"))
