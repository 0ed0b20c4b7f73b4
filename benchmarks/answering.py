"""A checkpoint with random weights, lmms-eval's stock `llava` on the same weights, and requests as of the harness.

What `score_cost.py` and `generate_cost.py` measure with. Only weights, images and the tokenizer are made on the spot.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import transformers
from measuring import CLOCKS, turns, wait
from PIL import Image
from steps import model_config
from workload import FILLER, Settings, Workload, make_small_checkpoint

from vitask_plugin.data.drawn import task_texts
from vitask_plugin.data.instructions import label_set
from vitask_plugin.evaluation.lmms_llava import VITaskLlava
from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

# After the workarounds that come with `steps`.
from lmms_eval.api.instance import Instance  # isort: skip
from lmms_eval.models.simple.llava import Llava  # isort: skip

# By number of labels. The 14 of chest X-rays are scored one by one here, though an image can have several.
LABEL_SETS = {2: "breastmnist", 8: "tissuemnist", 11: "organamnist", 14: "chestmnist"}

# What is timed, and how many answers it gives.
Run = tuple[Callable[[], Any], int]


class StockLlava(Llava):
    """lmms-eval's `llava` around weights that are loaded already: its own loading wants a CUDA device and float16."""

    def __init__(self, ours: VITaskLlava) -> None:
        super(Llava, self).__init__()
        self._model, self._tokenizer, self._image_processor = ours.model, ours.tokenizer, ours.image_processor
        self._config, self._device, self.task_dict = ours.model.config, ours.device, ours.task_dict
        self.conv_template, self.batch_size_per_gpu, self.use_cache = "vicuna_v1", ours.batch_size, True
        self._rank = 1  # no progress bar
        # It hands on float16 pixels whatever the dtype of the model.
        ours.model.get_vision_tower().register_forward_pre_hook(lambda _, images: images[0].to(ours.model.dtype))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes, as far as answering depends on them; the defaults are LLaVA-1.5's geometry with a small decoder."""
    add = parser.add_argument
    add("--batch", type=int, default=4, metavar="N", help="images at a time (default 4)")
    add("--instruction", type=int, default=75, metavar="N", help="tokens after the image, at least (default 75)")
    add("--image-tokens", type=int, default=576, metavar="N", help="a square number (default 576 = 24 x 24)")
    add("--hidden", type=int, default=512, metavar="D", help="width of the decoder (default 512)")
    add("--layers", type=int, default=6, metavar="N", help="layers of the decoder (default 6)")
    add("--vocabulary", type=int, default=32000, metavar="V", help="rows of the output layer (default 32000)")
    add("--vision-hidden", type=int, default=64, metavar="D", help="width of the vision tower (default 64)")
    add("--vision-layers", type=int, default=2, metavar="N", help="layers of the vision tower (default 2)")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=torch.get_num_threads(), metavar="N", help="of torch on the CPU")
    add("--repeats", type=int, default=5, metavar="N", help="measured rounds (default 5)")
    add("--json", type=Path, metavar="FILE", help="append the result as one line")


@contextmanager
def models(args: argparse.Namespace, batch_size: int) -> Iterator[tuple[VITaskLlava, StockLlava]]:
    """Ours and the stock one, on one checkpoint that lives as long as they do."""
    torch.set_num_threads(args.threads)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="vitask-answering-") as directory:
        checkpoint = _make_checkpoint(args, Path(directory))
        ours = VITaskLlava(str(checkpoint), dtype=args.dtype, device=args.device, batch_size=batch_size)
        ours._rank = 1  # no progress bars
        yield ours, StockLlava(ours)


def _make_checkpoint(args: argparse.Namespace, directory: Path) -> Path:
    settings = Settings(
        **{name: getattr(args, name) for name in ("batch", "hidden", "layers", "vocabulary", "image_tokens")},
        **{name: getattr(args, name) for name in ("vision_hidden", "vision_layers", "dtype", "device", "threads")},
        continuation=max(args.instruction, 300),  # room for the longest instruction, of chest X-rays
        lora=False,
        gradient_checkpointing=False,
    )
    texts = [FILLER, *(text for name in LABEL_SETS.values() for text in task_texts(label_set(name)))]
    small = make_small_checkpoint(directory, settings, texts)
    torch.manual_seed(0)
    target = directory / "llava"
    VITaskLlavaLlamaForCausalLM(model_config(Workload(directory, settings))).save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(small, use_fast=False).save_pretrained(target)
    return target


# Requests ------------------------------------------------------------------------------------------------------------


class _Documents(list):
    """Documents of a task without a `vitask` block."""

    column_names = ()


def show_images(ours: VITaskLlava, task: str, count: int) -> None:
    """Makes a task known whose documents are `count` images of noise, always the same."""
    generator = np.random.default_rng(0)
    side = ours.image_processor.crop_size["height"]
    images = [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    ours.task_dict[task] = {"test": _Documents(SimpleNamespace(image=image) for image in images)}


def request(kind: str, task: str, question: str, third: Any, number: int, index: int = 0) -> Instance:
    """A request of the harness about image `number`; `third` is the answer to score, or how to generate."""
    return Instance(
        request_type=kind,
        # A copy, as a data set decodes an image anew each time.
        arguments=(question, third, lambda document: [document.image.copy()], number, task, "test"),
        idx=index,
        metadata={"task": task, "doc_id": number, "repeats": 1},
    )


def lengthened(ours: VITaskLlava, asked: Instance, length: int) -> str:
    """The request's question with words added until `length` tokens follow its image, if there are fewer."""
    missing = length - after_image(ours.asker.prompt_ids(ours._query(asked)))
    return asked.args[0] + FILLER * max(0, missing)


def after_image(ids: Sequence[int]) -> int:
    """Tokens of a prompt after its image."""
    return len(ids) - 1 - max(index for index, token in enumerate(ids) if token < 0)


# Time ----------------------------------------------------------------------------------------------------------------


def measure_time(
    runs: Mapping[str, Run], repeats: int, device: str, clock: Callable[[], float] = CLOCKS["wall"]
) -> dict[str, list[float]]:
    """Seconds per answer, by run and round; the runs take turns, after a round of warm-up, in an order that rotates."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number, name in turns(runs, repeats):
        run, answers = runs[name]
        start = clock()
        run()
        wait(device)
        if number >= 0:
            seconds[name].append((clock() - start) / answers)
    return seconds
