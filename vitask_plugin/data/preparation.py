"""What the images of a task were: how large, and what `vitask data folder` did to their pixels.

Training keeps it in vitask.json and tsm.json.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.data.comparison import ANYWAY, Seen
from vitask_plugin.data.difference import Images, difference, flags_for
from vitask_plugin.data.images import say_once
from vitask_plugin.data.label_file import LABELS_FILE, sets_in
from vitask_plugin.data.labels_format import PREPARED
from vitask_plugin.data.sizes import Sizes, sizes_of
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.json_text import read_json

SCALING = "lanczos"  # what `pixels.Pixels` scales down with


def recorded(labels: Mapping[str, Any], path: str | Path) -> dict[str, Any] | None:
    """What a label set says was done to the pixels of its images; None = nothing, as one of version 0.1.

    Args:
        labels: content of the label set `path`.

    Raises:
        VITaskError: it says what no data set was written with.
    """
    if "pixels" not in labels:
        return None
    PREPARED.check(labels, f"label set {str(path)!r}")
    pixels = labels["pixels"]
    found = {name: pixels[name] for name in ("window", "of_8_bits", "frame", "max_side") if name in pixels}
    return {**found, "resampling": SCALING} if "max_side" in found else found


def _labels_beside(data: str | Path) -> tuple[Path, dict[str, dict[str, Any]]]:
    """The path of the label set beside a data file, and what it holds by task; of several sets with one task any, for
    their images were prepared alike (`merge`)."""
    path = Path(data).parent / LABELS_FILE
    labels = read_json(path, "label set beside the data file,") if path.is_file() else None
    found = sets_in(labels).values() or [labels]
    # Anybody may call a file so: without a task it is none of ours.
    return path, {one["task"]: one for one in found if _has_task(one)}


def _has_task(labels: Any) -> bool:
    return isinstance(labels, dict) and "choices" in labels and isinstance(labels.get("task"), str)


def prepared(sizes: Mapping[str | Path, Sizes], *, several: bool = False) -> Images:
    """The sizes of the tasks' images, and what the label sets beside the data files say was done to them.

    Args:
        sizes: {LLaVA JSON file that names the images: their sizes}.
        several: let files that say different things of one task pass; then nothing is known of its pixels.

    Raises:
        VITaskError: the images of one task differ between two files, or a label set is damaged.
    """
    images: Images = {}
    first: dict[str, str | Path] = {}
    for path, entries in sizes.items():
        file, beside = _labels_beside(path)
        for task, entry in entries.items():
            pixels = recorded(beside[task], file) if task in beside else None
            own = entry if pixels is None else {**entry, "pixels": pixels}
            if task not in images:
                first[task], images[task] = path, dict(own)
                continue
            found = difference(images[task], own)
            if found and not several:
                raise VITaskError(
                    f"task {task!r} has {found.trained} in {str(first[task])!r}, and those of {str(path)!r} "
                    f"{found.used}; {found.remedy}, or {ANYWAY}"
                )
            if not several:
                _say_half_known(task, (images[task], first[task]), (own, path))
            images[task] = _together(images[task], own, alike=found is None)
    return images


def _say_half_known(task: str, *both: tuple[Mapping[str, Any], str | Path]) -> None:
    known = [(entry["pixels"], path) for entry, path in both if "pixels" in entry]
    unknown = [path for entry, path in both if "pixels" not in entry]
    if unknown and known and known[0][0]:
        pixels, path = known[0]
        line = f"the images of task {task!r} in {str(path)!r} were written with {flags_for(pixels)}; no {LABELS_FILE} "
        line += f"tells how those in {str(unknown[0])!r} were, so the two are not compared, and "
        line += "nothing of it is recorded"
        say_once(line, line)


def _together(one: Mapping[str, Any], other: Mapping[str, Any], *, alike: bool) -> dict[str, Any]:
    """The record of both; of their pixels, if they are known to be alike."""
    both: dict[str, Any] = {"images": one["images"] + other["images"]}
    for side in ("width", "height"):
        both[side] = [min(one[side][0], other[side][0]), max(one[side][1], other[side][1])]
    known = alike and "pixels" in one and "pixels" in other
    return both | {"pixels": {**other["pixels"], **one["pixels"]}} if known else both


def seen_in(samples: Sequence[Mapping[str, Any]], folder: str | Path, data: str | Path) -> Seen:
    """The images of the samples with a `vitask` block that the file `data` holds."""
    tasks = {sample["vitask"]["task"]: sample["vitask"]["choices"] for sample in samples if "vitask" in sample}
    return Seen(repr(str(data)), prepared({data: sizes_of(samples, folder)}), tasks)


def window_of(place: str | Path) -> tuple[Window, bool]:
    """The window that a data set was written with, and whether 8-bit pictures went through it too.

    Args:
        place: its folder, or its labels.json.

    Raises:
        VITaskError: there is no label set, or no window in it.
    """
    path = Path(place)
    path = path / LABELS_FILE if path.is_dir() else path
    labels = read_json(path, "--window-from's label set")
    if not isinstance(labels, dict) or "task" not in labels:
        raise VITaskError(f"--window-from {str(path)!r} is no label set; give the labels.json of `vitask data folder`")
    pixels = recorded(labels, path)
    if not pixels or "window" not in pixels:
        why = "does not say how it was written" if pixels is None else "is 8-bit as it was"
        raise VITaskError(f"--window-from {str(path)!r} records no window: that set {why}; give --window LOW HIGH")
    return Window(*pixels["window"]), pixels.get("of_8_bits", False)
