"""Wrong paths in any command: one sentence and status 1, whatever stands where a file or a folder should."""

import argparse
import importlib
import shutil
from pathlib import Path

import pytest
from trained import make_tsm

from vitask_plugin import cli
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava import paths

WRONG = ("absent", "file.txt", "folder", "", "object.json", "bytes", "file.txt/below")
# A command with right words, in capitals those of `right`, and the words to put wrong ones in the place of.
COMMANDS = [
    ("data medmnist --task drawn --out OUT", "OUT"),
    ("data folder SOURCE --modality x --out OUT", "SOURCE OUT"),
    ("data folder CSV --modality x --val 0 --test 0 --out OUT --image-folder IMAGES", "IMAGES"),
    (
        "tsm train --arch test_vit --image-size 32 --data JSON --val VAL --image-folder IMAGES --out OUT",
        "JSON VAL IMAGES OUT",
    ),
    ("tsm extract --tsm TSM --data JSON --image-folder IMAGES --out OUT", "TSM JSON IMAGES OUT"),
    ("tsm import --arch test_vit --image-size 32 --checkpoint WEIGHTS --data JSON --out OUT", "WEIGHTS JSON OUT"),
    ("connector fit --checkpoint CKPT --tsm TSM --data JSON --image-folder IMAGES --out OUT", "CKPT OUT"),
    (
        "connector align --checkpoint CKPT --from-tsm TSM --tsm TSM --data JSON --image-folder IMAGES --out OUT",
        "CKPT OUT",
    ),
    ("calibrate CKPT --data VAL --image-folder IMAGES --device cpu", "CKPT VAL IMAGES"),
    ("export --to hf CKPT OUT", "CKPT OUT"),
    ("merge CKPT OUT", "CKPT OUT"),
    ("report RESULTS --out PAGE", "RESULTS PAGE"),
    ("patch LLAVA", "LLAVA"),
    ("deepspeed-config NAME", "NAME"),
    ("estimate-memory --model MODEL", "MODEL"),
]
CASES = [(command, word, wrong) for command, words in COMMANDS for word in words.split() for wrong in WRONG]


