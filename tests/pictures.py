"""Small labelled pictures that a classifier can learn, as files and as LLaVA JSON."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from vitask_plugin.data.instructions import sample

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}


def picture(colour: str, seed: int, side: int = 32) -> Image.Image:
    """A noisy patch of one colour; every seed gives another picture."""
    generator = np.random.default_rng(seed)
    pixels = np.array(COLOURS[colour]) + generator.normal(0, 25, (side, side, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(path: Path, colour: str, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(colour, seed).save(path)
    return path


def write_every_mode(folder: Path) -> list[str]:
    """Names of image files of every 8-bit kind that PIL writes, and of one that a tag turns; each 40x30."""
    values = np.random.default_rng(0).integers(0, 256, (30, 40, 4), dtype=np.uint8)
    rgba = Image.fromarray(values)
    rgb, grey = rgba.convert("RGB"), rgba.convert("L")
    turned = Image.Exif()
    turned[0x0112] = 6
    palette = rgb.quantize(16)
    files = {
        "bits.png": (grey.convert("1"), {}),
        "grey.png": (grey, {}),
        "grey-alpha.png": (rgba.convert("LA"), {}),
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "palette.png": (palette, {}),
        "palette-transparent.png": (palette, {"transparency": 3}),
        "palette-alphas.png": (palette, {"transparency": bytes(range(0, 160, 10))}),
        "key.png": (rgb, {"transparency": rgb.getpixel((5, 5))}),
        "grey-key.png": (grey, {"transparency": 7}),
        "still.gif": (palette, {}),
        "moving.gif": (palette, {"save_all": True, "append_images": [palette.rotate(180)]}),
        "moving.png": (rgb, {"save_all": True, "append_images": [rgb.rotate(180)]}),
        "rgb.jpg": (rgb, {}),
        "grey.jpg": (grey, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "turned.jpg": (rgb, {"exif": turned}),
        "turned.png": (rgba, {"exif": turned}),
        "ycbcr.tif": (rgb.convert("YCbCr"), {}),
        "lab.tif": (rgb.convert("LAB"), {}),
        "pages.tif": (grey, {"save_all": True, "append_images": [grey.rotate(180)]}),
        "rgba.webp": (rgba, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
    }
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return list(files)


def write_task(
    folder: Path, task: str, choices: list[str], count: int, *, split: str = "train", multi_label: bool = False
) -> Path:
    """`count` pictures in folder/images and folder/TASK-SPLIT.json. Class k has the colour of choice k; a multi-label
    picture has label k where bit k of its number is set, and the colour of its first label (grey if it has none)."""
    rows = []
    first = sum(map(ord, task + split)) * 1000  # other pictures in every task and split
    for index in range(count):
        if multi_label:
            label: int | list[int] = [k for k in range(len(choices)) if index >> k & 1]
            colour = choices[label[0]] if label else "grey"
        else:
            label = index % len(choices)
            colour = choices[label]
        path = f"{task}-{split}/{index:03d}.png"
        save(folder / "images" / path, colour, first + index)
        rows.append(
            sample(
                identifier=f"{task}-{split}-{index}",
                image=path,
                modality="test",
                task=task,
                choices=choices,
                label=label,
            )
        )
    target = folder / f"{task}-{split}.json"
    target.write_text(json.dumps(rows))
    return target
