"""Whole patients are split, published tables are read as they are, and nearly the same images are reported."""

import io
import json
import logging
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from own_images import command, converts, csv, fails, fill
from pictures import save
from PIL import Image, ImageEnhance

from vitask_plugin.cli import main
from vitask_plugin.data.folder import Row, assign_splits
from vitask_plugin.data.names import plain
from vitask_plugin.data.near_duplicates import NearDuplicates
from vitask_plugin.data.rows import GroupPattern, group_key
from vitask_plugin.errors import VITaskError


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source" / "skin"
    folder.mkdir(parents=True)
    return folder


def ham(source: Path, lesions: int = 30) -> Path:
    """HAM10000's columns: one to four images of a lesion, ids without a suffix, files in two folders."""
    lines = ["lesion_id,image_id,dx,dx_type,age,sex,localization"]
    number = 0
    for lesion in range(lesions):
        name, colour = (("nv", "blue"), ("mel", "red"), ("bkl", "green"))[lesion % 3]
        for _ in range(1 + lesion % 4):
            folder = source / f"part_{1 + number % 2}"
            save(folder / f"ISIC_{number:07d}.jpg", colour, number)
            lines.append(f"HAM_{lesion:07d},ISIC_{number:07d},{name},histo,{'' if number % 5 else 50.0},male,back")
            number += 1
    return csv(source, "\n".join(lines), "HAM10000_metadata.csv")


def flags(source: Path) -> list[str]:
    return [
        *("--image-column", "image_id", "--label-column", "dx", "--image-suffix", ".jpg", "--group", "lesion_id"),
        *("--image-folder", str(source / "part_1"), str(source / "part_2"), "--val", "0.2", "--test", "0.2"),
    ]


def splits_of_groups(found: dict[str, list[dict]]) -> dict[str, set[str]]:
    groups = defaultdict(set)
    for split, rows in found.items():
        for row in rows:
            groups[row["vitask"]["group"]].add(split)
    return groups


def test_a_published_table_as_it_is(source, capsys):
    found = converts(ham(source), *flags(source))
    groups = splits_of_groups(found)
    assert len(groups) == 30 and all(len(splits) == 1 for splits in groups.values())
    assert sum(map(len, found.values())) == sum(1 + lesion % 4 for lesion in range(30))
    counts = Counter(next(iter(splits)) for splits in groups.values())
    shown = capsys.readouterr().out + capsys.readouterr().err
    assert f"groups: {counts['train']} train, {counts['val']} val, {counts['test']} test" in shown
    assert "(20.0% asked for)" in shown and "points of the whole set's" in shown
    for rows in found.values():
        assert set(Counter(row["vitask"]["label"] for row in rows)) == {0, 1, 2}
        assert rows[0]["vitask"]["choices"] == ["bkl", "mel", "nv"]


def test_what_is_missing_in_a_published_table(source, capsys):
    table = ham(source)
    assert "expected 'dx2' (other columns are ignored), or name the right column with --label-column" in fails(
        table, capsys, "--image-column", "image_id", "--label-column", "dx2"
    )
    without = [flag for flag in flags(source) if flag not in ("--image-suffix", ".jpg")]
    assert "no image 'ISIC_0000000', but 'ISIC_0000000.jpg'; go on with --image-suffix .jpg" in fails(
        table, capsys, *without
    )
    both = [*flags(source), "--group-pattern", "ISIC"]
    assert "--group and --group-pattern both say what images share" in fails(table, capsys, *both)


def test_a_column_of_patients_that_nobody_asked_for_is_named(source, caplog):
    table = ham(source)
    with caplog.at_level(logging.WARNING):
        converts(table, *[flag for flag in flags(source) if flag not in ("--group", "lesion_id")])
    assert "30 different cells in the column 'lesion_id'" in caplog.text and "--group lesion_id keeps" in caplog.text


