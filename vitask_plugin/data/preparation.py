"""What the images of a task were: how large, and what `vitask data folder` did to their pixels.

Training keeps it in vitask.json and tsm.json, and images that are used later are compared with it: through another
window, or scaled down in another way, a model sees other pictures than it has learnt from, and nothing else tells.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from vitask_plugin.data.dataset import LABELS_FILE
from vitask_plugin.data.images import say_once
from vitask_plugin.data.names import look
from vitask_plugin.data.sizes import Sizes, sizes_of
from vitask_plugin.data.window import Window
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import read_json

SCALING = "lanczos"  # what `pixels.Pixels` scales down with
# {task: the entry of `sizes.Sizes`, and where it is known "pixels"}: {"window": [low, high], "frame": n, "max_side": n,
# "resampling": name}, each where it was used; {} = nothing was done, the images are 8-bit as they were.
Images = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Seen:
    """The images that somebody was trained on, or those of some data.

    Attributes:
        who: opens the sentence ("TSM 1234 was trained"), or names the data.
        images: by task; None = nobody has kept it.
        tasks: {task: its labels}.
    """

    who: str
    images: Images | None
    tasks: Mapping[str, Sequence[str]] = field(default_factory=dict)


class _Difference(NamedTuple):
    """`trained`, `used`: the two sides in words. remedy: what makes them one. size: in training, if it is that."""

    trained: str
    used: str
    remedy: str
    size: tuple[int, int] | None = None


# What is recorded ----------------------------------------------------------------------------------------------


def recorded(labels: Mapping[str, Any], path: str | Path) -> dict[str, Any]:
    """What a label set says was done to the pixels of its images.

    Args:
        labels: content of the label set `path`.

    Raises:
        VITaskError: it says what no data set was written with.
    """
    pixels = labels.get("pixels", {})
    try:
        found = {name: pixels[name] for name in ("window", "frame", "max_side") if name in pixels}
        if "window" in found:
            Window(*map(float, found["window"]))
        whole = all(type(found.get(name, 0)) is int for name in ("frame", "max_side"))
    except (TypeError, ValueError, VITaskError):
        whole = False
    if not whole or not isinstance(pixels, dict):
        raise VITaskError(
            f"label set {str(path)!r} has the 'pixels' {pixels!r}; expected a window [low, high], a frame or a "
            "max_side, so write the data set again with `vitask data folder`"
        )
    return {**found, "resampling": SCALING} if "max_side" in found else found


def _labels_beside(data: str | Path) -> tuple[Path, dict[str, Any]] | None:
    path = Path(data).parent / LABELS_FILE
    labels = read_json(path, "label set beside the data file,") if path.is_file() else None
    # Anybody may call a file so: without a task it is none of ours.
    return (path, labels) if isinstance(labels, dict) and {"task", "choices"} <= labels.keys() else None


def prepared(sizes: Sizes, data: Sequence[str | Path], *, several: bool = False) -> Images:
    """The sizes of the tasks' images, and what the label sets beside the data files say was done to them.

    Args:
        data: the LLaVA JSON files that name the images.
        several: let files that say different things of one task pass; then nothing is known of it.

    Raises:
        VITaskError: two files say different things of one task, or a label set is damaged.
    """
    images: Images = {task: dict(entry) for task, entry in sizes.items()}
    told: dict[str, str | Path] = {}
    for path in data:
        beside = _labels_beside(path)
        if beside is None or (task := beside[1]["task"]) not in images:
            continue
        own = {**sizes[task], "pixels": recorded(beside[1], beside[0])}
        if task not in told:
            told[task], images[task] = path, own
        elif "pixels" in images[task] and (found := _difference(images[task], own)):
            if not several:
                raise VITaskError(
                    f"task {task!r} has {found.trained} in {str(told[task])!r}, and those of {str(path)!r} "
                    f"{found.used}; {found.remedy}, or give --any-image-size if that is meant"
                )
            del images[task]["pixels"]
    return images


def seen_in(samples: Sequence[Mapping[str, Any]], folder: str | Path, data: str | Path) -> Seen:
    """The images of the samples with a `vitask` block that the file `data` holds."""
    tasks = {sample["vitask"]["task"]: sample["vitask"]["choices"] for sample in samples if "vitask" in sample}
    return Seen(repr(str(data)), prepared(sizes_of(samples, folder), [data]), tasks)


def window_of(place: str | Path) -> Window:
    """The window that a data set was written with.

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
    window = recorded(labels, path).get("window")
    if window is None:
        raise VITaskError(
            f"--window-from {str(path)!r} records no window: that set is 8-bit as it was; give --window LOW HIGH"
        )
    return Window(*window)


# How two records are compared ----------------------------------------------------------------------------------


def tasks_alike(tasks: Mapping[str, Sequence[str]], task: str, choices: Sequence[str]) -> list[str]:
    """Which of `tasks` {task: its labels} is `task`: the one of its name, or else, as for an external set, those with
    the same labels in any order and spelling that look alike."""
    wanted = _looks(tuple(choices))
    return [task] if task in tasks else [name for name, names in tasks.items() if _looks(tuple(names)) == wanted]


@lru_cache(maxsize=64)
def _looks(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(look, names))


def check_prepared(
    trained: Seen, used: Seen, anyway: str, resize: Callable[[tuple[int, int]], str | None] = lambda size: None
) -> None:
    """Refuses images of another size than those of training, or prepared in another way.

    Compared is what both sides have a record of; of sizes, those of tasks whose images all have one.

    Args:
        anyway: how to go on all the same.
        resize: size in training -> what gives images of that size, None if it is nothing of the caller's.

    Raises:
        VITaskError: naming both sides.
    """
    for task, name in _pairs(trained, used):
        _say_unknown(trained.who, trained.images[name], used.who, used.images[task], name)
    for name, found in _unlike(trained, used):
        remedy = (found.size and resize(found.size)) or found.remedy
        both = f"{trained.who} on {found.trained} of task {name!r}, those of {used.who} {found.used}"
        raise VITaskError(f"{both}; {remedy}, or {anyway}")


