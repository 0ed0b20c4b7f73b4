"""Fixtures of the HF host: one tiny model of each family per session, and samples with images of several sizes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image

from vitask_plugin.data.instructions import DRAWN, sample
from vitask_plugin.hf.conversation import Template
from vitask_plugin.hf.tiny import FAMILIES, OTHERS, make_tiny
from vitask_plugin.hf.tiny_families import TABLE

INSTALLED = tuple(family for family in (*FAMILIES, *OTHERS) if TABLE[family].model_type in transformers.CONFIG_MAPPING)
SIZES = ((28, 28), (56, 28), (28, 56), (28, 28))  # widths and heights of the task samples' images


@dataclass(frozen=True)
class Tiny:
    """A tiny model's folder, and what says how it is asked. Read only."""

    family: str
    folder: Path
    config: Any
    template: Template

    @property
    def processor(self) -> Any:
        return self.template.processor

    def model(self) -> Any:
        """The stock class with a VITask step, in eval mode; made anew in each call."""
        from vitask_plugin.hf.model import with_vitask

        return with_vitask(self.config).from_pretrained(self.folder).eval()


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory, drawn_texts: list[str]) -> Callable[[str], Tiny]:
    """A family to its tiny model."""
    root = tmp_path_factory.mktemp("tiny-hf")

    @cache
    def of(family: str) -> Tiny:
        if family not in INSTALLED:
            pytest.skip(f"the installed transformers has no {family}")
        folder = make_tiny(root / family, family=family, texts=drawn_texts, seed=0)
        config = transformers.AutoConfig.from_pretrained(folder)
        processor = transformers.AutoProcessor.from_pretrained(folder)
        return Tiny(family, folder, config, Template(processor, config.image_token_id, str(folder)))

    return of


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def turns(*words: str) -> list[dict[str, str]]:
    """Question, answer, question, ... as LLaVA's conversations."""
    return [{"from": ("human", "gpt")[number % 2], "value": value} for number, value in enumerate(words)]


@pytest.fixture(scope="session")
def sized_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`train.json` + `images/`: 4 task samples (images of `SIZES`), then text alone, a general image, and one whose
    image comes behind an answer. Read only."""
    directory = tmp_path_factory.mktemp("sized")
    (directory / "images").mkdir()
    samples = []
    for number, size in enumerate(SIZES):
        picture(*size, seed=number).save(directory / "images" / f"{number}.png")
        samples.append(
            sample(
                identifier=str(number),
                image=f"{number}.png",
                label=number % len(DRAWN.choices),
                modality=DRAWN.modality,
                task=DRAWN.task,
                choices=list(DRAWN.choices),
            )
        )
    samples.append({"id": "text", "conversations": turns("Analyze the weather.", "It is mild.")})
    general = turns("<image>\nWhat is this?", "A texture.", "Sure?", "Yes.")
    samples.append({"id": "general", "image": "1.png", "conversations": general})
    late = turns("Hello.", "An answer before the image.", "<image>\nWhat is this?", "Stripes.")
    samples.append({"id": "late", "image": "2.png", "conversations": late})
    (directory / "train.json").write_text(json.dumps(samples))
    return directory
