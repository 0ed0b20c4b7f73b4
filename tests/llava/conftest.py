"""A LoRA run of one step with VITask: adapter, connector and record as training leaves them."""

from pathlib import Path

import mixture as mixed
import pytest
from ranks import launch


@pytest.fixture(scope="session")
def lora_checkpoint(tmp_path_factory, tiny_llava, mixture: Path, mixture_features: Path) -> Path:
    """Its base is `tiny_llava.base`. Read only."""
    output = tmp_path_factory.mktemp("lora") / "llava-lora"
    steps = ("--max_steps", "1", "--per_device_train_batch_size", "8", "--learning_rate", "0.05")
    flags = mixed.flags(tiny_llava, mixture, mixture_features, output, *mixed.LORA, *steps)
    ended = launch(1, flags, output.parent / "log")
    assert ended.statuses == [0], ended.text
    return output
