"""Every flag of upstream's is honoured or refused: the table against upstream's classes, and what is refused."""

import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest

from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import compat, flags

CLASSES = ("ModelArguments", "DataArguments", "TrainingArguments")


def upstream() -> dict[str, type]:
    compat.prepare()
    from llava.train import train

    compat.patch_script(vars(train))
    return {name: getattr(train, name) for name in CLASSES}


@pytest.mark.compat
def test_every_flag_of_upstreams_is_in_the_table() -> None:
    assert flags.HONOURED.isdisjoint(flags.REFUSED)
    known = flags.HONOURED | flags.REFUSED.keys()
    for name, arguments in upstream().items():
        unknown = {field.name for field in fields(arguments) if field.init} - known
        assert not unknown, f"{name} has {unknown}: say in flags.py what VITask does with them"


@pytest.mark.compat
def test_the_defaults_of_upstream_are_not_refused() -> None:
    from transformers import HfArgumentParser

    parser = HfArgumentParser(list(upstream().values()))
    parsed, _ = parser.parse_known_args(["--output_dir", "out", "--data_path", "train.json", "--vision_tower", "tower"])
    flags.check(parsed)
    # As in upstream's scripts.
    parsed, _ = parser.parse_known_args(
        [
            *("--output_dir", "out", "--data_path", "train.json", "--evaluation_strategy", "no", "--tf32", "True"),
            *("--lazy_preprocess", "True", "--group_by_modality_length", "True", "--per_device_eval_batch_size", "4"),
            *("--image_aspect_ratio", "pad", "--mm_projector_lr", "2e-5", "--version", "v1"),
        ]
    )
    flags.check(parsed)


def test_the_example_has_enough_steps() -> None:
    """BreastMNIST has 546 training images; stage 1 has to teach a connector from them."""
    from vitask_plugin.training.rates import ENOUGH_STEPS

    text = (Path(__file__).resolve().parents[2] / "docs/commands.md").read_text(encoding="utf-8")
    command = text[text.index("torchrun --nproc_per_node") :].partition("```")[0]
    names = ("nproc_per_node", "per_device_train_batch_size", "num_train_epochs")
    processes, batch, epochs = (int(re.search(rf"--{name} (\d+)", command)[1]) for name in names)
    assert epochs * -(-546 // (processes * batch)) >= ENOUGH_STEPS


REFUSED = [
    "--image_aspect_ratio anyres",
    "--image_aspect_ratio anyres_max_9",
    "--mm_patch_merge_type spatial_unpad",
    "--mm_vision_select_feature cls",
    "--mm_projector_type qformer",
    "--mpt_attn_impl torch",
    "--version mpt",
    "--version plain",
    "--version v1_mmtag",
    "--version v_1",
    "--lora_weight_path adapter",
    "--lora_bias all",
    "--remove_unused_columns True",
    "--label_smoothing_factor 0.1",
    "--neftune_noise_alpha 5.0",
    "--use_liger_kernel True",
    "--torch_compile True",
    "--torch_compile_backend inductor",
    "--auto_find_batch_size True",
    "--data_seed 3",
    "--evaluation_strategy steps",
    "--eval_strategy epoch",
    "--load_best_model_at_end True",
    "--save_strategy best",
    "--lr_scheduler_type reduce_lr_on_plateau",
    "--optim galore_adamw",
    "--resume_from_checkpoint out/checkpoint-5",
    "--include_num_input_tokens_seen True",
    "--hub_strategy checkpoint",
    "--fsdp full_shard",
    "--accelerator_config config.json",
    "--do_predict True",
]


@pytest.mark.parametrize("words", REFUSED)
def test_what_a_step_would_not_act_on_is_refused(words: str) -> None:
    from transformers import HfArgumentParser

    parsed, left = HfArgumentParser(list(upstream().values())).parse_known_args([*words.split(), "--output_dir", "out"])
    name, value = words.removeprefix("--").split()
    assert left == []
    with pytest.raises(VITaskError, match=rf"--{name.replace('evaluation_', 'eval_')} {value}: .+") as refused:
        flags.check(parsed)
    assert "\n" not in str(refused.value)


def test_a_flag_that_transformers_has_no_more_is_called_that() -> None:
    parsed = SimpleNamespace(output_dir="out", learning_rate=1e-3)
    with pytest.raises(VITaskError, match=r"installed transformers has no --overwrite_output_dir any more; leave it"):
        flags.check_known(["--overwrite_output_dir", "True"], parsed)
    with pytest.raises(VITaskError, match="perhaps --learning_rate was meant"):
        flags.check_known(["--lerning_rate", "1"], parsed)


def model(**changes: object) -> dict[str, object]:
    """The configuration of a LLaVA-1.5."""
    usual = {
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "vocab_size": 32000,
    }
    return usual | changes


FLAGS = {
    "model_name_or_path": "models/llava",
    "vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_projector_type": "mlp2x_gelu",
}


def test_flags_that_the_model_was_not_built_with_are_refused() -> None:
    """Upstream goes by the model's configuration, and writes the flag's value into that of the checkpoint."""
    flags.check_model(SimpleNamespace(**FLAGS), model())
    flags.check_model(SimpleNamespace(**FLAGS), {"vocab_size": 32000})  # an LLM alone
    for name, value in (
        ("mm_vision_select_layer", -1),
        ("mm_vision_select_feature", "cls_patch"),
        ("mm_projector_type", "linear"),
        ("vision_tower", "openai/clip-vit-large-patch14"),
    ):
        with pytest.raises(VITaskError, match=rf"--{name} {value} .+ give --{name} {FLAGS[name]}$"):
            flags.check_model(SimpleNamespace(**{**FLAGS, name: value}), model())


def test_a_model_of_several_views_is_refused() -> None:
    with pytest.raises(VITaskError, match="image_aspect_ratio anyres"):
        flags.check_model(SimpleNamespace(**FLAGS), model(image_aspect_ratio="anyres"))


def test_longer_embeddings_under_lora_are_refused() -> None:
    flags.check_vocabulary(32000, model())
    with pytest.raises(VITaskError, match=r"32001 .+ 32000 .+--mm_use_im_patch_token False"):
        flags.check_vocabulary(32001, model())
