"""A small drawn data set, made on the spot from random numbers, and the sentences of a task: for demo and tests."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vitask_plugin.data.dataset import label_set_in
from vitask_plugin.data.instructions import DRAWN, LabelSet, answers_of, instruction, label_set
from vitask_plugin.files import atomic_path

DRAWN_SIDE = 28
DRAWN_SIZES = {"train": 2400, "val": 240, "test": 480}
DRAWN_DEGREES = (90, 0, 45, 135)  # across the stripes of each class
DRAWN_NOISE = 0.4


def add_task(parser: argparse.ArgumentParser) -> None:
    """`--task` and `--data`: whose words go into a tokenizer that is made on the spot."""
    tasks = parser.add_mutually_exclusive_group()
    tasks.add_argument("--task", default=DRAWN.task, metavar="NAME", help="its words go into the tokenizer")
    own = "the same of one's own labels: folders that `vitask data` wrote, with a labels.json"
    tasks.add_argument("--data", nargs="+", metavar="DIR", help=own)


def texts_of(args: argparse.Namespace) -> list[str]:
    """Every sentence of the tasks that `add_task`'s options name.

    Raises:
        VITaskError: an unknown task, or a folder without a label set.
    """
    known = [label_set_in(folder) for folder in args.data] if args.data else [label_set(args.task)]
    return [text for labels in known for text in task_texts(labels)]


def task_texts(labels: LabelSet) -> list[str]:
    """Every sentence of a task: both forms of its instruction, and its answers."""
    several = labels.multi_label
    question = instruction(labels.modality, labels.choices, multi_label=several)
    return [question, instruction(labels.modality, None), *answers_of(labels.choices, multi_label=several)]


def draw_dataset(path: str | Path, *, seed: int, sizes: Mapping[str, int] | None = None) -> Path:
    """Writes `path`, a file of medmnist's layout, with images of stripes in four directions.

    `{train,val,test}_images` are uint8 [N, 28, 28, 3], `{train,val,test}_labels` uint8 [N, 1]. The class is the
    direction alone: 0 horizontal, 1 vertical, 2 rising, 3 falling, each as often as the size allows. Width, phase,
    colours, contrast and noise are drawn anew for each image. With a random phase a pixel has the same distribution in
    all four classes, so nothing linear in the pixels tells them apart: a convolution network finds the direction
    within a minute, the tokens of a frozen random vision tower show it poorly.

    As with labels that people give, some are wrong: in train each label is replaced by a random one with probability
    `DRAWN_NOISE` (it may be the right one again). Those of val and test are all right, as if they had been checked.

    Args:
        sizes: images per split; None = `DRAWN_SIZES`.
    """
    path = Path(path)
    sizes = DRAWN_SIZES if sizes is None else sizes
    arrays = {}
    for number, split in enumerate(("train", "val", "test")):
        # A stream of its own for each split: the size of one does not change the images of another.
        generator = np.random.default_rng([seed, number])
        classes = generator.permutation(np.arange(sizes[split]) % len(DRAWN.choices))
        arrays[f"{split}_images"] = np.stack([_draw(generator, DRAWN_DEGREES[index]) for index in classes])
        if split == "train":
            wrong = generator.random(len(classes)) < DRAWN_NOISE
            classes = np.where(wrong, generator.integers(len(DRAWN.choices), size=len(classes)), classes)
        arrays[f"{split}_labels"] = classes.astype(np.uint8)[:, None]
    with atomic_path(path) as temporary:
        np.savez_compressed(temporary, **arrays)
    return path


def _draw(generator: np.random.Generator, degrees: float) -> np.ndarray:
    """One image [28, 28, 3] uint8 whose colour changes towards `degrees` (0 = to the right, 90 = down)."""
    angle = np.deg2rad(degrees + generator.normal(0, 6))
    rows, columns = np.mgrid[:DRAWN_SIDE, :DRAWN_SIDE] / DRAWN_SIDE
    cycles, phase = generator.uniform(3, 7), generator.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * cycles * (np.cos(angle) * columns + np.sin(angle) * rows) + phase)
    background = generator.uniform(0.25, 0.75, 3)
    colour = generator.normal(size=3)
    colour *= generator.uniform(0.15, 0.5) / np.linalg.norm(colour)
    image = background + wave[..., None] * colour + generator.normal(0, 0.15, (DRAWN_SIDE, DRAWN_SIDE, 3))
    return (image.clip(0, 1) * 255).astype(np.uint8)
