"""A look at the images of a training file before the first step: all that cannot be read are named at once, and sets
in which there is nothing to see.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vitask_plugin.data.images import decode, read_bytes, truncated_refused
from vitask_plugin.data.levels import check_levels
from vitask_plugin.data.sizes import spread
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside

SAMPLE = 256  # images looked at by `sample`
NAMED = 5  # broken ones in the sentence
_THREADS = 4


def read_image(sample: Mapping[str, Any], folder: str | Path) -> Any:
    """The RGB picture of a sample.

    Raises:
        VITaskError: naming sample and file.
    """
    try:
        path = inside(folder, sample["image"])
        return decode(read_bytes(path), path)
    except VITaskError as error:
        raise VITaskError(f"sample {sample.get('id')!r}: {error}") from None


def check_images(
    samples: Sequence[Mapping[str, Any]], folder: str | Path, which: str = "sample", part: tuple[int, int] = (0, 1)
) -> None:
    """Reads images to the last pixel, whatever kind of sample names them, each file once.

    Args:
        which: none, sample (`SAMPLE` of them, evenly spread over the file) or all.
        part: (number, of how many) of the processes that share the work; the first also looks at the grey levels of
            each task.

    Raises:
        VITaskError: naming samples and files of those that cannot be read, or a task whose images are of one colour.
    """
    first: dict[str, Mapping[str, Any]] = {}
    for sample in samples:
        if "image" in sample:
            first.setdefault(sample["image"], sample)
    named = list(first.values())
    wanted = {"none": 0, "sample": SAMPLE, "all": len(named)}[which]
    chosen = [named[index] for index in spread(len(named), wanted)][part[0] :: part[1]]
    with truncated_refused(), ThreadPoolExecutor(_THREADS) as pool:
        looks = pool.map(lambda sample: _fault(sample, folder), chosen)
        found = list(tqdm(looks, "Images looked at", total=len(chosen), delay=5))
    broken = [(sample, fault) for sample, fault in zip(chosen, found, strict=True) if fault]
    if broken:
        raise VITaskError(_sentence(broken, len(chosen)))
    if which != "none" and part[0] == 0:
        _check_levels(named, folder)


def _check_levels(samples: Sequence[Mapping[str, Any]], folder: str | Path) -> None:
    by_task: dict[str | None, dict[str, Mapping[str, Any]]] = {}
    for sample in samples:
        by_task.setdefault(sample.get("vitask", {}).get("task"), {})[sample["image"]] = sample
    with truncated_refused():
        for task, own in by_task.items():
            # Samples of no task may share an empty picture because they are text.
            where = "samples of no task" if task is None else f"task {task!r}"
            check_levels(list(own), partial(_read, own, folder), where, refuse=task is not None)


def _read(samples: Mapping[str, Mapping[str, Any]], folder: str | Path, image: str | Path) -> Any:
    return read_image(samples[image], folder)


def _fault(sample: Mapping[str, Any], folder: str | Path) -> str | None:
    try:
        read_image(sample, folder)
    except VITaskError as error:
        return str(error)
    return None


def _sentence(broken: Sequence[tuple[Mapping[str, Any], str]], looked_at: int) -> str:
    if len(broken) == 1:
        return broken[0][1]
    names = [f"sample {sample.get('id')!r} ({sample['image']!r})" for sample, _ in broken[1:NAMED]]
    more = f" and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{broken[0][1]}; {len(broken)} of {looked_at} images looked at are like it: also {', '.join(names)}{more}"
