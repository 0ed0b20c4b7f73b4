"""Runs `vitask data folder` on small pictures; the output lies in a folder `out` beside the source's parent."""

import os
from pathlib import Path

from pictures import save

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import read_samples


def fill(source: Path, colours: dict[str, int], prefix: str = "", start: int = 0) -> None:
    for number, (colour, count) in enumerate(colours.items()):
        for index in range(count):
            name = f"{prefix}{colour}/{index:02d}.png"
            save(source / name, colour.split("_")[-1], start + 100 * number + index)


def command(source: Path, *flags: str) -> list[str]:
    out = source.parents[1] / "out" if source.is_dir() else source.parents[2] / "out"
    return ["data", "folder", str(source), "--out", str(out), "--modality", "fruit", *flags]


def converts(source: Path, *flags: str) -> dict[str, list[dict]]:
    assert main(command(source, *flags)) == 0
    out = Path(command(source)[4])
    return {
        split: read_samples(out / f"{split}.json")
        for split in ("train", "val", "test")
        if (out / f"{split}.json").exists()
    }


def fails(source: Path, capsys, *flags: str) -> str:
    out = Path(command(source)[4])
    before = sorted(os.listdir(out.parent))
    assert main(command(source, *flags)) == 1
    left = {f"{out.name}-duplicates.csv"}  # which a refusal of duplicates leaves
    assert sorted(set(os.listdir(out.parent)) - left) == sorted(set(before) - left)
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("vitask: error: ")
    return lines[-1]


def csv(source: Path, text: str, name: str = "labels.csv") -> Path:
    path = source / name
    path.write_text(text, encoding="utf-8-sig")
    return path