def check_together(tsm: Seen, vlm: Seen, used: Seen, anyway: str) -> None:
    """Refuses a TSM that was trained on images unlike those of the VLM, as far as the tasks of `used` are concerned.

    Where `used` has a record, `check_prepared` of both says the same; this one needs none.

    Raises:
        VITaskError: naming both sides.
    """
    wanted = {name for task, names in used.tasks.items() for name in tasks_alike(vlm.tasks, task, names)}
    images = {task: entry for task, entry in (vlm.images or {}).items() if task in wanted}
    for name, found in _unlike(tsm, Seen(vlm.who, images, vlm.tasks)):
        raise VITaskError(
            f"{tsm.who} on {found.trained} of task {name!r}, and {vlm.who} on those that {found.used}; train both on "
            f"images that were prepared in one way, or {anyway}"
        )


def _pairs(trained: Seen, used: Seen) -> list[tuple[str, str]]:
    """(task of `used`, one of `trained` that it is and has a record)."""
    images = trained.images or {}
    return [
        (task, name)
        for task in used.images or {}
        for name in ([task] if task in images else tasks_alike(trained.tasks, task, used.tasks.get(task, ())))
        if name in images
    ]


def _unlike(trained: Seen, used: Seen) -> Iterator[tuple[str, _Difference]]:
    """Tasks of `trained` whose images differ; of several with the labels of a task, one that agrees will do."""
    found: dict[str, list[tuple[str, _Difference | None]]] = {}
    for task, name in _pairs(trained, used):
        found.setdefault(task, []).append((name, _difference(trained.images[name], used.images[task])))
    for differences in found.values():
        if all(difference for _, difference in differences):
            yield differences[0]


def _say_unknown(who: str, trained: Mapping[str, Any], data: str, used: Mapping[str, Any], task: str) -> None:
    """Where one side alone says that something was done to the pixels."""
    if trained.get("pixels") and "pixels" not in used:
        line = f"{who} on images of task {task!r} that were written with {_flags(trained['pixels'])}; no {LABELS_FILE} "
        line += f"tells how those of {data} were"
    elif used.get("pixels") and "pixels" not in trained:
        line = f"the images of {data} were written with {_flags(used['pixels'])}; no record tells how those of task "
        line += f"{task!r} were that {who} on"
    else:
        return
    say_once(f"{line}, so the two are not compared", line)


def _difference(trained: Mapping[str, Any], used: Mapping[str, Any]) -> _Difference | None:
    """The first thing in which two entries of `Images` differ."""
    return next(_differences(trained, used), None)


def _differences(trained: Mapping[str, Any], used: Mapping[str, Any]) -> Iterator[_Difference]:
    before, now = trained.get("pixels"), used.get("pixels")
    remedy = f"write them with `vitask data folder {_flags(before)}`" if before else "use images like those of training"
    size, other = _single(trained), _single(used)
    if size and other and size != other:
        yield _Difference("{}x{} images".format(*size), "are {}x{}".format(*other), remedy, size)
    if before is None or now is None:
        return
    if _other_window(before.get("window"), now.get("window")):
        yield _Difference(f"images {_window(before)}", f"are {_window(now)}", remedy)
    if "frame" in before and "frame" in now and before["frame"] != now["frame"]:
        yield _Difference(f"images of frame {before['frame']}", f"are of frame {now['frame']}", remedy)
    if _scaled_otherwise(before, now, max(used["width"][1], used["height"][1])):
        yield _Difference(f"images {_scaled(before)}", f"are {_scaled(now)}", remedy)


def _window(pixels: Mapping[str, Any]) -> str:
    window = pixels.get("window")
    return f"through the window {Window(*window)}" if window else "through no window (8-bit as they were)"


def _scaled(pixels: Mapping[str, Any]) -> str:
    limit = pixels.get("max_side")
    return f"scaled down to {limit} pixels ({pixels.get('resampling')})" if limit else "not scaled down"


def _flags(pixels: Mapping[str, Any]) -> str:
    """The flags of `vitask data folder` that prepare images so."""
    low_high, frame, side = pixels.get("window", ()), pixels.get("frame"), pixels.get("max_side")
    given = {"--window": low_high, "--frame": (frame,), "--max-side": (side,)}
    words = [[flag, *map(str, values)] for flag, values in given.items() if values and None not in values]
    return " ".join(word.removesuffix(".0") for row in words for word in row)


def _single(entry: Mapping[str, Any]) -> tuple[int, int] | None:
    (least, most), (low, high) = entry["width"], entry["height"]
    return (least, low) if (least, low) == (most, high) else None


def _other_window(one: Sequence[float] | None, other: Sequence[float] | None) -> bool:
    """Whether a value gets another grey level, or one side had no window."""
    if one is None or other is None:
        return one is not other
    furthest = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return furthest * 255 / (one[1] - one[0]) >= 0.5


def _scaled_otherwise(trained: Mapping[str, Any], used: Mapping[str, Any], longest: int) -> bool:
    """Whether images whose longest side is `longest` now would look different if prepared as in training."""
    if all(trained.get(key) == used.get(key) for key in ("max_side", "resampling")):
        return False
    # What is smaller than both limits is the same under either.
    return longest > trained.get("max_side", math.inf) or longest >= used.get("max_side", math.inf)
