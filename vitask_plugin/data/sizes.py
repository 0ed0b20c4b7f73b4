"""How large the images of a task are, read from file headers."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from vitask_plugin.data.images import opened
from vitask_plugin.errors import VITaskError

LOOKED_AT = 256  # images of each task
Sizes = dict[str, dict[str, Any]]  # {task: {"width": [least, most], "height": [least, most], "images": looked at}}


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the positions 0 to `count` - 1, evenly spread."""
    return [position * count // wanted for position in range(wanted)] if count > wanted else list(range(count))


def measured(images: Iterable[tuple[str, bytes | Path]]) -> Sizes:
    """Sizes by task, of at most `LOOKED_AT` images of each. An image that cannot be opened does not count here.

    Args:
        images: (task, bytes or path of an image file).
    """
    files: dict[str, list[bytes | Path]] = {}
    for task, file in images:
        files.setdefault(task, []).append(file)
    found: Sizes = {}
    for task, all_files in files.items():
        sizes = [size for index in spread(len(all_files), LOOKED_AT) if (size := _size(all_files[index]))]
        if sizes:
            widths, heights = zip(*sizes, strict=True)
            sides = {"width": [min(widths), max(widths)], "height": [min(heights), max(heights)]}
            found[task] = {**sides, "images": len(sizes)}
    return found


def sizes_of(samples: Sequence[Mapping[str, Any]], folder: str | Path) -> Sizes:
    """Sizes of the images that samples with a `vitask` block name."""
    blocks = (sample for sample in samples if "vitask" in sample)
    return measured((sample["vitask"]["task"], Path(folder) / sample["image"]) for sample in blocks)


def _size(file: bytes | Path) -> tuple[int, int] | None:
    try:
        with opened(file, "") as image:
            return _upright(image)
    except VITaskError:
        return None


def _upright(image: Image.Image) -> tuple[int, int]:
    # A TIFF's size is that of the turned picture already.
    lies = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return image.size[::-1] if lies else image.size
