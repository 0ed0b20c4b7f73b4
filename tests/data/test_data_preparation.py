"""What was done to a data set's images: recorded in training, compared with what is used later, in every command."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from pictures import write_task
from PIL import Image
from small_tsm import make

from vitask_plugin.cli import main
from vitask_plugin.data.comparison import Seen, check_prepared, check_together
from vitask_plugin.data.images import _said
from vitask_plugin.data.preparation import prepared
from vitask_plugin.data.sizes import sizes_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.model import read_tsm_record

LABELS = ["a", "b"]


def deep_set(folder: Path, *flags: str, task: str = "scan", side: int = 32, bits: int = 12, splits: str = "") -> Path:
    """A set of 8 images written by `vitask data folder`; in `folder`/out, which is returned."""
    generator = np.random.default_rng(side)
    for number in range(8):
        path = folder / "source" / LABELS[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        values = generator.integers(0, 2**bits, (side, side))
        Image.fromarray(values.astype(np.uint16 if bits > 8 else np.uint8)).save(path)
    words = ["--modality", "test", "--task", task, *(splits or "--val .25 --test .25").split()]
    command = ["data", "folder", str(folder / "source"), "--out", str(folder / "out"), *words, *flags]
    assert main(command) == 0
    return folder / "out"


def train_command(sets: list[Path], output: Path, val: list[Path] | None = None) -> list[str]:
    data, validation = [one / "train.json" for one in sets], [one / "val.json" for one in val or sets]
    words = ["--data", *data, "--val", *validation, "--image-folder", *(one / "images" for one in sets)]
    quick = ["--arch", "test_resnet", "--image-size", "32", "--epochs", "1", "--batch-size", "4", "--device", "cpu"]
    return ["tsm", "train", *map(str, words), "--out", str(output), *quick]


def extract_command(tsm: Path, data: Path, output: Path) -> list[str]:
    words = {"tsm": tsm, "data": data / "train.json", "image-folder": data / "images", "out": output}
    return ["tsm", "extract", *(str(word) for name, value in words.items() for word in (f"--{name}", value))]


def sentence(capsys) -> str:
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("vitask: error: ")
    return last


def of(pixels: dict | None = None, width: tuple = (28, 28), height: tuple | None = None) -> dict:
    known = {} if pixels is None else {"pixels": pixels}
    return {"width": list(width), "height": list(height or width), "images": 9, **known}


def refused(trained: dict, used: dict) -> str | None:
    try:
        check_prepared(Seen("TSM", {"task": trained}), Seen("'x.json'", {"task": used}), "go on")
    except VITaskError as error:
        return str(error)
    return None


WINDOW, SCALED = {"window": [0, 4095]}, {"max_side": 224, "resampling": "lanczos"}
LARGE, SMALL = (300, 2000), (90, 100)
UNLIKE = {
    "size": (
        of(width=(224, 224)),
        of(),
        "on 224x224 images of task 'task', those of 'x.json' are 28x28; use images like",
    ),
    "size by scaling": (of(SCALED, (224, 224)), of(SCALED), "28x28; write them with `vitask data folder --max"),
    "window": (
        of(WINDOW),
        of({"window": [-1000.5, 3000]}),
        "on images through the window 0 to 4095 of task 'task', those of 'x.json' are through the window -1000.5 to "
        "3000; write them with `vitask data folder --window 0 4095`, or go on",
    ),
    "8 bits later": (of(WINDOW), of({}), "those of 'x.json' are through no window (8-bit as they were); write them"),
    "8 bits in training": (
        of({}),
        of(WINDOW),
        "on images through no window (8-bit as they were) of task 'task', those",
    ),
    "8-bit ones that stayed as they were": (
        of(WINDOW | {"of_8_bits": False}),
        of(WINDOW | {"of_8_bits": True}),
        "on images whose 8-bit ones stayed as they were of task 'task', those of 'x.json' are such whose 8-bit ones "
        "went through the window 0 to 4095; write them with `vitask data folder --window-from` and the labels.json of",
    ),
    "half a grey level": (of(WINDOW), of({"window": [0, 4086]}), "are through the window 0 to 4086"),
    "frame": (
        of({"frame": 0}),
        of({"frame": 5}),
        "on images of frame 0 of task 'task', those of 'x.json' are of frame 5",
    ),
    "not scaled": (of(SCALED, (100, 224)), of({}, LARGE), "images scaled down to 224 pixels (lanczos) of task"),
    "scaled": (of({}, LARGE), of(SCALED, (100, 224)), "are scaled down to 224 pixels (lanczos); use images like"),
    "less": (of(SCALED, (100, 224)), of({"max_side": 512, "resampling": "lanczos"}, (300, 512)), "down to 512 pixels"),
    "resampling": (of(SCALED, (9, 224)), of({**SCALED, "resampling": "box"}, (9, 224)), "down to 224 pixels (box)"),
}
ALIKE = {
    "8-bit ones on one side alone": (of(WINDOW), of(WINDOW | {"of_8_bits": True})),
    "8-bit as they were, and a window that changes nothing": (
        of({}),
        of({"window": [0, 255], "of_8_bits": True}),
    ),
    "sizes of several": (of(width=LARGE), of()),
    "no record in training": (of(), of(WINDOW)),
    "no record later": (of(WINDOW), of()),
    "the same": (of(WINDOW | SCALED | {"frame": 2}), of(WINDOW | SCALED | {"frame": 2})),
    "less than half a grey level": (of(WINDOW), of({"window": [0, 4096]})),
    "one frame only": (of({"frame": 3}), of({})),
    "small images": (of(SCALED, (100, 224)), of({}, SMALL)),
    "small images, a limit that none reaches": (of({}, LARGE), of(SCALED, SMALL)),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_what_differs_is_refused_with_both_sides(case):
    trained, used, words = UNLIKE[case]
    assert words in refused(trained, used)


@pytest.mark.parametrize("case", ALIKE)
def test_what_is_unknown_or_makes_no_difference_is_not_refused(case):
    assert refused(*ALIKE[case]) is None


def test_tasks_of_another_name_are_compared_by_their_labels():
    """An external set has a name of its own."""
    trained = {"one": ["a", "b"], "two": ["c", "d"]}
    used = Seen("'x.json'", {"elsewhere": of(WINDOW)}, {"elsewhere": ["B", "a"]})
    check_prepared(Seen("TSM", {"two": of({})}, trained), used, "go on")
    with pytest.raises(VITaskError, match=r"no window .* of task 'one', those of 'x.json' are through the"):
        check_prepared(Seen("TSM", {"one": of({}), "two": of(WINDOW)}, trained), used, "go on")
    several = {"one": ["a", "b"], "three": ["b", "a"]}  # it may be either
    check_prepared(Seen("TSM", {"one": of({}), "three": of(WINDOW)}, several), used, "go on")
    with pytest.raises(VITaskError, match="of task 'one'"):
        check_prepared(Seen("TSM", {"one": of({}), "three": of({})}, several), used, "go on")


def test_a_tsm_and_a_vlm_of_different_windows_do_not_go_together():
    """Though of the images themselves nothing is known."""
    vlm, tsm = (
        Seen(f"{who} was trained", {"task": of(it)}, {"task": LABELS}) for who, it in (("C", WINDOW), ("T", {}))
    )
    for task, labels in (("task", LABELS), ("elsewhere", LABELS)):
        with pytest.raises(VITaskError, match=r"T was trained .* no window .* and C was trained on those that are"):
            check_together(tsm, vlm, Seen("x", {}, {task: labels}), "go on")
    check_together(tsm, vlm, Seen("x", {}, {"other": ["c", "d"]}), "go on")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> dict[str, Path]:
    """One task, written in several ways."""
    root = tmp_path_factory.mktemp("sets")
    wide = ["--window", "0", "65535"]
    made = {
        "own": deep_set(root / "own"),
        "wide": deep_set(root / "wide", *wide),
        "flat": deep_set(root / "flat", bits=8),
    }
    shutil.copytree(made["wide"], root / "moved")
    (root / "moved/labels.json").unlink()
    return {**made, "moved": root / "moved"}


@pytest.fixture(scope="module")
def tsm(sets, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("tsm") / "tsm"
    assert main(train_command([sets["own"]], output)) == 0
    return output


def test_a_tsm_records_what_its_images_were(tsm, sets):
    window = json.loads((sets["own"] / "labels.json").read_text())["pixels"]["window"]
    assert read_tsm_record(tsm)["images"] == {
        "scan": {"width": [32, 32], "height": [32, 32], "images": 4, "pixels": {"window": window}}
    }


def test_a_largest_side_is_recorded_with_its_resampling(tmp_path):
    data = deep_set(tmp_path, "--max-side", "20", bits=8)
    samples = json.loads((data / "train.json").read_text())
    images = prepared({data / "train.json": sizes_of(samples, data / "images")})
    assert images["scan"]["pixels"] == {"max_side": 20, "resampling": "lanczos"}


def test_features_of_images_through_another_window_are_refused(tsm, sets, tmp_path, capsys):
    window = json.loads((sets["own"] / "labels.json").read_text())["pixels"]["window"]
    for name, used in (("wide", "through the window 0 to 65535"), ("flat", "through no window (8-bit as they were)")):
        command = extract_command(tsm, sets[name], tmp_path / name)
        assert main(command) == 1
        found = sentence(capsys)
        assert f"was trained on images through the window {window[0]:g} to {window[1]:g} of task 'scan'" in found
        assert f"{str(sets[name] / 'train.json')!r} are {used}" in found and "--any-image-size" in found
        assert not (tmp_path / name).exists()
        assert main([*command, "--any-image-size"]) == 0
    assert main(extract_command(tsm, sets["own"], tmp_path / "own")) == 0


def test_without_its_label_set_a_data_file_is_taken_with_a_warning(tsm, sets, tmp_path, caplog):
    _said.clear()
    assert main(extract_command(tsm, sets["moved"], tmp_path / "out")) == 0
    assert "images of task 'scan' that were written with --window " in caplog.text
    assert f"no labels.json tells how those of {str(sets['moved'] / 'train.json')!r} were, so" in caplog.text


def test_features_of_images_of_another_size_than_the_tsms_are_refused(tmp_path, capsys):
    write_task(tmp_path, "one", ["red", "green", "blue"], 3).rename(tmp_path / "train.json")
    make(images={"one": of(width=(224, 224))}).save(tmp_path / "tsm")
    command = extract_command(tmp_path / "tsm", tmp_path, tmp_path / "out")
    assert main(command) == 1
    found = sentence(capsys)
    assert "was trained on 224x224 images of task 'one', those of" in found and "are 32x32" in found
    assert "--any-image-size" in found and not (tmp_path / "out").exists()
    assert main([*command, "--any-image-size"]) == 0
    make().save(tmp_path / "tsm")  # an older one, or an imported one: nothing to compare
    assert main(command) == 0


def test_files_of_one_task_have_to_agree(sets, tmp_path, capsys):
    for words in ({"sets": [sets["own"], sets["wide"]]}, {"sets": [sets["own"]], "val": [sets["wide"]]}):
        command = train_command(output=tmp_path / "tsm", **words)
        assert main(command) == 1
        found = sentence(capsys)
        assert "are through the window 0 to 65535" in found and "--any-image-size if that is meant" in found
        assert not (tmp_path / "tsm").exists()
        assert main([*command, "--any-image-size"]) == 0
        several = len(words["sets"]) > 1
        assert ("pixels" not in read_tsm_record(tmp_path / "tsm")["images"]["scan"]) == several
        shutil.rmtree(tmp_path / "tsm")


def test_of_half_known_files_of_one_task_nothing_is_recorded(sets, tmp_path, caplog):
    for number, both in enumerate([("wide", "moved"), ("moved", "wide")]):
        _said.clear()
        caplog.clear()
        assert main(train_command([sets[name] for name in both], tmp_path / f"tsm{number}")) == 0
        assert "pixels" not in read_tsm_record(tmp_path / f"tsm{number}")["images"]["scan"]
        assert "were written with --window 0 65535; no labels.json tells how those in" in caplog.text


def test_sizes_of_several_files_of_one_task_have_to_agree(sets, tmp_path, capsys):
    small = deep_set(tmp_path / "small", "--window", "0", "65535", side=24)
    command = train_command([sets["wide"], small], tmp_path / "tsm")
    assert main(command) == 1
    assert f"has 32x32 images in {str(sets['wide'] / 'train.json')!r}, and those of" in sentence(capsys)
    assert main([*command, "--any-image-size"]) == 0
    record = read_tsm_record(tmp_path / "tsm")["images"]["scan"]
    assert record == {"width": [24, 32], "height": [24, 32], "images": 8}


def test_a_largest_side_that_no_image_has_is_not_recorded(tmp_path):
    data = deep_set(tmp_path, "--max-side", "32", bits=8)
    assert json.loads((data / "labels.json").read_text())["pixels"] == {}


def mixed_set(folder: Path) -> Path:
    """Deep images, and two of 8 bits beside them."""
    for number, name in enumerate(LABELS):
        path = folder / "source" / name / "eight.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (32, 32)).astype(np.uint8)).save(path)
    return deep_set(folder)


def test_8_bit_images_follow_those_of_the_set_whose_window_is_taken(sets, tmp_path, caplog):
    """They went through a window of 12 bits, which left them 16 grey levels."""
    mixed = mixed_set(tmp_path / "mixed")
    pixels = json.loads((mixed / "labels.json").read_text())["pixels"]
    assert pixels["of_8_bits"] is False
    words = ("--window-from", str(mixed))
    external = deep_set(tmp_path / "external", *words, bits=8, splits="--val 0 --test 1")
    assert json.loads((external / "labels.json").read_text())["pixels"] == pixels
    assert "none of 8 images holds more than 8 bits, so they stay as they are" in caplog.text
    assert {int(np.asarray(Image.open(path)).max()) for path in external.rglob("*.png")} == {255}
    windowed = deep_set(tmp_path / "windowed", "--window", "50", "201", bits=8)
    assert json.loads((windowed / "labels.json").read_text())["pixels"]["of_8_bits"] is True
    both = tmp_path / "both"
    mixed_set(both)
    command = ["data", "folder", str(both / "source"), "--out", str(both / "out"), "--modality", "test"]
    assert main([*command, "--task", "scan", "--window-from", str(windowed)]) == 0
    assert json.loads((both / "out/labels.json").read_text())["pixels"] == {"window": [50, 201], "of_8_bits": True}
    values = np.asarray(Image.open(both / "source/a/eight.png")).astype(float)
    expected = ((values - 50) * 255 / 151).clip(0, 255).round()
    written = [np.asarray(Image.open(path).convert("L")) for path in both.glob("out/images/*/*.png")]
    assert len(written) == 10 and sum(np.array_equal(one, expected) for one in written) == 1


@pytest.mark.parametrize(
    "images", [{"scan": {}}, {"scan": of({"window": [5, 5]})}, {"scan": of(5)}, {"scan": of(width=("a", 2))}, [1], 5]
)
def test_a_damaged_record_is_a_sentence(images, sets, tmp_path, capsys):
    make().save(tmp_path / "tsm")
    record = json.loads((tmp_path / "tsm/tsm.json").read_text())
    (tmp_path / "tsm/tsm.json").write_text(json.dumps(record | {"images": images}))
    assert main(extract_command(tmp_path / "tsm", sets["own"], tmp_path / "out")) == 1
    assert re.search(r"tsm.json': /images.* (is missing|expected .*); copy the TSM again", sentence(capsys))


def test_only_the_label_set_of_the_task_itself_counts(sets, tmp_path, capsys):
    data = shutil.copytree(sets["own"], tmp_path / "data")
    samples = json.loads((data / "train.json").read_text())
    sizes = sizes_of(samples, data / "images")

    def found(labels: object) -> dict:
        (data / "labels.json").write_text(labels if isinstance(labels, str) else json.dumps(labels))
        return prepared({data / "train.json": sizes})["scan"]

    own = json.loads((data / "labels.json").read_text())
    assert found(own)["pixels"] == own["pixels"]
    assert "pixels" not in found(own | {"task": "another"})  # a file put together from several sets
    assert "pixels" not in found([{"id": 1}]) and "pixels" not in found({"0": "a"})  # somebody's own
    assert found(own | {"pixels": {}})["pixels"] == {}
    assert "pixels" not in found({key: value for key, value in own.items() if key != "pixels"})  # of version 0.1
    windows = ({"window": [5]}, {"window": ["a", "b"]}, {"window": [9, 1]}, {"of_8_bits": 1})
    for broken in ([], 5, *windows, {"frame": "x"}, {"max_side": None}):
        with pytest.raises(VITaskError, match=r"labels.json': /pixels.* expected .*write the data set again"):
            found(own | {"pixels": broken})
    with pytest.raises(VITaskError, match=r"labels.json"):
        found("{")


def test_a_set_to_evaluate_on_takes_the_window_of_training(sets, tmp_path, capsys):
    window = json.loads((sets["own"] / "labels.json").read_text())["pixels"]
    for name, place in (("folder", sets["own"]), ("file", sets["own"] / "labels.json")):
        words = ("--window-from", str(place))
        data = deep_set(tmp_path / name, *words, task="external", side=40, splits="--val 0 --test 1")
        assert json.loads((data / "labels.json").read_text())["pixels"] == window
    command = ["data", "folder", str(tmp_path / "file/source"), "--out", str(tmp_path / "again"), "--modality", "test"]
    wrong = {
        str(sets["flat"]): "records no window: that set is 8-bit as it was; give --window LOW HIGH",
        str(sets["own"] / "train.json"): "is no label set; give the labels.json",
        str(tmp_path / "nowhere"): "does not exist",
    }
    for place, words in wrong.items():
        assert main([*command, "--window-from", place]) == 1
        assert words in sentence(capsys)
    with pytest.raises(SystemExit):
        main([*command, "--window-from", str(sets["own"]), "--window", "0", "1"])
    assert "not allowed with" in capsys.readouterr().err and not (tmp_path / "again").exists()
