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

ANYWAY = "give --any-image-size if that is meant"
_AS_THEY_WERE = (0, 255)
SCALING = "lanczos"  # what `pixels.Pixels` scales down with
# {task: the entry of `sizes.Sizes`, and where it is known "pixels"}: {"window": [low, high], "of_8_bits": whether 8-bit
# pictures went through it too, where there are any, "frame": n, "max_side": n, "resampling": name}, each where it was
# used; {} = nothing was done, the images are 8-bit as they were.
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


def recorded(labels: Mapping[str, Any], path: str | Path) -> dict[str, Any] | None:
    """What a label set says was done to the pixels of its images; None = nothing, as one of version 0.1.

    Args:
        labels: content of the label set `path`.

    Raises:
        VITaskError: it says what no data set was written with.
    """
    if "pixels" not in labels:
        return None
    pixels = labels["pixels"]
    if not _is_whole(pixels):
        raise VITaskError(
            f"label set {str(path)!r} has the 'pixels' {pixels!r}; expected a window [low, high], a frame or a "
            "max_side, so write the data set again with `vitask data folder`"
        )
    found = {name: pixels[name] for name in ("window", "of_8_bits", "frame", "max_side") if name in pixels}
    return {**found, "resampling": SCALING} if "max_side" in found else found


def _is_whole(pixels: Any) -> bool:
    """Whether it is what a data set may have been written with."""
    kinds = {"of_8_bits": bool, "frame": int, "max_side": int}
    try:
        if "window" in pixels:
            Window(*map(float, pixels["window"]))
        return isinstance(pixels, dict) and all(type(pixels.get(name, kind())) is kind for name, kind in kinds.items())
    except (TypeError, ValueError, VITaskError):
        return False


def are_images(images: Any) -> bool:
    """Whether it is a record of `Images`, for those who read one from a file."""
    return isinstance(images, dict) and all(map(_is_entry, images.values()))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict) or not _is_whole(entry.get("pixels", {})):
        return False
    sides = [entry.get(side) for side in ("width", "height")]
    return all(isinstance(side, list) and [type(number) for number in side] == [int, int] for side in sides)


def _labels_beside(data: str | Path) -> tuple[Path, dict[str, Any]] | None:
    path = Path(data).parent / LABELS_FILE
    labels = read_json(path, "label set beside the data file,") if path.is_file() else None
    # Anybody may call a file so: without a task it is none of ours.
    return (path, labels) if isinstance(labels, dict) and {"task", "choices"} <= labels.keys() else None


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
        beside = _labels_beside(path)
        for task, entry in entries.items():
            pixels = recorded(beside[1], beside[0]) if beside and beside[1]["task"] == task else None
            own = entry if pixels is None else {**entry, "pixels": pixels}
            if task not in images:
                first[task], images[task] = path, dict(own)
                continue
            found = _difference(images[task], own)
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
        line = f"the images of task {task!r} in {str(path)!r} were written with {_flags(pixels)}; no {LABELS_FILE} "
        line += (
            f"tells how those in {str(unknown[0])!r} were, so the two are not compared, and nothing of it is recorded"
        )
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


# How two records are compared ----------------------------------------------------------------------------------


def tasks_alike(tasks: Mapping[str, Sequence[str]], task: str, choices: Sequence[str]) -> list[str]:
    """Which of `tasks` {task: its labels} is `task`: the one of its name, or else, as for an external set, those with
    the same labels in any order and spelling that look alike."""
    wanted = _looks(tuple(choices))
    return [task] if task in tasks else [name for name, names in tasks.items() if _looks(tuple(names)) == wanted]


@lru_cache(maxsize=64)
def _looks(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset(map(look, names))


Resize = Callable[[tuple[int, int]], str | None]  # size in training -> what gives images of it, if the caller can


def _nothing(size: tuple[int, int]) -> None:
    return None


def check_prepared(trained: Seen, used: Seen, anyway: str = ANYWAY, resize: Resize = _nothing) -> None:
    """Refuses images of another size than those of training, or prepared in another way.

    Compared is what both sides have a record of; of sizes, those of tasks whose images all have one.

    Args:
        anyway: how to go on all the same.
        resize: the caller's way to the size of training.

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


def check_all(
    trained: Sequence[Seen],
    used: Seen,
    anyway: str = ANYWAY,
    resize: Resize = _nothing,
) -> None:
    """`check_prepared` of a VLM, which comes first, and of TSMs, and `check_together` of each TSM with the VLM."""
    for one in trained:
        check_prepared(one, used, anyway, resize)
    for tsm in trained[1:]:
        check_together(tsm, trained[0], used, anyway)


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
    if before and "of_8_bits" in before:  # no other flag says which of them go through the window
        remedy = f"write them with `vitask data folder --window-from` and the {LABELS_FILE} of those of training"
    size, other = _single(trained), _single(used)
    if size and other and size != other:
        yield _Difference("{}x{} images".format(*size), "are {}x{}".format(*other), remedy, size)
    if before is None or now is None:
        return
    if _other_window(before.get("window"), now.get("window")):
        yield _Difference(f"images {_window(before)}", f"are {_window(now)}", remedy)
    if "of_8_bits" in before and "of_8_bits" in now and before["of_8_bits"] != now["of_8_bits"]:
        yield _Difference(f"images {_of_8_bits(before)}", f"are such {_of_8_bits(now)}", remedy)
    if "frame" in before and "frame" in now and before["frame"] != now["frame"]:
        yield _Difference(f"images of frame {before['frame']}", f"are of frame {now['frame']}", remedy)
    if _scaled_otherwise(before, now, max(used["width"][1], used["height"][1])):
        yield _Difference(f"images {_scaled(before)}", f"are {_scaled(now)}", remedy)


def _window(pixels: Mapping[str, Any]) -> str:
    window = pixels.get("window")
    return f"through the window {Window(*window)}" if window else "through no window (8-bit as they were)"


def _of_8_bits(pixels: Mapping[str, Any]) -> str:
    way = f"went through the window {Window(*pixels['window'])}" if pixels["of_8_bits"] else "stayed as they were"
    return f"whose 8-bit ones {way}"


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
    """Whether a value gets another grey level. No window (8-bit pictures as they were) is one of 0 to 255."""
    one, other = one or _AS_THEY_WERE, other or _AS_THEY_WERE
    furthest = max(abs(a - b) for a, b in zip(one, other, strict=True))
    return furthest * 255 / (one[1] - one[0]) >= 0.5


def _scaled_otherwise(trained: Mapping[str, Any], used: Mapping[str, Any], longest: int) -> bool:
    """Whether images whose longest side is `longest` now would look different if prepared as in training."""
    if all(trained.get(key) == used.get(key) for key in ("max_side", "resampling")):
        return False
    # What is smaller than both limits is the same under either.
    return longest > trained.get("max_side", math.inf) or longest >= used.get("max_side", math.inf)
