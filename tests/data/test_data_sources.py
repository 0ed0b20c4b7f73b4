"""What an image's owner calls its file stays in the JSON, through reading too."""

from pathlib import Path

import pytest
from own_images import converts, csv, fill
from pictures import save


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source" / "scans"
    folder.mkdir(parents=True)
    return folder


def test_class_folders_keep_the_path_below_the_folder(source: Path) -> None:
    fill(source, {"red": 5, "dark_blue": 5})
    found = converts(source)
    rows = [row for rows in found.values() for row in rows]
    assert {row["source"] for row in rows} == {path.relative_to(source).as_posix() for path in source.rglob("*.png")}
    assert len(rows) == 10
    # Read back, samples of one label share their blocks, and each still has its own name.
    assert len({id(row["vitask"]) for row in found["train"]}) == 2
    for row in rows:
        assert row["source"].split("/")[0] == row["conversations"][1]["value"].strip(".").replace(" ", "_")


def test_a_table_keeps_its_own_name_and_the_group(source: Path) -> None:
    lines = [(f"deep/IMG_{number:03d}", "ab"[number % 2], f"p{number // 2}") for number in range(8)]
    for number, (name, *_) in enumerate(lines):
        save(source / f"{name}.png", "red", number)
    table = csv(source, "\n".join(["image,label,patient", *map(",".join, lines)]))
    found = converts(table, "--image-suffix", ".png", "--group", "patient", "--val", "0.25", "--test", "0.25")
    pairs = {(row["source"], row["vitask"]["group"]) for rows in found.values() for row in rows}
    assert pairs == {(name, group) for name, _, group in lines}
