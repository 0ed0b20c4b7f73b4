"""What several tests share: one tiny LLaVA, one tiny checkpoint and one small drawn data set per session."""

import os

# Before torch is imported: tests are many small steps, which more threads only slow down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest

from vitask_plugin.data.drawn import draw_dataset, task_texts
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.llava.tiny import TinyLlava, make_tiny_checkpoint, make_tiny_llava

pytest_plugins = ("tiers", "mixture", "saved", "mixed", "hf_models", "twelve", "hub_stand_in")  # of tests/support
SIZES = {"train": 24, "val": 8, "test": 16}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_early_end() -> Iterator[None]:
    """A training run ends its process by itself (`launch.leave`): here all tests that are left would be passed over,
    and the status would be that of success."""
    exit_at_once, own = os._exit, os.getpid()

    def refused(status: int) -> None:
        if os.getpid() == own:
            raise AssertionError(f"os._exit({status}) in the process of the tests")
        exit_at_once(status)

    os._exit = refused
    yield
    os._exit = exit_at_once


@pytest.fixture(scope="session")
def drawn_texts() -> list[str]:
    """Every sentence of the drawn task: what its tokenizer is trained on."""
    return task_texts(DRAWN)


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory, drawn_texts: list[str]) -> TinyLlava:
    """An untuned LLaVA: `.base` for --model_name_or_path, `.tower` for --vision_tower (16 image tokens). Read only."""
    return make_tiny_llava(
        tmp_path_factory.mktemp("untuned") / "tiny-llava", texts=drawn_texts, seed=0, hidden_size=64, layers=2
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_llava: TinyLlava, drawn_texts: list[str]) -> Path:
    """A whole LLaVA checkpoint with random weights; its folder's name contains "llava". Read only."""
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny-llava-checkpoint"
    return make_tiny_checkpoint(directory, texts=drawn_texts, seed=0, tower=tiny_llava.tower, hidden_size=64, layers=2)


@pytest.fixture(scope="session")
def drawn_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for $MEDMNIST_ROOT with drawn.npz: 24 + 8 + 16 images. Read only."""
    root = tmp_path_factory.mktemp("medmnist")
    draw_dataset(root / "drawn.npz", seed=0, sizes=SIZES)
    return root


@pytest.fixture(scope="session")
def drawn_data(tmp_path_factory: pytest.TempPathFactory, drawn_root: Path) -> Path:
    """What `vitask data medmnist --task drawn` writes: a JSON per split, labels.json, images/. Read only."""
    from vitask_plugin.cli import main

    directory = tmp_path_factory.mktemp("data") / "drawn"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(drawn_root))
        assert main(["data", "medmnist", "--task", "drawn", "--out", str(directory)]) == 0
    return directory
