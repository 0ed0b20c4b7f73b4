"""What the cost benchmarks measure on: sizes, kinds of step, and samples, collated as in training.

Upstream's collator, and our data set, sampler and collator, on LLaVA JSON, a TSM's extracted features and an
instruction that are made by the project's own commands; the images are noise and the tokenizer is trained on the spot.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import send_to_device
from PIL import Image

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.contents import survey
from vitask_plugin.data.drawn import task_texts
from vitask_plugin.data.instructions import label_set, sample
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import write_json
from vitask_plugin.llava import compat
from vitask_plugin.llava.tiny import make_tiny_checkpoint, make_tiny_llava
from vitask_plugin.method.sampler import Contrasted, ContrastiveSampler
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.tsm.backbone import build_timm, pixel_statistics
from vitask_plugin.tsm.features import FeatureStore, extract
from vitask_plugin.tsm.model import TSM

compat.prepare()
from llava import conversation  # noqa: E402 (after the workarounds)
from llava.constants import IGNORE_INDEX  # noqa: E402
from llava.train.train import DataCollatorForSupervisedDataset  # noqa: E402

from vitask_plugin.llava.batch import VITaskCollator, VITaskDataset  # noqa: E402

transformers.utils.logging.disable_progress_bar()  # in every process of a measurement

LABELS = label_set("dermamnist")
COUNTS = (228, 359, 769, 80, 779, 4693, 99)  # its training images per label; two thirds have one
SAMPLES = 64  # in these proportions
EPOCHS = 64  # that the sampler is asked for, to know how often a negative is in the batch
PATCH_SIZE = 14  # pixels, as in LLaVA-1.5's tower
FILLER = " image"  # one token; lengthens a question
TEXTS = [*task_texts(LABELS), FILLER]  # what tokenizers are made from


@dataclass(frozen=True)
class Settings:
    """Sizes of the model and of the samples. Field names are the flags' names."""

    batch: int
    hidden: int
    layers: int
    vocabulary: int
    image_tokens: int
    continuation: int
    vision_hidden: int
    vision_layers: int
    lora: bool
    gradient_checkpointing: bool
    dtype: str
    device: str
    threads: int

    def __post_init__(self) -> None:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise VITaskError("--device is cuda, but torch finds no GPU; give --device cpu")
        if math.isqrt(self.image_tokens) ** 2 != self.image_tokens:
            raise VITaskError(f"--image-tokens is {self.image_tokens}; a square grid is needed, such as 576 or 2916")
        if self.hidden % self.head_width:
            raise VITaskError(f"--hidden is {self.hidden}; it must be a multiple of {self.head_width}, a head's width")

    @property
    def image_side(self) -> int:
        """Pixels."""
        return PATCH_SIZE * math.isqrt(self.image_tokens)

    @property
    def head_width(self) -> int:
        return 128 if self.hidden >= 1024 else 64

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward layer, in Llama-7B's proportion (11008 to 4096)."""
        return self.hidden * 43 // 16

    @property
    def lora_rank(self) -> int:
        """128 at 7B, as in LLaVA's own LoRA script, and in proportion below."""
        return max(4, self.hidden // 32)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of `Settings`; the defaults are LLaVA-1.5's geometry, with a decoder that fits the machine."""
    gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--batch", type=int, default=4, metavar="N", help="samples per step (default 4)")
    add("--hidden", type=int, default=4096 if gpu else 512, metavar="D", help="width of the decoder")
    add("--layers", type=int, default=32 if gpu else 6, metavar="N", help="layers of the decoder")
    add("--vocabulary", type=int, default=32000, metavar="V", help="rows of the output layer (default 32000)")
    add("--image-tokens", type=int, default=576, metavar="N", help="a square number (default 576 = 24 x 24)")
    add("--continuation", type=int, default=80, metavar="N", help="longest instruction + answer, tokens (default 80)")
    add("--vision-hidden", type=int, default=1024 if gpu else 64, metavar="D", help="width of the vision tower")
    add("--vision-layers", type=int, default=24 if gpu else 2, metavar="N", help="layers of the vision tower")
    add("--lora", action="store_true", help="LoRA on every linear layer of the decoder, as upstream's --lora_enable")
    add("--gradient-checkpointing", action="store_true", help="recompute each layer in the backward pass")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if gpu else "float32")
    add("--device", choices=("cpu", "cuda"), default="cuda" if gpu else "cpu")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch on the CPU")


def settings_of(args: argparse.Namespace) -> Settings:
    """The `Settings` among parsed flags."""
    return Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})


@dataclass(frozen=True)
class Variant:
    """One kind of training step.

    Attributes:
        words: for people.
        stage: of VITask; None for vanilla tuning.
        lean: vanilla tuning with logits at the answers only.
        engine: `vitask_engine`. attention: the decoder's `attn_implementation`.
    """

    words: str
    stage: int | None = None
    lean: bool = False
    engine: str = "packed"
    attention: str = "sdpa"


