"""What a TSM's training and validation data have in common: refused where it is patients, said where it is images."""

import json
import logging
import shutil
from pathlib import Path

import pytest
from pictures import save, write_task

from vitask_plugin.cli import main
from vitask_plugin.data.shared_files import shared_files


@pytest.fixture
def data(tmp_path) -> Path:
    for split, count in (("train", 12), ("val", 6)):
        write_task(tmp_path, "two", ["red", "blue"], count, split=split)
    return tmp_path


def command(data: Path, *more: str) -> list[str]:
    files = ("--data", data / "two-train.json", "--val", data / "two-val.json", "--image-folder", data / "images")
    words = ("--out", data / "tsm", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1", "--device", "cpu")
    return ["tsm", "train", *map(str, (*files, *words, *more))]


def change(path: Path, **groups: str) -> None:
    """Gives the samples of these numbers (`_3="P1"`) a group."""
    rows = json.loads(path.read_text())
    for number, group in groups.items():
        rows[int(number[1:])]["vitask"]["group"] = group
    path.write_text(json.dumps(rows))


def test_nothing_in_common(data, caplog):
    change(data / "two-train.json", _0="P1", _1="P2")
    change(data / "two-val.json", _0="P3", _1="P10")
    with caplog.at_level(logging.WARNING, "vitask_plugin"):
        assert main(command(data)) == 0
    assert [record.getMessage() for record in caplog.records if "overlap" in record.name] == []
    assert json.loads((data / "tsm" / "metrics.json").read_text())["settings"]["allow_shared_groups"] is False


@pytest.mark.parametrize(("trained", "validated"), [("P1", "P1"), ("P001", "p1"), ("7", "7.0"), ("\u00e9", "e\u0301")])
def test_a_patient_in_both(data, capsys, caplog, trained, validated):
    change(data / "two-train.json", _0=trained, _1=trained, _2="P2")
    change(data / "two-val.json", _0="P3", _3=validated)
    assert main(command(data)) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"1 of 2 groups of the validation data are in the training data too, the first being {validated!r}" in said
    assert "of task 'two' (2 training images, 1 for validation)" in said and not (data / "tsm").exists()
    assert said.endswith("or go on with --allow-shared-groups")
    with caplog.at_level(logging.WARNING):
        assert main(command(data, "--allow-shared-groups")) == 0
    assert "1 of 2 groups of the validation data are in the training data too" in caplog.text


def test_one_id_in_two_tasks_is_two_patients(data, caplog):
    write_task(data, "other", ["green", "grey"], 12)
    write_task(data, "other", ["green", "grey"], 6, split="val")
    change(data / "two-train.json", _0="1")
    change(data / "other-val.json", _0="1")
    words = command(data)
    words[words.index("--val") : words.index("--val")] = [str(data / "other-train.json")]
    words[words.index("--image-folder") : words.index("--image-folder")] = [str(data / "other-val.json")]
    assert main(words) == 0


def test_images_in_both(data, caplog):
    """One under the same name, one copied under another; a file of the same size is another picture."""
    rows = json.loads((data / "two-val.json").read_text())
    shutil.copy(data / "images/two-train/003.png", data / "images" / rows[1]["image"])
    rows[0]["image"] = "two-train/000.png"
    (data / "two-val.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert main(command(data)) == 0
    assert "2 of 6 validation images are training images too, the first being" in caplog.text
    assert "two-train/000.png': the validation accuracy, by which the epoch is chosen, is higher" in caplog.text


@pytest.mark.parametrize(
    ("source", "name", "sentence"),
    [
        ("val", "test.json", "test.json' is a test split by its name"),
        ("train", "copy.json", "copy.json' is what is trained on (--data '"),
    ],
)
def test_a_split_that_may_not_choose_the_epoch(data, capsys, source, name, sentence):
    shutil.copy(data / f"two-{source}.json", data / name)
    words = command(data)
    words[words.index("--val") + 1] = str(data / name)
    assert main(words) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--val" in said and sentence in said and said.endswith("give the val split")
    assert not (data / "tsm").exists()


def test_files_are_compared_by_their_bytes(tmp_path):
    first = save(tmp_path / "a.png", "red", 1)
    data = first.read_bytes()
    (tmp_path / "same.png").write_bytes(data)
    (tmp_path / "other.png").write_bytes(data[:-1] + b"x")
    (tmp_path / "link.png").symlink_to(first)
    others = [tmp_path / name for name in ("same.png", "other.png", "link.png")]
    assert shared_files([first], others) == [(others[0], first), (others[2], first)]


def test_an_image_with_two_labels(data, caplog):
    rows = json.loads((data / "two-train.json").read_text())
    rows.append({**rows[1], "image": f"./{rows[0]['image']}"})  # spelled alike, the file would be refused
    (data / "two-train.json").write_text(json.dumps(rows))
    with caplog.at_level(logging.WARNING):
        assert main(command(data)) == 0
    assert "training data: 1 image(s) have two labels of one task, so one of the two is wrong" in caplog.text
    assert "two-train/000.png' of task 'two', with the labels 0 and 1" in caplog.text