@pytest.fixture(scope="module")
def wrong_paths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What may stand where something else should. Read only."""
    directory = tmp_path_factory.mktemp("wrong")
    (directory / "file.txt").write_text("not what was asked for")
    (directory / "object.json").write_text("{}")
    (directory / "bytes").write_bytes(bytes(range(256)))
    (directory / "folder").mkdir()
    (directory / "folder/other").write_text("of somebody else")
    return directory


@pytest.fixture(scope="module")
def right(tmp_path_factory, drawn_data, tiny_checkpoint) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("right")
    make_tsm(directory / "tsm")
    (directory / "list.csv").write_text("image,label\na.png,a\nb.png,b\n")
    for number, image in enumerate(sorted((drawn_data / "images/train").iterdir())[:12]):
        (directory / f"source/{'ab'[number % 2]}").mkdir(parents=True, exist_ok=True)
        shutil.copy(image, directory / f"source/{'ab'[number % 2]}")
    found = {
        "SOURCE": directory / "source",
        "JSON": drawn_data / "train.json",
        "VAL": drawn_data / "val.json",
        "IMAGES": drawn_data / "images",
        "CKPT": tiny_checkpoint,
        "TSM": directory / "tsm",
        "WEIGHTS": directory / "tsm/tsm.safetensors",
        "CSV": directory / "list.csv",
        "OUT": directory / "out",
        "PAGE": directory / "page.html",
    }
    return {name: str(path) for name, path in found.items()}


@pytest.mark.parametrize(("command", "word", "wrong"), CASES)
def test_a_wrong_path_is_one_sentence(command, word, wrong, right, wrong_paths, drawn_root, monkeypatch, capsys):
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    if word == "OUT" and wrong == "absent":
        return  # that is what it should be
    given = wrong and str(wrong_paths / wrong)
    words = [given if each == word else right.get(each, each) for each in command.split()]
    assert cli.main(words) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vitask: error: ")]
    assert len(lines) == 1
    assert (given or "nothing is given after") in lines[0] or command.startswith("connector"), lines
    assert not Path(right["OUT"]).exists()


RUN = "run --medmnist drawn --model tiny --device cpu --out OUT"
OUTPUTS = [command for command, words in COMMANDS if "OUT" in command.split() or "--out" in command.split()]


@pytest.mark.parametrize("place", ["file.txt/below/out", "/proc/below/out", f"folder/{'x' * 300}/out"])
@pytest.mark.parametrize("command", [*OUTPUTS, "demo --out OUT", RUN])
def test_a_place_that_cannot_be_written_is_refused_before_any_work(command, place, wrong_paths, capsys):
    """Nothing else that was given exists, so a look at it, before the place, would be the sentence."""
    out = str(wrong_paths / place)
    fixed = {"SOURCE": "absent", "OUT": out, "PAGE": f"{out}.html"}
    words = [fixed.get(word, "absent" if word.isupper() else word) for word in command.split()]
    assert cli.main(words) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("vitask: error: "))
    assert f"{fixed['PAGE' if 'PAGE' in command else 'OUT']!r} cannot be written, for " in line
    assert [path.name for path in (wrong_paths / "folder").iterdir()] == ["other"]


NUMBERS = {
    "data medmnist --task drawn --out OUT": ["--limit -1", "--limit 0"],
    "data folder SOURCE --modality x --out OUT": [
        *("--seed -1", "--seed 4294967296", "--frame -1", "--max-side 0", "--val -1", "--val nan", "--test 2"),
        *("--window 1 nan", "--window 2 1"),
    ],
    "tsm train --arch test_vit --image-size 32 --data JSON --val VAL --image-folder IMAGES --out OUT": [
        *("--epochs -1", "--epochs 0", "--batch-size 0", "--patience -1", "--workers -1", "--image-size 0"),
        *(
            "--lr nan",
            "--lr 0",
            "--lr inf",
            "--weight-decay nan",
            "--weight-decay inf",
            "--weight-decay -1",
            "--seed -1",
        ),
        f"--seed {10**30}",
        *("--drop 1", "--drop-path -0.1", "--layer-decay 0", "--layer-decay 2", "--warmup-epochs -1", "--min-lr nan"),
        *("--decay-epochs 0", "--decay-rate 0", "--smoothing 1", "--model-ema-decay 1", "--hflip 2", "--vflip nan"),
        *("--color-jitter -1", "--scale 0 1", "--scale 1 0.5", "--reprob 2", "--mixup -1", "--cutmix inf"),
        *("--folds 1", "--folds -1"),
    ],
    "tsm extract --tsm TSM --data JSON --image-folder IMAGES --out OUT": [
        *("--workers -1", "--batch-size 0", "--batch-size -1", f"--batch-size {10**30}")
    ],
    "tsm evaluate --tsm TSM --data VAL --split val --image-folder IMAGES --out OUT": [
        *("--workers -1", "--batch-size 0", "--batch-size -1", f"--batch-size {10**30}", "--limit -1", "--limit 0")
    ],
    "predict CKPT IMAGES --out OUT": [
        *("--batch-size 0", "--processes 0", "--window nan 1", "--window 2 1", "--frame -1")
    ],
    "serve CKPT": ["--port -1", "--port 65536", "--window 1 inf", "--window 2 1", "--frame -1"],
    "tsm import --arch test_vit --image-size 32 --checkpoint WEIGHTS --data JSON --out OUT": [
        *("--image-size 0", "--image-size -1", "--mean nan 0 0", "--std 0 1 1", "--std 1 nan 1", "--std 1 1 inf")
    ],
    "connector fit --checkpoint CKPT --tsm TSM --data JSON --image-folder IMAGES --out OUT": [
        *("--steps 0", "--batch-size -1", "--workers -1", "--seed -1", "--learning-rate nan", "--learning-rate -1")
    ],
    "connector align --checkpoint CKPT --from-tsm TSM --tsm TSM --data JSON --image-folder IMAGES --out OUT": [
        *("--batch-size 0", "--workers -1")
    ],
    "calibrate CKPT --data VAL --image-folder IMAGES": [
        *("--sensitivity 0", "--sensitivity 1.5", "--specificity nan", "--error-rate -0.1", "--error-rate 2"),
        "--batch-size 0",
    ],
    "report RESULTS --out PAGE": ["--errors -1"],
    "run --images SOURCE --modality x --model tiny --out OUT": [
        *("--seed -1", "--seed 4294967296", "--val -1", "--val nan", "--test 2", "--processes 0", "--nodes -1")
    ],
    "demo --out OUT": ["--seed -1", "--seed 4294967296", "--epochs 0", "--epochs -1"],
    "estimate-memory --model 7b": [
        *("--gpus-per-node 0", "--nodes -1", "--lora-r 0", "--batch-size 0", "--tokens 0 5 2", "--tokens 5 5 -2")
    ],
}


@pytest.mark.parametrize(("command", "number"), [(each, number) for each, own in NUMBERS.items() for number in own])
def test_a_number_out_of_range_is_one_sentence(command, number, right, drawn_root, monkeypatch, capsys):
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))
    option, *values = number.split()
    assert cli.main([*(right.get(word, word) for word in command.split()), option, *values]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("vitask: error: "))
    assert option in line and not Path(right["OUT"]).exists()


def test_every_option_with_a_number_is_tried() -> None:
    """A new one has to be put into `NUMBERS`."""
    for path, module, _ in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(module).configure(parser)
        numeric = {name for each in parser._actions if each.type in (int, float) for name in each.option_strings}
        tried = [own for command, own in NUMBERS.items() if command.startswith(" ".join(path))]
        tried = {number.split()[0] for own in tried for number in own}
        assert numeric - tried - {"--size"} == set(), path  # that one has choices


def test_training_names_each_wrong_path(wrong_paths, drawn_data, tiny_llava) -> None:
    data, images = str(drawn_data / "train.json"), str(drawn_data / "images")
    good = {"data_path": data, "image_folder": images, "vision_tower": str(tiny_llava.tower)}
    good |= {"model_name_or_path": str(tiny_llava.base), "pretrain_mm_mlp_adapter": str(tiny_llava.projector)}
    paths.check(good)
    paths.check(good | {"vision_tower": "openai/clip-vit-large-patch14-336", "model_name_or_path": "org/model"})
    for name in ("data_path", "image_folder"):
        with pytest.raises(VITaskError, match=f"needs --{name} .+ left out"):
            paths.check({other: value for other, value in good.items() if other != name})
    for name, value, words in (
        ("data_path", "folder", "is a folder; give a file"),
        ("data_path", "absent", "does not exist"),
        ("image_folder", "file.txt", "is a file; give a folder"),
        ("image_folder", "absent", "does not exist"),
        ("vision_tower", "absent", "does not exist"),
        ("vision_tower", "folder", "no config.json"),
        ("model_name_or_path", "file.txt", "is a file"),
        ("pretrain_mm_mlp_adapter", "object.json", "cannot be read"),
        ("vitask_tsm", "object.json", "is a file"),
        ("vitask_features", "absent", "does not exist"),
    ):
        with pytest.raises(VITaskError, match=words):
            paths.check(good | {name: str(wrong_paths / value)})
    with pytest.raises(VITaskError, match="is of model_type llama, and upstream loads every tower as CLIP"):
        paths.check(good | {"vision_tower": str(tiny_llava.base)})
    with pytest.raises(VITaskError, match="--vitask_tsm is empty"):
        paths.check(good | {"vitask_tsm": ""})


def test_an_unset_variable_is_said(tmp_path, capsys) -> None:
    assert cli.main(["tsm", "extract", "--tsm", "t", "--data", "d", "--image-folder", str(tmp_path), "--out="]) == 1
    assert "nothing is given after '--out='" in capsys.readouterr().err
