"""Training the TSM: several tasks at once, the best checkpoint, an early stop, an interrupt, and bad input."""

import io
import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import png16, write_task
from PIL import Image

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.augmentation import mirrored
from vitask_plugin.tsm.fitting import Fit
from vitask_plugin.tsm.model import TSM
from vitask_plugin.tsm.optimization import rate_factor
from vitask_plugin.tsm.train import Settings, train

QUICK = {"arch": "test_resnet", "image_size": 32, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks of three and two classes, one multi-label task, in two image folders."""
    root = tmp_path_factory.mktemp("data")
    for split, count in (("train", 33), ("val", 12)):
        write_task(root / "a", "three", ["red", "green", "blue"], count, split=split)
        write_task(root / "a", "several", ["red", "green", "blue"], count, split=split, multi_label=True)
        write_task(root / "b", "two", ["blue", "grey"], count, split=split)
    return root


def files(data: Path, split: str) -> list[Path]:
    return [data / "a" / f"three-{split}.json", data / "b" / f"two-{split}.json", data / "a" / f"several-{split}.json"]


def folders(data: Path) -> list[Path]:
    return [data / "a" / "images", data / "b" / "images", data / "a" / "images"]


def run(data: Path, output: Path, **settings) -> TSM:
    return train(Settings(**(QUICK | settings)), files(data, "train"), files(data, "val"), folders(data), output)


def accuracy(tsm: TSM, path: Path, folder: Path) -> float:
    """Of single-label tasks, image by image from the files: no code of the trainer's."""
    right = []
    for row in json.loads(path.read_text()):
        pixels = tsm.preprocess(Image.open(folder / row["image"]))[None]
        probabilities = tsm.probabilities(tsm(pixels).logits, row["vitask"]["task"])
        right.append(int(probabilities.argmax()) == row["vitask"]["label"])
    return float(np.mean(right))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[TSM, Path]:
    output = tmp_path_factory.mktemp("trained") / "tsm"
    return run(data, output, epochs=6), output


def test_three_tasks_are_learnt_together(data, trained):
    tsm, output = trained
    assert list(tsm.record["tasks"]) == ["three", "two", "several"]
    assert tsm.record["images"]["two"] == {"width": [32, 32], "height": [32, 32], "images": 33}
    assert tsm.record["tasks"]["several"] == {
        "choices": ["red", "green", "blue"],
        "multi_label": True,
        "first_column": 5,
    }
    assert TSM.load(output).hash == tsm.hash
    metrics = json.loads((output / "metrics.json").read_text())
    best = metrics["best"]["val_accuracy_by_task"]
    assert best["three"] == pytest.approx(accuracy(tsm, data / "a/three-val.json", data / "a/images"))
    assert best["two"] == pytest.approx(accuracy(tsm, data / "b/two-val.json", data / "b/images"))
    assert best["three"] > 0.9 and best["two"] > 0.9 and best["several"] > 0.6
    assert metrics["best"]["val_accuracy"] == max(entry["val_accuracy"] for entry in metrics["history"])
    assert metrics["best"]["val_accuracy"] == pytest.approx(sum(best.values()) / 3)
    assert len(metrics["history"]) == 6 and metrics["stopped"] == "finished"
    assert metrics["settings"]["arch"] == "test_resnet"


def test_same_seed_same_weights_and_the_callers_random_state_is_left_alone(data, trained, tmp_path):
    state = torch.random.get_rng_state()
    again = run(data, tmp_path / "again", epochs=6, workers=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert again.hash == trained[0].hash
    assert run(data, tmp_path / "other", epochs=1, seed=1).hash != run(data, tmp_path / "one", epochs=1).hash


class Script:
    """Stands in for the validation, with accuracies and losses of our choice, and remembers the weights it saw."""

    def __init__(self, monkeypatch, outcomes: list[tuple[float, float] | type[BaseException]]) -> None:
        self.outcomes, self.weights = outcomes, []
        monkeypatch.setattr(Fit, "_judged", lambda fit, network: self(network))

    def __call__(self, network):
        outcome = self.outcomes[len(self.weights)]
        if not isinstance(outcome, tuple):
            raise outcome
        self.weights.append({name: value.clone() for name, value in network.state_dict().items()})
        return {"val_accuracy": outcome[0], "val_loss": outcome[1], "val_accuracy_by_task": {}}

    def chosen(self, tsm: TSM) -> list[int]:
        """Which epochs (from 0) the TSM has the weights of."""
        kept = tsm.backbone.network.state_dict()
        return [e for e, seen in enumerate(self.weights) if all(torch.equal(kept[n], v) for n, v in seen.items())]


@pytest.mark.parametrize(
    ("outcomes", "best"),
    [
        ([(0.2, 1.0), (0.9, 1.0), (0.5, 0.1)], 1),
        ([(0.5, 1.0), (0.5, 0.4), (0.5, 0.7)], 1),  # of equals the lowest loss
        ([(0.5, 1.0), (0.5, 1.0), (0.4, 0.1)], 0),  # of full equals the first
        ([(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)], 2),
    ],
)
def test_the_best_epoch_is_kept(data, tmp_path, monkeypatch, outcomes, best):
    script = Script(monkeypatch, outcomes)
    tsm = run(data, tmp_path / "tsm", epochs=3)
    assert script.chosen(tsm) == [best]
    assert script.chosen(TSM.load(tmp_path / "tsm")) == [best]
    assert json.loads((tmp_path / "tsm" / "metrics.json").read_text())["best"]["epoch"] == best + 1


def test_early_stop(data, tmp_path, monkeypatch):
    script = Script(monkeypatch, [(0.5, 1.0), (0.6, 1.0), (0.5, 1.0), (0.6, 1.0), (0.9, 1.0)])
    tsm = run(data, tmp_path / "tsm", epochs=5, patience=2)
    assert len(script.weights) == 4 and script.chosen(tsm) == [1]
    assert json.loads((tmp_path / "tsm" / "metrics.json").read_text())["stopped"] == "early"


def test_an_interrupt_keeps_the_best_so_far(data, tmp_path, monkeypatch):
    script = Script(monkeypatch, [(0.6, 1.0), (0.5, 1.0), KeyboardInterrupt])
    tsm = run(data, tmp_path / "tsm", epochs=5)
    assert script.chosen(tsm) == [0] and TSM.load(tmp_path / "tsm").hash == tsm.hash
    assert json.loads((tmp_path / "tsm" / "metrics.json").read_text())["stopped"] == "interrupted"


def test_an_interrupt_before_anything_was_learnt_leaves_nothing(data, tmp_path, monkeypatch):
    Script(monkeypatch, [KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        run(data, tmp_path / "tsm", epochs=2)
    assert os.listdir(tmp_path) == []


def test_flips_change_the_training_and_nothing_else(data, tmp_path):
    plain = run(data, tmp_path / "plain", epochs=1)
    assert run(data, tmp_path / "flip", epochs=1, flip="horizontal").hash != plain.hash
    pixels = torch.randn(64, 3, 4, 4)
    variants = [pixels, pixels.flip(3), pixels.flip(2), pixels.flip(2, 3)]
    flipped = mirrored(pixels, Settings(**QUICK, flip="both").flips)
    kinds = [next(k for k, v in enumerate(variants) if torch.equal(v[i], flipped[i])) for i in range(64)]
    assert set(kinds) == {0, 1, 2, 3}


def test_a_last_batch_of_one_image_does_not_break_batch_normalisation(data, tmp_path):
    # 33 images in batches of 16; a network whose last feature map is 1x1 has one value per channel then.
    settings = Settings(**(QUICK | {"arch": "test_efficientnet"}), epochs=1)
    tsm = train(settings, files(data, "train")[:1], files(data, "val")[:1], [data / "a/images"], tmp_path / "tsm")
    assert tsm.hash == TSM.load(tmp_path / "tsm").hash


def test_the_learning_rate_warms_up_and_falls():
    factors = [rate_factor(step, steps=100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert all(left >= right for left, right in itertools.pairwise(factors[9:]))
    assert factors[-1] < 0.001
    assert [rate_factor(0, steps=1), rate_factor(1, steps=2)] == [1.0, 1.0]


def command(data: Path, output: Path, **changes: list[str]) -> list[str]:
    flags = {
        "data": [str(path) for path in files(data, "train")],
        "val": [str(path) for path in files(data, "val")],
        "image-folder": [str(path) for path in folders(data)],
        "arch": ["test_resnet"],
        "image-size": ["32"],
        "epochs": ["1"],
        "device": ["cpu"],
        "out": [str(output)],
    }
    flags |= {name.replace("_", "-"): values for name, values in changes.items()}
    return ["tsm", "train", *(word for name, values in flags.items() for word in (f"--{name}", *values))]


def test_the_command(data, tmp_path, capsys):
    assert main(command(data, tmp_path / "tsm", patience=["3"], flip=["horizontal"])) == 0
    assert sorted(os.listdir(tmp_path / "tsm")) == ["log.jsonl", "metrics.json", "tsm.json", "tsm.safetensors"]
    assert f"TSM {TSM.load(tmp_path / 'tsm').hash[:12]} in" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"arch": ["resnet8"]}, "timm has no model 'resnet8'; did you mean"),
        ({"arch": ["test_vit"], "image_size": ["28"]}, "patches of 16 pixels, which does not divide --image-size 28"),
        ({"epochs": ["0"]}, "--epochs is 0; it must be at least 1"),
        ({"batch_size": ["1"]}, "--batch-size is 1; it must be at least 2"),
        ({"lr": ["-1"]}, "--lr is -1.0; it must be positive"),
        ({"lr": ["1e30"]}, "the TSM's loss is "),
        ({"device": ["cuda:77"]}, "--device cuda:77 is not usable here"),
        ({"device": ["abacus"]}, "--device abacus is not usable here"),
        ({"val": []}, None),
    ],
)
def test_bad_settings(data, tmp_path, capsys, changes, sentence):
    if sentence is None:
        with pytest.raises(SystemExit):
            main(command(data, tmp_path / "tsm", **changes))
        return
    epochs = {} if "epochs" in changes else {"epochs": ["3"]}
    assert main(command(data, tmp_path / "tsm", **epochs, **changes)) == 1
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]
    assert os.listdir(tmp_path) == []


def edited(data: Path, path: Path, edit) -> Path:
    rows = json.loads((data / "a/three-train.json").read_text())
    edit(rows)
    path.write_text(json.dumps(rows))
    return path


def test_bad_data(data, tmp_path):
    out, images = tmp_path / "tsm", [data / "a/images"]
    val = [data / "a/three-val.json"]

    def attempt(train_file, val_files=val, image_folders=images):
        with pytest.raises(VITaskError) as caught:
            train(Settings(**QUICK, epochs=1), [train_file], val_files, image_folders, out)
        assert not out.exists() and not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        return str(caught.value)

    def one_class(rows):
        rows[:] = [row for row in rows if row["vitask"]["label"] == 1]

    assert "every sample of task 'three' has the answer 'green.'" in attempt(
        edited(data, tmp_path / "1.json", one_class)
    )

    def gone(rows):
        rows[4]["image"] = "three-train/gone.png"

    assert "sample 'three-train-4': there is no image" in attempt(edited(data, tmp_path / "2.json", gone))

    def outside(rows):
        rows[4]["image"] = "../three-train.json"

    message = attempt(edited(data, tmp_path / "3.json", outside))
    assert "3.json', sample 'three-train-4': image path" in message and "leaves the image folder" in message

    def no_image(rows):
        rows[4]["image"] = "notes.png"

    (data / "a/images/notes.png").write_text("not a picture")
    message = attempt(edited(data, tmp_path / "4.json", no_image))
    assert "notes.png' cannot be read (not an image of a known format)" in message

    def reordered(rows):
        for row in rows:
            row["vitask"]["choices"] = ["green", "red", "blue"]
            row["vitask"]["label"] = [1, 0, 2][row["vitask"]["label"]]

    assert "two different label sets" in attempt(edited(data, tmp_path / "5.json", reordered))

    good = data / "a/three-train.json"
    message = attempt(good, [data / "b/two-val.json"], [data / "b/images"])
    assert "there is no image" in message
    message = attempt(good, val, [data / "a/images", data / "b/images"])
    assert "1 data files but 2 image folders; give one for all or one for each" in message
    both = [data / "a/three-val.json", data / "a/several-val.json"]
    assert "training data has the tasks ['three'], the validation data ['several', 'three']" in attempt(good, both)


def changed(data: Path, folder: Path, change) -> Path:
    """A copy of a task's training data, `change(picture, number)` in place of each picture; in the folder's parent."""
    rows = json.loads((data / "a/three-train.json").read_text())
    for number, row in enumerate(rows):
        path = folder / row["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(data / "a/images" / row["image"]) as picture:
            path.write_bytes(change(picture.convert("RGB"), number))
        row["image"] = f"{folder.name}/{row['image']}"
    (folder / "train.json").write_text(json.dumps(rows))
    return folder / "train.json"


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_images_with_nothing_or_little_to_see(data, tmp_path, caplog):
    """Such a training ended well, with an accuracy as good as chance."""
    black = changed(data, tmp_path / "black", lambda picture, _: as_png(Image.new("RGB", picture.size)))
    few = changed(data, tmp_path / "few", lambda picture, _: as_png(picture.point(lambda value: value // 16)))
    settings, out = Settings(**QUICK, epochs=1), tmp_path / "tsm"
    with pytest.raises(
        VITaskError, match=r"^training data, task 'three': all \d+ images are of one colour, RGB \(0, 0"
    ):
        train(settings, [black], [few], [tmp_path], out)
    assert not out.exists()
    train(settings, [few], [black], [tmp_path], out)
    assert re.search(r"training data, task 'three': (\d+) of \1 images keep fewer than 32 of 256 grey", caplog.text)
    assert "validation data, task 'three': all " in caplog.text


def test_16_bits_per_colour_need_a_window(data, tmp_path):
    """The upper 8 bits were trained on without a word."""

    def deepened(picture: Image.Image, number: int) -> bytes:
        return png16(np.asarray(picture).astype(np.uint16) * 16) if number else as_png(picture)

    path = changed(data, tmp_path / "deep", deepened)
    with pytest.raises(VITaskError, match=r"\.png' holds uint16 values \(.*; mode RGB, 16 bits per colour\), and no"):
        train(Settings(**QUICK, epochs=1), [path], [path], [tmp_path], tmp_path / "tsm")


def test_an_older_tsm_survives_a_failure(data, trained, tmp_path):
    trained[0].save(tmp_path / "tsm")
    with pytest.raises(VITaskError, match="the TSM's loss is"):
        run(data, tmp_path / "tsm", epochs=3, lr=1e30)
    assert TSM.load(tmp_path / "tsm").hash == trained[0].hash


def test_tasks_with_the_same_labels_share_their_columns(tmp_path, capsys):
    for task in ("axial", "coronal"):
        for split, count in (("train", 9), ("val", 6)):
            write_task(tmp_path, task, ["red", "green", "blue"], count, split=split)
    command = ["tsm", "train", "--arch", "test_resnet", "--image-size", "32", "--epochs", "1", "--device", "cpu"]
    command += ["--image-folder", str(tmp_path / "images"), "--batch-size", "4"]
    for flag, split in (("--data", "train"), ("--val", "val")):
        command += [flag, *(str(tmp_path / f"{task}-{split}.json") for task in ("axial", "coronal"))]
    assert main([*command, "--out", str(tmp_path / "shared")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "have the same labels" in line]
    assert len(said) == 1 and said[0].startswith("tasks axial, coronal have the same labels in the same order")
    assert main([*command, "--out", str(tmp_path / "separate"), "--separate-heads"]) == 0
    assert "same labels" not in capsys.readouterr().out
    shared, separate = TSM.load(tmp_path / "shared"), TSM.load(tmp_path / "separate")
    assert shared.columns("axial") == shared.columns("coronal") == slice(0, 3)
    assert separate.columns("axial") == slice(0, 3) and separate.columns("coronal") == slice(3, 6)
    pixels = torch.randn(2, 3, 32, 32)
    assert [tsm(pixels).logits.shape[1] for tsm in (shared, separate)] == [3, 6]
    logits = shared(pixels).logits
    assert torch.equal(shared.probabilities(logits, "axial"), shared.probabilities(logits, "coronal"))
