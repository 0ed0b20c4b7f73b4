"""The DeepSpeed configurations: what the Trainer fills in, what DeepSpeed reads, and `vitask deepspeed-config`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vitask_plugin import cli
from vitask_plugin.deepspeed.configs import NAMES, config_path, read_zero
from vitask_plugin.deepspeed.reading import check_accepted
from vitask_plugin.errors import VITaskError

ROOT = Path(__file__).resolve().parents[2]


def autos(value: object, path: str = "") -> list[str]:
    """Dotted names of the fields that are "auto"."""
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in autos(inner, f"{path}.{key}".lstrip("."))]
    return [path] if value == "auto" else []


def test_every_file_of_the_folder_is_a_configuration_and_listed() -> None:
    files = {path.stem for path in (ROOT / "vitask_plugin" / "deepspeed").glob("*.json")}
    assert files == set(NAMES) and len(files) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_fills_every_auto(name: str, tmp_path: Path) -> None:
    from transformers import LlamaConfig, TrainingArguments
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        max_grad_norm=0.5,
        bf16=True,
        use_cpu=True,
    )
    model = type("Model", (), {"config": LlamaConfig(hidden_size=64)})
    try:
        filled = HfTrainerDeepSpeedConfig(str(config_path(name)))
        assert len(autos(filled.config)) >= 7
        filled.trainer_config_process(args)
        filled.trainer_config_finalize(args, model, num_training_steps=10)
    finally:
        unset_hf_deepspeed_config()
    config, zero = filled.config, filled.config["zero_optimization"]
    assert autos(config) == [] and filled.mismatches == []
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 5)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (15 * args.world_size, 0.5)
    assert config["bf16"] == {"enabled": True} and config["fp16"] == {"enabled": False}
    assert zero["reduce_bucket_size"] == 64**2
    if zero["stage"] == 3:
        assert zero["stage3_param_persistence_threshold"] == 640
        assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 64**2)


@pytest.mark.parametrize(
    ("name", "stage", "optimizer", "weights"),
    [
        ("zero2", 2, False, False),
        ("zero2_offload", 2, True, False),
        ("zero3", 3, False, False),
        ("zero3_offload", 3, True, True),
    ],
)
def test_what_deepspeed_reads(name: str, stage: int, optimizer: bool, weights: bool) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(config_path(name).read_text())
    # With either of them upstream's parameter groups would be lost.
    assert not {"optimizer", "scheduler"} & set(config)
    zero = DeepSpeedZeroConfig(**{key: value for key, value in config["zero_optimization"].items() if value != "auto"})
    assert zero.stage == stage and zero.overlap_comm and zero.contiguous_gradients
    assert zero.gather_16bit_weights_on_model_save == (stage == 3)
    for section, expected in ((zero.offload_optimizer, optimizer), (zero.offload_param, weights)):
        assert (section is not None) == expected
        assert section is None or (section.device == "cpu" and section.pin_memory)
    read = read_zero(name)
    assert (read.stage, read.offload_optimizer, read.offload_param) == (stage, optimizer, weights)
    assert read.max_live_parameters == zero.max_live_parameters


OFF = {
    "data_efficiency": {"seed": 1234, "data_routing": {"random_ltd": {"enabled": False}}},
    "tensor_parallel": {"autotp_size": 1},
    "sequence_parallel_size": 1,
}
ON = {
    "data_efficiency": {"data_routing": {"random_ltd": {"enabled": True}}},  # on by itself
    "tensor_parallel": {"autotp_size": 2},
    "sequence_parallel_size": 2,
}


def test_sections_of_another_step_are_refused_where_they_are_on() -> None:
    usual = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    for off in (OFF, {"tensor_parallel": {"autotp_size": 0}}, {"data_efficiency": {"enabled": False}}):
        check_accepted({**usual, **off}, "zero.json", bf16=False, fp16=False)
    for name, section in ON.items():
        with pytest.raises(VITaskError, match=f"'zero.json' has {name}"):
            check_accepted({**usual, **OFF, name: section}, "zero.json", bf16=False, fp16=False)


def test_autocast_is_named_where_it_stands_in_the_way() -> None:
    autocast = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 2}}
    for more, words in ((autocast, "in place of torch_autocast"), ({}, '"auto"} to it$')):
        with pytest.raises(VITaskError, match=words):
            check_accepted({**config, **more}, "zero.json", bf16=True, fp16=False)


def test_the_command_prints_the_path_and_nothing_else() -> None:
    command = [Path(sys.executable).parent / "vitask", "deepspeed-config", "zero3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout == f"{config_path('zero3')}\n" and done.stderr == ""
    assert Path(done.stdout.strip()).is_absolute() and json.loads(Path(done.stdout.strip()).read_text())


def test_an_unknown_name_lists_the_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["deepspeed-config", "zero9"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and "'zero9'" in shown.err and all(name in shown.err for name in NAMES)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 1e6, "offload_param": {"device": "none"}}
    path.write_text(json.dumps({"zero_optimization": zero}))
    read = read_zero(str(path))
    assert (read.name, read.stage, read.max_live_parameters) == ("own.json", 3, 1_000_000)
    assert not read.offload_param and not read.offload_optimizer
    path.write_text("{}")
    assert read_zero(str(path)).stage == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not readable JSON"),
        ("[]", "no JSON object"),
        ('{"zero_optimization": 3}', "no JSON object"),
        ('{"zero_optimization": {"stage": 7}}', "zero_optimization.stage"),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}', "NVMe"),
    ],
)
def test_a_file_that_is_none(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(VITaskError, match=words) as caught:
        read_zero(str(path))
    assert "own.json" in str(caught.value)
    with pytest.raises(VITaskError, match="neither a file nor one of zero2"):
        read_zero(str(tmp_path / "absent.json"))