VARIANTS = {
    "vanilla": Variant("upstream's vanilla step"),
    "lean_vanilla": Variant("vanilla, logits at answers only", lean=True),
    "stage1_packed": Variant("VITask stage 1, packed", 1),
    "stage2_packed": Variant("VITask stage 2, packed", 2),
    "stage2_branches": Variant("VITask stage 2, branch by branch", 2, engine="branches"),
}
if torch.cuda.is_available():  # FlexAttention has no backward pass on a CPU
    VARIANTS["stage1_packed_flex"] = Variant("stage 1, packed, FlexAttention", 1, attention="flex_attention")
    VARIANTS["stage2_packed_flex"] = Variant("stage 2, packed, FlexAttention", 2, attention="flex_attention")


# Data ----------------------------------------------------------------------------------------------------------------


@dataclass
class Workload:
    """Files that every process of a measurement opens: made once by `make_workload`."""

    directory: Path
    settings: Settings

    def arguments(self, variant: "Variant") -> VITaskArguments:
        features = str(self.directory / "features")
        return VITaskArguments(
            vitask=True, vitask_stage=variant.stage, vitask_features=features, vitask_engine=variant.engine
        )

    def tokenizer(self) -> Any:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            self.directory / "tiny-llava", use_fast=False, model_max_length=self.longest
        )
        tokenizer.pad_token = tokenizer.unk_token  # as upstream's train()
        return tokenizer

    @property
    def longest(self) -> int:
        """--model_max_length: nothing is cut."""
        return self.settings.image_tokens + self.settings.continuation + 100


def make_small_checkpoint(directory: Path, settings: Settings, texts: list[str]) -> Path:
    """A tiny LLaVA with the tower of `settings`, for its configuration and tokenizer: the weights of a benchmark are
    made in its own size.

    Args:
        texts: what the tokenizer is made from.
    """
    parts = make_tiny_llava(
        directory / "parts",
        texts=texts,
        seed=0,
        hidden_size=32,
        layers=1,
        image_size=settings.image_side,
        patch_size=PATCH_SIZE,
        vision_hidden_size=settings.vision_hidden,
        vision_layers=settings.vision_layers,
    )
    target = directory / "tiny-llava"
    make_tiny_checkpoint(target, texts=texts, seed=0, tower=parts.tower, hidden_size=32, layers=1)
    return target


def make_workload(settings: Settings, directory: Path, *, balanced: bool = False) -> Workload:
    """Writes a tokenizer, a vision tower, images of noise, LLaVA JSON, a TSM and its features.

    All samples ask one question, lengthened until the longest instruction and answer have `settings.continuation`
    tokens.

    Args:
        balanced: answers go round the label set; else they are as frequent as in `COUNTS`.
    """
    workload = Workload(directory, settings)
    make_small_checkpoint(directory, settings, TEXTS)
    made = unlengthened(balanced=balanced)
    tokenizer = workload.tokenizer()

    def text_tokens(one: dict[str, Any]) -> int:
        human, gpt = one["conversations"]
        text = f"{human['value'].removeprefix(IMAGE_TOKEN)} ASSISTANT: {gpt['value']}</s>"
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    write_data(directory, lengthened(made, text_tokens, settings.continuation), settings.image_side)
    return workload


def write_data(directory: Path, samples: list[dict[str, Any]], side: int) -> None:
    """LLaVA JSON, images of noise with `side` pixels, a TSM and its features."""
    write_json(directory / "train.json", samples)
    generator = np.random.default_rng(0)
    (directory / "images").mkdir()
    for number in range(len(samples)):
        pixels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(directory / "images" / f"{number}.png")
    torch.manual_seed(0)
    network = build_timm("test_vit", len(LABELS.choices), {})
    mean, std = pixel_statistics(network)
    tasks = {LABELS.task: {"choices": list(LABELS.choices), "multi_label": False}}
    record = {"source": {"timm": "test_vit"}, "image_size": 160, "mean": mean, "std": std, "tasks": tasks}
    TSM(network, record).save(directory / "tsm")
    extract(directory / "tsm", [directory / "train.json"], directory / "images", directory / "features")


def _proportional(samples: int) -> list[int]:
    """Labels in the proportions of `COUNTS`, each at least once, the commonest filling up."""
    counts = [max(1, round(samples * count / sum(COUNTS))) for count in COUNTS]
    counts[COUNTS.index(max(COUNTS))] += samples - sum(counts)
    return [label for label, count in enumerate(counts) for _ in range(count)]


def unlengthened(*, balanced: bool) -> list[dict[str, Any]]:
    """Samples of one question in LLaVA's JSON. `balanced`: see `make_workload`."""
    samples = 2 * len(COUNTS) if balanced else SAMPLES
    labels = [number % len(COUNTS) for number in range(samples)] if balanced else _proportional(samples)
    return [
        sample(
            identifier=str(number),
            image=f"{number}.png",
            modality=LABELS.modality,
            task=LABELS.task,
            choices=LABELS.choices,
            label=label,
        )
        for number, label in enumerate(labels)
    ]


