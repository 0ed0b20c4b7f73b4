"""Folders of drawn PNGs, and `vitask run` on them in a process of its own, as a user would start it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vitask_plugin.data.drawn import DRAWN_DEGREES, _draw

CLASSES = ("across", "down", "rising", "falling")


def draw_folder(folder: Path, images: int, classes: int = 4, seed: int = 0) -> Path:
    """`folder`/CLASS/NNN.png with stripes, as in the drawn set; all labels are right."""
    for number, name in enumerate(CLASSES[:classes]):
        (folder / name).mkdir(parents=True)
        generator = np.random.default_rng([seed, number])
        for index in range(images):
            Image.fromarray(_draw(generator, DRAWN_DEGREES[number])).save(folder / name / f"{index:03d}.png")
    return folder


def start(*words: object) -> subprocess.Popen:
    """`vitask run WORDS`; what it prints comes by `communicate`."""
    command = [Path(sys.executable).parent / "vitask", "run", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "COLUMNS": "400"}
    )


def finished(*words: object, timeout: float = 900) -> str:
    """What a run printed that ended well."""
    process = start(*words)
    printed, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, printed[-6000:]
    return printed
