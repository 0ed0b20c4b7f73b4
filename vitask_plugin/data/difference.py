"""In what the images of a task differ between two records, in words.

Through another window, or scaled down in another way, a model sees other pictures than it has learnt from, and nothing
else tells.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vitask_plugin.data.label_file import LABELS_FILE
from vitask_plugin.data.window import Window

_AS_THEY_WERE = (0, 255)
# {task: the entry of `sizes.Sizes`, and where it is known "pixels"}: {"window": [low, high], "of_8_bits": whether 8-bit
# pictures went through it too, where there are any, "frame": n, "max_side": n, "resampling": name}, each where it was
# used; {} = nothing was done, the images are 8-bit as they were.
Images = dict[str, dict[str, Any]]


class Difference(NamedTuple):
    """`trained`, `used`: the two sides in words. remedy: what makes them one. size: in training, if it is that."""

    trained: str
    used: str
    remedy: str
    size: tuple[int, int] | None = None


def difference(trained: Mapping[str, Any], used: Mapping[str, Any]) -> Difference | None:
    """The first thing in which two entries of `Images` differ."""
    return next(_differences(trained, used), None)


def _differences(trained: Mapping[str, Any], used: Mapping[str, Any]) -> Iterator[Difference]:
    before, now = trained.get("pixels"), used.get("pixels")
    remedy = (
        f"write them with `vitask data folder {flags_for(before)}`" if before else "use images like those of training"
    )
    if before and "of_8_bits" in before:  # no other flag says which of them go through the window
        remedy = f"write them with `vitask data folder --window-from` and the {LABELS_FILE} of those of training"
    size, other = _single(trained), _single(used)
    if size and other and size != other:
        yield Difference("{}x{} images".format(*size), "are {}x{}".format(*other), remedy, size)
    if before is None or now is None:
        return
    if _other_window(before.get("window"), now.get("window")):
        yield Difference(f"images {_window(before)}", f"are {_window(now)}", remedy)
    if "of_8_bits" in before and "of_8_bits" in now and before["of_8_bits"] != now["of_8_bits"]:
        yield Difference(f"images {_of_8_bits(before)}", f"are such {_of_8_bits(now)}", remedy)
    if "frame" in before and "frame" in now and before["frame"] != now["frame"]:
        yield Difference(f"images of frame {before['frame']}", f"are of frame {now['frame']}", remedy)
    if _scaled_otherwise(before, now, max(used["width"][1], used["height"][1])):
        yield Difference(f"images {_scaled(before)}", f"are {_scaled(now)}", remedy)


def _window(pixels: Mapping[str, Any]) -> str:
    window = pixels.get("window")
    return f"through the window {Window(*window)}" if window else "through no window (8-bit as they were)"


def _of_8_bits(pixels: Mapping[str, Any]) -> str:
    way = f"went through the window {Window(*pixels['window'])}" if pixels["of_8_bits"] else "stayed as they were"
    return f"whose 8-bit ones {way}"


def _scaled(pixels: Mapping[str, Any]) -> str:
    limit = pixels.get("max_side")
    return f"scaled down to {limit} pixels ({pixels.get('resampling')})" if limit else "not scaled down"


def flags_for(pixels: Mapping[str, Any]) -> str:
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
