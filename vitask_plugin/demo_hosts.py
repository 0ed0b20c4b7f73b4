"""The hosts that `vitask demo` shows: how each makes its tiny model and trains it, and its settings.

A host is one subclass of `DemoHost`. Models lie in folders of the same names whatever the host.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from vitask_plugin.stages import module

TINY, VANILLA, STAGE1, STAGE2 = "tiny-llava", "llava-vanilla", "llava-vitask-stage1", "llava-vitask"


@dataclass(frozen=True)
class Settings:
    """What tuning depends on, of vanilla and of both stages of VITask. `benchmarks/demo_seeds.py` tries others.

    RDA weighs twice its default: a model that starts from random weights, on labels of which many are wrong, has more
    to learn from the exemplar branch than from them (on validation images .685 against .657, `benchmarks/LOG.md`).
    """

    batch: int = 16
    learning_rate: float = 1e-3
    rda_weight: float = 2.0
    crt_weight: float = 0.1
    connector_lr: float = 2e-3


class DemoHost:
    """One host.

    Attributes:
        model: its name in lmms-eval. tuned: what is tuned and by what, as part of a sentence. title: of the table.
        packages: whose versions are reported. record: what else `results.json` says of the host.
    """

    model: ClassVar[str]
    tuned: ClassVar[str]
    title: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]]
    record: ClassVar[dict[str, str]] = {}
    settings: ClassVar[Settings] = Settings()

    def make_tiny(self, out: Path, task: str, seed: int) -> list[str]:
        """The command that writes the untuned model of a task to `out`/`TINY`."""
        raise NotImplementedError

    def train(self, out: Path, start: str) -> list[str]:
        """The command of a run from the model in `out`/`start`, up to the flags that all hosts share."""
        raise NotImplementedError


class LlavaHost(DemoHost):
    """Upstream LLaVA's script, on a Llama and a CLIP tower of its formats."""

    model = "vitask_llava"
    tuned = "A tiny LLaVA, made from random numbers, tuned on {} with upstream's training script"
    packages = ("vitask-plugin", "llava-torch", "lmms_eval", "transformers", "torch", "timm", "medmnist")

    def make_tiny(self, out: Path, task: str, seed: int) -> list[str]:
        return module("vitask_plugin.llava.tiny", "--out", out / TINY, "--task", task, "--seed", seed)

    def train(self, out: Path, start: str) -> list[str]:
        untuned = start == TINY
        arguments = {
            "model_name_or_path": out / TINY / "base" if untuned else out / start,
            "version": "v1",
            "vision_tower": out / TINY / "tower",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_select_layer": -2,
            "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False,
            # A tuned model has its own.
            **({"pretrain_mm_mlp_adapter": out / TINY / "mm_projector.bin"} if untuned else {}),
        }
        return module("vitask_plugin.llava.train", *flags(arguments))


class HfHost(DemoHost):
    """transformers' Trainer, on a LlavaForConditionalGeneration."""

    model = "vitask_hf"
    tuned = (
        "A tiny LlavaForConditionalGeneration, made from random numbers, tuned on {} with `python -m "
        "vitask_plugin.hf.train`"
    )
    title = "HF host: "
    packages = ("vitask-plugin", "lmms_eval", "transformers", "torch", "timm", "medmnist")
    record: ClassVar[dict[str, str]] = {"host": "hf"}

    def make_tiny(self, out: Path, task: str, seed: int) -> list[str]:
        own = {"family": "llava", "hidden-size": 128, "out": out / TINY, "task": task, "seed": seed}
        return module("vitask_plugin.hf.tiny", *flags(own))

    def train(self, out: Path, start: str) -> list[str]:
        return module("vitask_plugin.hf.train", "--model_name_or_path", out / start)


HOSTS: dict[str, DemoHost] = {"llava": LlavaHost(), "hf": HfHost()}


def flags(arguments: Mapping[str, object]) -> list[object]:
    """{name: value} as words of a command line."""
    return [word for name, value in arguments.items() for word in (f"--{name}", value)]
