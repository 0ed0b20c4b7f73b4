"""A small drawn data set, made on the spot from random numbers, and the sentences of a task: for demo and tests."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from vitask_plugin.data.instructions import DRAWN, LabelSet, instruction, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path, read_json

DRAWN_SIDE = 28
DRAWN_SIZES = {"train": 2400, "val": 240, "test": 480}
DRAWN_DEGREES = (90, 0, 45, 135)  # across the stripes of each class
DRAWN_NOISE = 0.4


def task_texts(labels: LabelSet) -> list[str]:
    """Every sentence of a task: both forms of its instruction, and its answers."""
    answers = [response(labels.choices, index) for index in range(len(labels.choices))]
    return [instruction(labels.modality, labels.choices), instruction(labels.modality, None), *answers]


def written_texts(path: str | Path) -> list[str]:
    """The same of a written data set, by its `labels.json`.

    Raises:
        VITaskError: no such file, or another one.
    """
    found = read_json(path, "label set")
    if not isinstance(found, dict) or not {"task", "choices", "modality", "type"} <= found.keys():
        raise VITaskError(f"{str(path)!r} is no label set; give the labels.json that `vitask data` wrote")
    task, choices = found["task"], tuple(found["choices"])
    labels = LabelSet(flag=task, task=task, modality=found["modality"], choices=choices, kind=found["type"])
    several = [instruction(labels.modality, choices, multi_label=True), response(choices, [])]
    return [*task_texts(labels), *(several if labels.multi_label else [])]


def all_texts(paths: Iterable[str | Path]) -> list[str]:
    """The sentences of several written data sets, each once, see `written_texts`."""
    return list(dict.fromkeys(text for path in paths for text in written_texts(path)))


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
