"""Wrong paths in any command: one sentence and status 1, whatever stands where a file or a folder should."""

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
    with pytest.raises(VITaskError, match="type 'llama'; upstream takes CLIP"):
        paths.check(good | {"vision_tower": str(tiny_llava.base)})
    with pytest.raises(VITaskError, match="--vitask_tsm is empty"):
        paths.check(good | {"vitask_tsm": ""})


def test_an_unset_variable_is_said(tmp_path, capsys) -> None:
    assert cli.main(["tsm", "extract", "--tsm", "t", "--data", "d", "--image-folder", str(tmp_path), "--out="]) == 1
    assert "nothing is given after '--out='" in capsys.readouterr().err
