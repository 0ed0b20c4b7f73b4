"""Fixtures for runs on several processes: 32 samples of every kind, the features of a TSM, and upstream's flags."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

import vitask_plugin.deepspeed
from vitask_plugin.data.instructions import DRAWN

MODEL = "test_resnet.r160_in1k"
# Without dropout, which draws other numbers on each rank: with it, runs are alike, not equal.
LORA = ("--lora_enable", "True", "--lora_r", "8", "--lora_alpha", "16", "--lora_dropout", "0")
LEARNING_RATE = 1e-3
STEPS = 4  # of 8 samples, one epoch


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory, drawn_data: Path) -> Path:
    """`train.json` + `images/`: 24 drawn samples, 2 of several turns, 2 general images, 4 text-only. Read only.

    The words are those of the drawn task, which the tiny tokenizer was trained on.
    """
    directory = tmp_path_factory.mktemp("mixture") / "data"
    shutil.copytree(drawn_data, directory)
    samples = json.loads((directory / "train.json").read_text())
    several = several_turns(samples)
    general = [
        {
            "id": f"general-{number}",
            "image": samples[number]["image"],
            "conversations": turns("<image>\nWhat is this?", "A texture with stripes."),
        }
        for number in range(2)
    ]
    answers = ("It is mild.", "It is no image and has stripes.", "Stripes.", "No image.")
    text = [
        {"id": f"text-{number}", "conversations": turns("Analyze the weather.", answer)}
        for number, answer in enumerate(answers)
    ]
    mixed = [*several, *general, *text, *samples]
    assert len(mixed) == 8 * STEPS
    (directory / "train.json").write_text(json.dumps(mixed))
    return directory


def several_turns(samples: list[dict]) -> list[dict]:
    """Two of the drawn samples, of different answers, with a second question."""
    follow_up = turns("Are you sure?", "Yes, quite sure.")
    by_label = {sample["vitask"]["label"]: sample for sample in samples}
    return [
        {**by_label[label], "id": f"turns-{label}", "conversations": by_label[label]["conversations"] + follow_up}
        for label in (0, 1)
    ]


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture(scope="session")
def sized_mixture(tmp_path_factory: pytest.TempPathFactory, mixture: Path) -> Path:
    """The mixture with images of three sizes, of which some models make more tokens. Read only."""
    directory = tmp_path_factory.mktemp("sized-mixture") / "data"
    shutil.copytree(mixture, directory)
    for number, path in enumerate(sorted((directory / "images").rglob("*.png"))):
        if number % 3:
            with Image.open(path) as image:
                wider = image.resize((56, 28) if number % 3 == 1 else (28, 56))
            wider.save(path)
    return directory


@pytest.fixture(scope="session")
def mixture_features(tmp_path_factory: pytest.TempPathFactory, mixture: Path) -> Path:
    """Features of the mixture, by a TSM with random weights: where they go matters here, not what they mean."""
    return _features(tmp_path_factory.mktemp("mixture-tsm"), mixture)


@pytest.fixture(scope="session")
def sized_mixture_features(tmp_path_factory: pytest.TempPathFactory, sized_mixture: Path) -> Path:
    """The same of the images of several sizes; the TSM lies beside it as `tsm`."""
    return _features(tmp_path_factory.mktemp("sized-mixture-tsm"), sized_mixture)


def _features(directory: Path, data: Path) -> Path:
    import torch

    from vitask_plugin.tsm.backbone import build_timm, pixel_statistics
    from vitask_plugin.tsm.features import extract
    from vitask_plugin.tsm.model import TSM

    torch.manual_seed(0)
    network = build_timm(MODEL, len(DRAWN.choices), {})
    mean, std = pixel_statistics(network)
    tasks = {DRAWN.task: {"choices": list(DRAWN.choices), "multi_label": False}}
    record = {"source": {"timm": MODEL}, "image_size": 32, "mean": mean, "std": std, "tasks": tasks}
    TSM(network, record).save(directory / "tsm")
    extract(directory / "tsm", [data / "train.json"], data / "images", directory / "features", tokens="cls")
    return directory / "features"


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`zero1`, `zero2`, `zero3` to a DeepSpeed config: the package's own; ZeRO-1 is its ZeRO-2 with another stage."""
    shipped = Path(vitask_plugin.deepspeed.__file__).parent
    first = tmp_path_factory.mktemp("zero") / "zero1.json"
    with_setting(shipped / "zero2.json", first, stage=1)
    return lambda name: str(first if name == "zero1" else shipped / f"{name}.json")


def with_setting(config: Path, written: Path, **settings: object) -> None:
    """Writes a DeepSpeed config with other ZeRO settings."""
    content = json.loads(config.read_text())
    content["zero_optimization"] |= settings
    written.write_text(json.dumps(content))


def flags(tiny_llava, data: Path, features: Path, output: Path, *more: str) -> list[str]:
    """Upstream's usual command line with VITask: one epoch, float32 unless `more` says otherwise."""
    return [
        *("--model_name_or_path", str(tiny_llava.base), "--version", "v1"),
        *("--data_path", str(data / "train.json"), "--image_folder", str(data / "images")),
        *("--vision_tower", str(tiny_llava.tower), "--mm_projector_type", "mlp2x_gelu"),
        *("--mm_vision_select_layer", "-2", "--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False"),
        *("--output_dir", str(output), "--num_train_epochs", "1", "--learning_rate", str(LEARNING_RATE)),
        *("--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--model_max_length", "512"),
        *("--use_cpu", "True", "--bf16", "False", "--lazy_preprocess", "True", "--disable_tqdm", "True"),
        *("--vitask", "True", "--vitask_features", str(features)),
        *more,
    ]
