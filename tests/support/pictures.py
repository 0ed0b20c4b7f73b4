"""Small labelled pictures that a classifier can learn, as files and as LLaVA JSON; files of 16 bits per colour."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import PIL
from packaging.version import Version
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
        "lab.tif": (rgb.convert("LAB"), {}),
        "pages.tif": (grey, {"save_all": True, "append_images": [grey.rotate(180)]}),
        "rgba.webp": (rgba, {"lossless": True}),
        "rgb.bmp": (rgb, {}),
    }
    if Version(PIL.__version__).major >= 13:  # earlier ones cannot read their own
        files["ycbcr.tif"] = (rgb.convert("YCbCr"), {})
    for name, (image, options) in files.items():
        image.save(folder / name, **options)
    return list(files)


def png16(values: np.ndarray, *, key: tuple[int, ...] = (), interlaced: bool = False) -> bytes:
    """A PNG of 16 bits per colour, which PIL cannot write: [H, W, 2] grey and alpha, 3 RGB, 4 RGBA.

    Args:
        key: the colour that is transparent.
    """

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, colours = values.shape
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [values[y::rows, x::columns] for y, x, rows, columns in (passes if interlaced else [(0, 0, 1, 1)])]
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for part in parts if part.size for line in part)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[colours], 0, 0, interlaced)
    transparent = chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) if key else b""
    chunks = chunk(b"IHDR", header) + transparent + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


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
