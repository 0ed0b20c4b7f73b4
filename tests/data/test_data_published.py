"""Tables as they were published: several classes in a cell, a column for each class, columns that group nothing."""

import json
import logging
from pathlib import Path

import pytest
from own_images import converts, csv, fails, fill
from pictures import save

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import read_samples


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source" / "chest"
    folder.mkdir(parents=True)
    return folder


def table(source: Path, labels: list[str], count: int = 40, header: str = "image,label") -> Path:
    lines = [header]
    for number in range(count):
        save(source / f"{number}.png", ("red", "blue", "green")[number % 3], number)
        lines.append(f"{number}.png,{labels[number % len(labels)]}")
    return csv(source, "\n".join(lines))


def test_chest_xray14_as_it_is(source):
    """NIH's Data_Entry_2017.csv: "|" between findings, "No Finding", an empty column at the end."""
    header = "Image Index,Finding Labels,Follow-up #,Patient ID,OriginalImage[Width,Height],"
    labels = ["Mass", "Mass|Effusion", "No Finding", "Effusion"]
    lines = [header]
    for number in range(40):
        save(source / f"{number:08d}_000.png", "red", number)
        lines.append(f"{number:08d}_000.png,{labels[number % 4]},0,{number // 4},2500,2048,")
    path = csv(source, "\n".join(lines), "Data_Entry_2017.csv")
    flags = ["--image-column", "Image Index", "--label-column", "Finding Labels", "--group", "Patient ID"]
    found = converts(path, *flags, "--multi-label")
    rows = [row for rows in found.values() for row in rows]
    assert rows[0]["vitask"]["choices"] == ["Effusion", "Mass"]
    answers = [row["conversations"][1]["value"] for row in rows]
    assert sorted(set(answers)) == ["Effusion, Mass.", "Effusion.", "Mass.", "no finding."]
    assert all(answers.count(answer) == 10 for answer in answers)


@pytest.mark.parametrize("mark", ["|", ";"])
def test_several_classes_in_a_cell_are_no_class(source, capsys, mark):
    path = table(source, ["mass", "effusion", f"mass{mark}effusion"])
    sentence = fails(path, capsys)
    assert f"row 4 ('2.png'): label 'mass{mark}effusion' names 2 classes of other rows" in sentence
    assert "--multi-label" in sentence
    assert converts(path, "--multi-label")["train"][0]["vitask"]["choices"] == ["effusion", "mass"]


def test_a_mark_between_other_words_is_part_of_a_name(source):
    path = table(source, ["T1|contrast", "T2|plain"])
    assert converts(path)["train"][0]["vitask"]["choices"] == ["T1|contrast", "T2|plain"]


def test_no_finding_beside_a_finding_is_refused(source, capsys):
    path = table(source, ["mass", "effusion|No Finding"])
    assert "class name 'No Finding' is the answer for 'no class applies'" in fails(path, capsys, "--multi-label")


def test_a_column_for_each_class_is_named(source, capsys):
    path = csv(source, "image,MEL,NV\n0.png,1.0,0.0", "gt.csv")
    assert "where each class has a column of its own, write their names into one" in fails(path, capsys)


def test_groups_that_keep_nothing_together_are_named(source, caplog):
    path = table(source, ["mass", "effusion"])
    converts(path, "--group-pattern", r"^\d+")
    assert "each of the 40 images is a group of its own, such as '0'" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        converts(path, "--group-pattern", r"^\d")
    assert "a group of its own" not in caplog.text


def test_a_task_has_a_name(source, capsys):
    fill(source, {"red": 12, "blue": 12})
    unnamed = ["data", "folder", str(source), "--out", str(source.parent / "---"), "--modality", "fruit"]
    assert main(unnamed) == 1
    assert "has no letter in its name to call the task by; give it a name with --task" in capsys.readouterr().err
    assert "task 'a\\nb' is no name that can be shown" in fails(source, capsys, "--task", "a\nb")
    assert main([*unnamed, "--task", "fruit"]) == 0
    path = source.parent / "---" / "train.json"
    assert json.loads(path.read_text())[0]["vitask"]["task"] == read_samples(path)[0]["vitask"]["task"] == "fruit"