def lengthened(
    samples: list[dict[str, Any]], text_tokens: Callable[[dict[str, Any]], int], continuation: int
) -> list[dict[str, Any]]:
    """The samples with a question so long that the longest question and answer have `continuation` tokens.

    Args:
        text_tokens: those of a sample's question and answer.
    """
    longest = max(map(text_tokens, samples))
    if longest > continuation:
        raise VITaskError(
            f"--continuation is {continuation}, but the question of {LABELS.task} alone needs {longest} tokens; give "
            "at least as many"
        )
    for each in samples:
        each["conversations"][0]["value"] += FILLER * (continuation - longest)
    return samples


class Batches:
    """Batches as training draws them, collated by upstream's collator and by ours.

    A negative that is not in its batch is one more image, so batches are not alike. Of all that the sampler gives in
    `EPOCHS` epochs, those measured are evenly spread from the ones without such an image to the ones with most, so that
    a mean over them is a mean over an epoch.

    Args:
        rounds: how many batches are wanted.

    Attributes:
        order: what the sampler asks for in the first epoch.
        negatives: {"in_batch": share of the negatives, "extra_images": of a sample}, over all epochs.
    """

    def __init__(self, workload: Workload, rounds: int = 1) -> None:
        settings = workload.settings
        self.workload = workload
        self.dataset = self.make_dataset()
        features = FeatureStore.open(workload.directory / "features")
        contents = survey(self.dataset.image_folder, self.dataset.images(), self.dataset.task_images())
        flags = workload.arguments(VARIANTS["stage2_packed"])
        self.exemplars = Exemplars(flags, self.dataset, contents, features)
        self._items = [self.dataset[index] for index in range(len(self.dataset))]
        drawn = self._drawn(settings.batch)
        self.order = [*chain.from_iterable(drawn)][: len(self.dataset)]
        extra = [len(_extra(batch)) for batch in drawn]
        outside = sum(item.negative in _extra(batch) for batch in drawn for item in batch)
        samples = len(drawn) * settings.batch
        self.negatives = {"in_batch": 1 - outside / samples, "extra_images": sum(extra) / samples}
        ranked = sorted(range(len(drawn)), key=extra.__getitem__)
        self._chosen = [drawn[ranked[(2 * number + 1) * len(drawn) // (2 * rounds)]] for number in range(rounds)]

    def make_dataset(self) -> Any:
        """The samples as the host makes tokens of them."""
        conversation.default_conversation = conversation.conv_templates["v1"]
        workload = self.workload
        folder = SimpleNamespace(
            image_folder=str(workload.directory / "images"),
            image_processor=transformers.CLIPImageProcessor.from_pretrained(workload.directory / "parts" / "tower"),
            image_aspect_ratio="square",
            is_multimodal=True,
            mm_use_im_start_end=False,
        )
        return VITaskDataset(
            str(workload.directory / "train.json"),
            workload.tokenizer(),
            folder,
            vitask=workload.arguments(VARIANTS["stage2_packed"]),
        )

    def collator(self, variant: Variant) -> Any:
        """As the host's training has it for a variant."""
        tokenizer = self.dataset.tokenizer
        if variant.stage is None:
            return DataCollatorForSupervisedDataset(tokenizer=tokenizer)
        image_tokens = self.workload.settings.image_tokens
        return VITaskCollator(self.dataset, self.exemplars, self.workload.arguments(variant), image_tokens=image_tokens)

    def _drawn(self, size: int) -> list[list[Contrasted]]:
        sampler = ContrastiveSampler(self.dataset.negatives, size, seed=0)
        drawn = []
        for epoch in range(EPOCHS):
            sampler.set_epoch(epoch)
            order = list(sampler)
            drawn += [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        return drawn

    def __call__(self, variant: Variant, number: int) -> tuple[dict[str, Any], float]:
        """Batch `number` (they repeat; the last has most images) as a variant takes it, and its collation's seconds.

        In training a worker process collates, beside the step.
        """
        settings = self.workload.settings
        chosen = self._chosen[number % len(self._chosen)]
        instances = [{**self._items[item.index], "negative": item.negative} for item in chosen]
        collate = self.collator(variant)
        start = time.perf_counter()
        batch = collate(instances)
        seconds = time.perf_counter() - start
        if variant.stage is not None:
            batch["vitask"]["denominator"] = (batch["labels"] != IGNORE_INDEX).sum()
        return send_to_device(batch, settings.device), seconds

    def geometry(self) -> dict[str, Any]:
        """Tokens of the samples as upstream's preprocessing gives them, the image token apart."""
        prefixes, continuations, answers = set(), [], []
        for item in self._items:
            prefix, continuation = self.lengths(item)
            prefixes.add(prefix)
            continuations.append(continuation)
            answers.append(int((item["labels"] != IGNORE_INDEX).sum()))
        return {
            "prefix_text": max(prefixes),
            "continuation": [min(continuations), max(continuations)],
            "answer": [min(answers), max(answers)],
        }

    def lengths(self, item: dict[str, Any]) -> tuple[int, int]:
        """Tokens of a sample's prefix without its image, and behind it."""
        image = int((item["input_ids"] < 0).nonzero()[-1])
        return image, len(item["input_ids"]) - image - 1


def _extra(batch: list[Contrasted]) -> set[int]:
    """The negatives that a batch does not hold."""
    return {item.negative for item in batch} - {item.index for item in batch}
