"""`vitask predict`: the table says what `Specialist` says; runs that are ended go on; what cannot be read is a row."""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from trained import Trained, make_trained

from vitask_plugin import Specialist
from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.specialist import command

COMMAND = [sys.executable, "-m", "vitask_plugin.cli", "predict"]


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return make_trained(tmp_path_factory.mktemp("llava"), tiny_checkpoint, "cls")


@pytest.fixture
def images(drawn_data: Path, tmp_path: Path) -> Path:
    """A folder of 16 images, one of which is none, with a note beside them."""
    folder = shutil.copytree(drawn_data / "images" / "test", tmp_path / "scans")
    (folder / "00003.png").write_bytes((folder / "00003.png").read_bytes()[:60])
    (folder / "README.txt").write_text("of last year")
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def words(trained: Trained, images: Path, out: Path, *more: str) -> list[str]:
    given = [str(trained.checkpoint), str(images), "--tsm", str(trained.tsm), "--device", "cpu", "--out", str(out)]
    return [*given, "--batch-size", "3", *more]


def test_the_table_is_what_the_class_says(
    trained: Trained, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "found" / "predictions.csv"
    assert main(["predict", *words(trained, images, out, "--answer", "--ep", "average")]) == 0
    found = rows(out)
    paths = sorted(images.glob("*.png"))
    assert [row["image"] for row in found] == list(map(str, paths)) and len(paths) == 16
    columns = ["image", "label", *(f"probability_{name}" for name in DRAWN.choices), "entropy", "error", "answer"]
    assert list(found[0]) == columns
    specialist = Specialist.load(trained.checkpoint, tsm=trained.tsm, device="cpu")
    expected = specialist.predict(paths, ep="average", answer=True, batch_size=3)
    for row, one in zip(found, expected, strict=True):
        if one.error:
            assert row["image"].endswith("00003.png") and row["error"] == one.error
            assert not any(row[name] for name in columns if name not in ("image", "error"))
            continue
        assert [float(row[f"probability_{name}"]) for name in DRAWN.choices] == list(one.probabilities.values())
        assert row["label"] == one.label and float(row["entropy"]) == one.entropy and row["answer"] == one.answer
    said = capsys.readouterr().out
    assert "task 'vitask_drawn', 4 classes, with and without exemplars, averaged, not calibrated" in said
    assert f"{out}: 16 images (" in said and "; 1 could not be read, see the column error, the first: image" in said
    assert os.listdir(out.parent) == ["predictions.csv"]


def test_processes_share_the_work_and_a_table_names_images(trained: Trained, images: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in images.glob("*.png"))
    (tmp_path / "list.csv").write_text("\n".join(["id;image", *(f"{n};{name}" for n, name in enumerate(names))]))
    given = words(trained, tmp_path / "list.csv", tmp_path / "two.csv", "--image-folder", str(images))
    assert main(["predict", *given, "--processes", "2"]) == 0
    assert main(["predict", *words(trained, images, tmp_path / "one.csv")]) == 0
    two, one = rows(tmp_path / "two.csv"), rows(tmp_path / "one.csv")
    assert [row.pop("image") for row in two] == names
    assert [Path(row.pop("image")).name for row in one] == names
    for row, other in zip(two, one, strict=True):
        assert row["label"] == other["label"] and bool(row["error"]) == bool(other["error"])
        likely = [[float(each[f"probability_{name}"] or -1) for name in DRAWN.choices] for each in (row, other)]
        assert np.abs(np.subtract(*likely)).max() < 1e-6


def lines(folder: Path) -> list[str]:
    return [line for path in sorted(folder.rglob("*.jsonl")) for line in path.read_text().splitlines()]


def end(process: subprocess.Popen | None, folder: Path) -> None:
    """Kills a process, or interrupts this one as Ctrl-C does, once three rows are there."""
    while len(lines(folder)) < 3 and (process is None or process.poll() is None):
        time.sleep(0.002)
    if process is None:
        signal.raise_signal(signal.SIGINT)
    else:
        process.kill()


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_an_ended_run_goes_on(
    how: str, trained: Trained, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.csv"
    given = words(trained, images, out)
    given[given.index("--batch-size") + 1] = "1"
    if how == "killed":
        process = subprocess.Popen([*COMMAND, *given], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        end(process, tmp_path)
        text = process.communicate()[0]
        assert process.returncode == -signal.SIGKILL, text
    else:
        thread = threading.Thread(target=end, args=(None, tmp_path))
        thread.start()
        assert main(["predict", *given]) == 130
        thread.join()
    assert not out.exists()
    (kept,) = tmp_path.glob(".predictions.csv.*/*.jsonl")
    before = [line for line in kept.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 3 <= len(before) < 16
    done = [line for line in before if json.loads(line)[1]["error"] is None]
    # What is there is not made again: one row is told from a new one by a mark. A kill may leave half a line.
    marked = json.loads(done[0])
    marked[1]["entropy"] = 99.0
    kept.write_text("".join([*before, json.dumps(marked), "\n", '["half a li']))
    capsys.readouterr()
    assert main(["predict", *given]) == 0
    assert f"{len(done)} of 16 images are there from a run that was ended" in capsys.readouterr().out
    found = rows(out)
    assert len(found) == 16 and [row["entropy"] for row in found].count("99.0") == 1
    assert not list(tmp_path.glob(".predictions*"))


def test_rows_of_other_settings_or_images_are_not_taken(trained: Trained, images: Path, tmp_path: Path) -> None:
    """And an image that could not be read is tried again."""
    from vitask_plugin.specialist.inputs import inputs_of
    from vitask_plugin.specialist.parts import Parts, key, stamps
    from vitask_plugin.specialist.prediction import Prediction

    out = tmp_path / "predictions.csv"
    parts = Parts(out, {"ep": None, "files": stamps([trained.checkpoint], but=out)})
    first, second, third, *_ = inputs_of([images])
    writer = parts.writer(0)
    for image in (first, second):
        writer.write(image, Prediction.of(image.name, ("a", "b"), [0.25, 0.75], "binary-class"))
    writer.write(third, Prediction.failed(third.name, "it is not there"))
    writer.close()
    same = Parts(out, {"ep": None, "files": stamps([trained.checkpoint], but=out)})
    assert list(same.known()) == [key(first), key(second)] and same.known()[key(first)].label == "b"
    assert same.all()[key(third)].error == "it is not there"
    assert not Parts(out, {"ep": "true", "files": stamps([trained.checkpoint], but=out)}).known()
    Image.new("RGB", (32, 32)).save(first.path)
    assert key(first) not in same.known() and key(second) in same.known()
    changed = shutil.copytree(trained.checkpoint, tmp_path / "checkpoint")
    before = stamps([changed], but=out)
    os.utime(changed / "vitask.json", ns=(1, 1))
    assert stamps([changed], but=out) != before


def test_rows_are_of_one_tower_and_one_set_of_packages(
    trained: Trained, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    checkpoint = shutil.copytree(trained.checkpoint, tmp_path / "llava-vitask")
    config = json.loads((checkpoint / "config.json").read_text())
    tower = shutil.copytree(config["mm_vision_tower"], tmp_path / "tower")
    (checkpoint / "config.json").write_text(json.dumps({**config, "mm_vision_tower": str(tower)}))
    args = parser.parse_args([str(checkpoint), str(images)])
    before = command._parts(args).folder
    assert command._parts(args).folder == before
    os.utime(tower / "config.json", ns=(1, 1))
    other = command._parts(args).folder
    assert other != before
    monkeypatch.setattr("vitask_plugin.record.checkpoint.versions", lambda: {"transformers": "5.0.0"})
    assert command._parts(args).folder != other


def test_strict_ends_at_the_first_that_cannot_be_read(
    trained: Trained, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.csv"
    assert main(["predict", *words(trained, images, out, "--strict")]) == 2
    assert "00003.png' cannot be read" in capsys.readouterr().err
    assert not out.exists() and lines(tmp_path)
    shutil.copy(images / "00002.png", images / "00003.png")
    assert main(["predict", *words(trained, images, out, "--strict")]) == 0
    assert len(rows(out)) == 16


def refused(capsys: pytest.CaptureFixture[str], *given: object) -> str:
    assert main(["predict", *map(str, given)]) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("vitask: error: ")
    return said


def test_bad_input_is_one_sentence(
    trained: Trained,
    tiny_checkpoint: Path,
    images: Path,
    drawn_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ours, out = trained.checkpoint, ("--out", tmp_path / "p.csv")
    assert "checkpoint 'nowhere' does not exist" in refused(capsys, "nowhere", images)
    assert "does not record which labels it was trained on; give --labels" in refused(capsys, tiny_checkpoint, images)
    assert "was trained on 'vitask_drawn', not on task 'other'" in refused(capsys, ours, images, "--task", "other")
    (tmp_path / "none").mkdir()
    assert "holds no file that could be an image" in refused(capsys, ours, tmp_path / "none", *out)
    (tmp_path / "list.csv").write_text("path\na.png\n")
    assert "expected a column 'image', or give --image-column" in refused(capsys, ours, tmp_path / "list.csv", *out)
    (tmp_path / "up.csv").write_text("image\n../a.png\n")
    assert "up.csv', row 2: image path '../a.png' leaves the image" in refused(capsys, ours, tmp_path / "up.csv", *out)
    (tmp_path / "mine.csv").write_text("a,b\n")
    said = refused(capsys, ours, images, "--out", tmp_path / "mine.csv")
    assert "mine.csv' is there and no table of predictions; choose another --out" in said
    labelled = "image,label,split\n00000.png,up,train\n"
    (tmp_path / "mine.csv").write_text(labelled)
    said = refused(capsys, ours, images, "--out", tmp_path / "mine.csv")
    assert "mine.csv' is there and no table of predictions; choose another --out" in said
    (tmp_path / "again.csv").write_text("image,label,probability_up\n00000.png,up,1\n")
    said = refused(capsys, ours, tmp_path / "again.csv", "--out", f"{tmp_path}/none/../again.csv")
    assert "again.csv' is one of the inputs, which it would replace; choose another --out" in said
    assert (tmp_path / "mine.csv").read_text() == labelled
    run = tmp_path / "run"
    shutil.copytree(ours, run / "llava-vitask", ignore=lambda _, names: [name for name in names if "safet" in name])
    (run / "stages.json").write_text("{}")
    said = refused(capsys, run, images)
    assert f"'{run}' is no checkpoint: it has no config.json and no adapter_config.json; give '{run}/llava-vi" in said
    assert "no adapter_config.json; give the output folder of a training run" in refused(capsys, tmp_path, images)
    said = refused(capsys, ours, images, *out, "--ep", "true", "--device", "cpu")
    assert "cannot be asked with exemplars, for no TSM is given" in said
    said = refused(capsys, ours, images, *out, "--calibrated", "true", "--device", "cpu")
    assert "has no calibration of task 'vitask_drawn' without exemplars" in said
    assert not (tmp_path / "p.csv").exists()
