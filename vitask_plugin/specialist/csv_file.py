"""Predictions as a table: image, label, probability_CLASS for each class, entropy, error, and the answer in words."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from vitask_plugin.errors import VITaskError
from vitask_plugin.files import atomic_path
from vitask_plugin.specialist.prediction import Prediction

_FIRST = ("image", "label")
_PROBABILITY = "probability_"


def header(classes: Sequence[str], *, answer: bool) -> list[str]:
    return [*_FIRST, *(f"{_PROBABILITY}{name}" for name in classes), "entropy", "error", *["answer"] * answer]


def check_own(path: Path) -> None:
    """Refuses a file in the place of the table that is none of these.

    Raises:
        VITaskError: naming it.
    """
    if not path.exists():
        return
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        found = next(csv.reader([file.readline()]), [])
    own = tuple(found[: len(_FIRST)]) == _FIRST and "".join(found[len(_FIRST) :][:1]).startswith(_PROBABILITY)
    if not own:  # somebody's table of images and labels may begin alike
        raise VITaskError(f"{str(path)!r} is there and no table of predictions; choose another --out")


def write(path: Path, classes: Sequence[str], predictions: Iterable[Prediction], *, answer: bool) -> None:
    """Atomically; numbers as they are, cells of an image that could not be read empty but for the error."""
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}  # a file's name may be no text
    with atomic_path(path) as temporary, open(temporary, "w", **how) as file:
        table = csv.writer(file)  # of its line ends alone a cell with a lone "\r" is quoted
        table.writerow(header(classes, answer=answer))
        for one in predictions:
            failed = one.error is not None
            figures = [""] * (len(classes) + 1) if failed else [*one.probabilities.values(), one.entropy]
            words = [one.answer or ""] * answer
            table.writerow([one.image, one.label or "", *figures, one.error or "", *words])