def test_semicolons_and_a_split_column(source):
    fill(source, {"red": 3, "blue": 3})
    cells = [("red", 0, "Training"), ("red", 1, "Test"), ("blue", 0, "training"), ("blue", 1, "test ")]
    lines = ["file;set;age;finding", *(f"{c}/{n:02d}.png;{s};4,5;{c}" for c, n, s in cells)]
    named = ("--image-column", "file", "--label-column", "finding", "--split-column", "set", "--val", "0")
    found = converts(csv(source, "\n".join(lines)), *named)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 2, "test": 2}


def grouped_table(source: Path, cells: list[tuple[str, str]]) -> Path:
    """`cells`: split and patient of each picture."""
    fill(source, {"red": len(cells) // 2, "blue": len(cells) // 2})
    files = [f"{colour}/{number:02d}.png,{colour}" for number in range(len(cells) // 2) for colour in ("red", "blue")]
    lines = [f"{file},{split},{patient}" for file, (split, patient) in zip(files, cells, strict=True)]
    return csv(source, "\n".join(["image,label,split,patient", *lines]))


def test_given_splits_that_share_a_patient(source, capsys, caplog):
    cells = [("train", "p1"), ("train", "p2"), ("test", "p1"), ("test", "p3"), ("train", "p4"), ("train", "p4")]
    table = grouped_table(source, cells)
    error = fails(table, capsys, "--group", "patient", "--val", "0")
    assert "1 of 4 groups are in more than one of the given splits: 'p1' (1 train, 1 test)" in error
    with caplog.at_level(logging.WARNING):
        found = converts(table, "--group", "patient", "--val", "0", "--allow-shared-groups")
    assert "'p1' (1 train, 1 test)" in caplog.text and len(found["test"]) == 2


def test_validation_is_taken_out_of_train_by_patient(source):
    cells = [("train", f"p{number // 4}") for number in range(16)] + [("test", "q")] * 4
    groups = splits_of_groups(converts(grouped_table(source, cells), "--group", "patient", "--val", "0.25"))
    assert groups.pop("q") == {"test"}
    assert sorted(map(tuple, groups.values())) == [("train",), ("train",), ("train",), ("val",)]


def test_images_without_a_patient(source, capsys, caplog):
    cells = [("train", f"p{number // 2}" if number < 8 else ("", "NaN")[number % 2]) for number in range(10)]
    table = grouped_table(source, cells)
    error = fails(table, capsys, "--group", "patient", "--val", "0")
    assert "2 of 10 images of" in error and "have no group" in error and "--allow-ungrouped" in error
    with caplog.at_level(logging.WARNING):
        rows = converts(table, "--group", "patient", "--val", "0", "--allow-ungrouped")["train"]
    assert sum("group" not in row["vitask"] for row in rows) == 2 and "each is a group of its own" in caplog.text


def test_too_few_patients(source, capsys):
    cells = [("", f"p{number // 5}") for number in range(20)]
    table = grouped_table(source, cells)
    table.write_text(table.read_text(encoding="utf-8-sig").replace(",split", ",unused"))
    fine = converts(table, "--group", "patient", "--val", "0.25", "--test", "0.25")
    assert all(len(splits) == 1 for splits in splits_of_groups(fine).values())
    table.write_text(table.read_text().replace(",p3", ",p0").replace(",p2", ",p0"))
    error = fails(table, capsys, "--group", "patient")
    assert "the data set has 2 group(s), too few for 3 splits" in error


def test_a_class_of_few_patients():
    rows = [
        Row(str(n), Path(str(n)), ("ab"[n >= 30],), None, f"p{n // 3 if n < 30 else 90 + n % 2}") for n in range(40)
    ]
    with pytest.raises(VITaskError, match=r"class 'b' has 2 group\(s\) of images, too few for 3 splits"):
        assign_splits(rows, 0.1, 0.1, 0)


def test_groups_in_file_names(source, capsys):
    for number in range(24):
        colour = ("red", "blue")[number % 2]
        save(source / colour / f"pat{number // 4}_{number}.png", colour, number)
    groups = splits_of_groups(converts(source, "--group-pattern", r"(pat\d+)_", "--val", "0.2", "--test", "0.2"))
    assert set(groups) == {f"pat{n}" for n in range(6)} and all(len(splits) == 1 for splits in groups.values())
    error = fails(source, capsys, "--group-pattern", r"pat[0-4]_")
    assert "4 of 24 images" in error and "have no group, the first being 'blue/pat5_21.png'" in error
    assert "no image has a group" in fails(source, capsys, "--group-pattern", "patient")
    assert "is no regular expression" in fails(source, capsys, "--group-pattern", "(pat")
    assert "has 2 capture groups" in fails(source, capsys, "--group-pattern", "(p)(a)")
    assert "--group is for a CSV file" in fails(source, capsys, "--group", "patient")


ALIKE = [("P001", "p001"), ("1", "1.0"), ("7", "07"), ("P-001", "P 1"), ("\u00e9t\u00e91", "e\u0301te\u03011")]


@pytest.mark.parametrize(("one", "other"), ALIKE)
def test_a_patient_that_is_written_in_two_ways_is_one(source, caplog, one, other):
    cells = [("", (one, other)[number % 2] if number < 8 else f"q{number // 3}") for number in range(32)]
    table = grouped_table(source, cells)
    table.write_text(table.read_text(encoding="utf-8-sig").replace(",split", ",unused"))
    with caplog.at_level(logging.WARNING):
        found = converts(table, "--group", "patient", "--val", "0.2", "--test", "0.2")
    groups = splits_of_groups(found)
    plain_forms = plain(one) == plain(other)
    assert len(groups) == 10
    assert all(len(splits) == 1 for splits in groups.values()) and all(len(rows) > 0 for rows in found.values())
    assert ("1 group(s) are written in more than one way" in caplog.text) is not plain_forms
    assert plain_forms or f"{one!r} (4 images) = {other!r} (4 images)" in caplog.text


def test_given_splits_are_compared_by_what_patients_look_like(source, capsys, caplog):
    cells = [("train", "P1"), ("train", "p2"), ("test", "p1"), ("test", "p3"), ("train", "p4"), ("train", "p4")]
    error = fails(grouped_table(source, cells), capsys, "--group", "patient", "--val", "0")
    assert "1 of 4 groups are in more than one of the given splits: 'P1' (1 train, 1 test)" in error


def test_long_numbers_are_told_apart(source):
    ids = ["2" * 38 + "1", "2" * 38 + "2", "1-11", "11-1", "1.05", "1.5"]
    assert len(set(map(group_key, ids))) == len(ids)


def test_a_column_of_patients_that_nobody_named(source, caplog):
    table = grouped_table(source, [("train", ("P1", "p1", "nan")[n % 3] if n < 6 else "") for n in range(8)])
    with caplog.at_level(logging.WARNING):
        converts(table, "--val", "0")
    assert "the 8 images of" in caplog.text and "have 1 different cells in the column 'patient'" in caplog.text


def test_groups_in_file_names_of_either_case(source, capsys, caplog):
    for number in range(40):
        name = f"{('PAT', 'pat')[number // 2 % 2]}{number // 4:02d}-{number}.png"
        save(source / ("red", "blue")[number % 2] / name, ("red", "blue")[number % 2], number)
    with caplog.at_level(logging.WARNING):
        groups = splits_of_groups(converts(source, "--group-pattern", "(?i)(pat[0-9]+)-", "--test", "0.4"))
    assert len(groups) == 10 and all(len(splits) == 1 for splits in groups.values())
    assert "10 group(s) are written in more than one way" in caplog.text


def test_a_pattern_finds_accents_in_either_form():
    for name, pattern in (("ne\u0301e7_1.png", "n\u00e9e[0-9]"), ("n\u00e9e7_1.png", "ne\u0301e[0-9]")):
        assert GroupPattern(pattern).find(name) == "n\u00e9e7"


def test_what_a_pattern_finds():
    assert GroupPattern(r"p\d+").find("p7/p12_3.png") == "p12"
    assert GroupPattern(r"(?:^|/)(p\d+)/").find("a/p7/p12_3.png") == "p7"
    assert GroupPattern(r"(x)?(?P<group>p\d+)").find("a/xp12.png") == "p12"
    assert GroupPattern(r"p(\d*)").find("a/p.png") is None


def random_groups(seed: int) -> list[Row]:
    generator = np.random.default_rng(seed)
    rows: list[Row] = []
    for patient in range(300):
        usual = generator.choice(4, p=[0.7, 0.15, 0.1, 0.05])
        for _ in range(generator.geometric(0.3)):
            label = usual if generator.random() < 0.8 else generator.choice(4)
            name = str(len(rows))
            rows.append(Row(name, Path(name), ("abcd"[label],), None, f"p{patient}"))
    return rows


def test_group_splits_are_stratified_and_depend_on_the_seed_alone():
    rows = random_groups(5)
    split = assign_splits(rows, 0.1, 0.2, 0)
    assert split == assign_splits(rows, 0.1, 0.2, 0) != assign_splits(rows, 0.1, 0.2, 1)
    places = defaultdict(set)
    for row in split:
        places[row.group].add(row.split)
    assert all(len(splits) == 1 for splits in places.values())
    totals, counts = Counter(row.labels[0] for row in rows), Counter((row.labels[0], row.split) for row in split)
    for name, total in totals.items():
        for part, share in {"train": 0.7, "val": 0.1, "test": 0.2}.items():
            assert abs(counts[name, part] - share * total) <= 2, (name, part)


# Nearly the same images -------------------------------------------------------------------------------------------


def drawn(seed: int, side: int = 96) -> Image.Image:
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.normal(128, 50, (12, 12)).clip(0, 255).astype(np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def recompressed(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


COPIES = (
    recompressed,
    lambda image: image.resize((64, 64), Image.Resampling.LANCZOS),
    lambda image: ImageEnhance.Brightness(image).enhance(1.08),
)


def test_copies_of_an_image_are_found_and_others_are_not():
    near = NearDuplicates()
    for number in range(200):
        near.see(number, "train", drawn(number))
    for number in range(60):
        near.see(1000 + number, "val" if number < 30 else "test", COPIES[number % 3](drawn(number)))
    for number in range(100):
        near.see(2000 + number, "test", drawn(5000 + number))
    assert near.pairs(("train", "val", "test")) == [(number, 1000 + number) for number in range(60)]


def test_images_of_one_colour_are_not_all_the_same():
    near = NearDuplicates()
    for number in range(40):
        flat = Image.new("RGB", (32, 32), (number, number, number))
        near.see(number, "train" if number < 20 else "test", flat)
    assert near.pairs(("train", "val", "test")) == [] and near.flat == 40


def test_near_duplicates_are_reported_and_kept(source, caplog):
    for number in range(12):
        folder = source / ("train" if number < 8 else "test") / ("red", "blue")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        drawn(number).save(folder / f"{number}.png")
    recompressed(drawn(0)).save(source / "test" / "red" / "again.png")
    with caplog.at_level(logging.WARNING):
        converts(source, "--val", "0")
    assert "1 image(s) show nearly the same as one of another split" in caplog.text
    assert "train ('train/red/0.png', labelled 'red') and test ('test/red/again.png', labelled 'red')" in caplog.text
    labels = json.loads((Path(command(source)[4]) / "labels.json").read_text())
    assert labels["near_duplicates"] == [{"train": "'train/red/0.png'", "test": "'test/red/again.png'"}]
    assert "duplicates" not in labels


def test_near_duplicates_of_a_medmnist_file(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    grey = [np.asarray(drawn(number, 28).convert("L")) for number in range(12)]
    arrays = {"train": grey[:6], "val": grey[6:8], "test": [*grey[8:], grey[2] // 2 + 60]}
    labels = {split: np.arange(len(images)).reshape(-1, 1) % 2 for split, images in arrays.items()}
    np.savez(
        tmp_path / "breastmnist.npz",
        **{f"{split}_images": np.stack(images) for split, images in arrays.items()},
        **{f"{split}_labels": values for split, values in labels.items()},
    )
    with caplog.at_level(logging.WARNING):
        assert main(["data", "medmnist", "--task", "breast", "--out", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "labels.json").read_text())["near_duplicates"] == [
        {"train": "breastmnist train row 2", "test": "breastmnist test row 4"}
    ]
