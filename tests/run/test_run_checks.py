"""Bad recipes end `vitask run` with one sentence, before anything is written."""

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
from whole_runs import draw_folder

from vitask_plugin.cli import main
from vitask_plugin.run.checks import _check_training
from vitask_plugin.run.lock import locked
from vitask_plugin.run.recipe_file import parsed

SCANS = {"images": "scans", "modality": "MRI"}


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """The one sentence of a recipe that is refused, in a folder with labelled images `scans`."""
    draw_folder(tmp_path / "scans", 1)
    monkeypatch.chdir(tmp_path)

    def of(values: dict, *words: str) -> str:
        recipe = {"model": "tiny", "out": "out", "data": [SCANS], "launch": {"device": "cpu"}, **values}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        before = sorted(os.listdir(tmp_path))
        assert main(["run", "recipe.yaml", *words]) == 1
        assert sorted(os.listdir(tmp_path)) == before
        lines = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in lines if line.startswith("vitask: error: ")]
        assert len(errors) == 1 and lines[-1] == errors[0]
        return errors[0]

    return of


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"model": None}, "model is not given"),
        ({"out": None}, "out is not given"),
        ({"data": []}, "data is not given"),
        ({"data": [{"modality": "MRI"}]}, "data.0 has no images"),
        ({"data": [{**SCANS, "medmnist": "breast"}]}, "data.0.images and data.0.medmnist contradict each other"),
        ({"data": [{"medmnist": "breast", "labels": ["a", "b"]}]}, "data.0.labels and data.0.medmnist contradict"),
        ({"data": [{"medmnist": "brest"}]}, "data set 'brest' is unknown; choose one of bloodmnist"),
        ({"data": [{"medmnist": "breast", "size": 30}]}, "data.0.size is '30'; it must be one of 28, 64, 128, 224"),
        ({"data": [{**SCANS, "size": 28}]}, "data.0.size and data.0.images contradict each other"),
        ({"data": [{"images": "scan", "modality": "MRI"}]}, "data.0.images 'scan' does not exist"),
        ({"data": [{"images": "scans"}]}, "data.0.modality is not given"),
        ({"data": [{**SCANS, "val": 0.5, "test": 0.5}]}, "leave something for the training"),
        ({"data": [SCANS, SCANS]}, "data.0 and data.1 are both called 'scans'"),
        (
            {"data": [{**SCANS, "flags": {"frames": 2}}]},
            "data.0.flags.frames is no flag of `vitask data folder`; the nearest",
        ),
        ({"data": [{**SCANS, "flags": {"group-pattern": "a"}}]}, "data.0.flags.group-pattern and data.0.group_pattern"),
        ({"tsm": {"flags": {"epochs": 3}}}, "tsm.flags.epochs and tsm.epochs contradict each other"),
        ({"tsm": {"flags": {"epoch": 3}}}, "tsm.flags.epoch is no flag of `vitask tsm train`; the nearest known one"),
        ({"tsm": {"flags": {"flip": "up"}}}, "`vitask tsm train` does not take it: argument --flip: invalid choice"),
        ({"model": "models/nothing"}, "model 'models/nothing' does not exist"),
        ({"model": "models/a,b"}, "model 'models/a,b' holds a comma"),
        ({"model": "scans"}, "model 'scans' is no vision-language model"),
        (
            {"data": [{"medmnist": "breastmnist", "drop_duplicates": True, "allow_duplicates": True}]},
            "data.0.drop_duplicates and data.0.allow_duplicates contradict each other",
        ),
        ({"host": "lava"}, "host is 'lava'; it must be one of llava, hf; the nearest is 'llava'"),
        ({"tsm": {"folder": "scans", "epochs": 3}}, "tsm.epochs and tsm.folder contradict each other"),
        ({"training": {"precision": "bf17"}}, "training.precision is 'bf17'"),
        ({"launch": {"at_once": 2, "nodes": 2}}, "launch.at_once: 2 and launch.nodes: 2 contradict each other"),
        (
            {"launch": {"at_once": 3, "deepspeed": "zero2"}},
            "launch.at_once: 3 and launch.deepspeed: zero2 contradict each other: two trainings",
        ),
        ({"launch": {"at_once": 0}}, "launch.at_once is 0"),
        ({"training": {"vanilla_epochs": 2}}, "training.vanilla_epochs and baseline: false contradict"),
        (
            {"training": {"flags": {"learning_rate": 1e-4}}},
            "training.flags.learning_rate and training.learning_rate contradict",
        ),
        ({"training": {"flags": {"vitask_rda_wait": 1}}}, "the nearest known one is 'vitask_rda_weight'"),
        ({"training": {"flags": {"warmup_ration": 0.1}}}, "the nearest known one is 'warmup_ratio'"),
        ({"training": {"flags": {"vitask_ep": "al"}}}, "invalid choice: 'al'"),
        ({"training": {"flags": {"vitask_rda_weight": "abc"}}}, "invalid float value: 'abc'"),
        ({"training": {"flags": {"vitask_rda_weight": -1}}}, "--vitask_rda_weight is -1.0; it must be 0 (off)"),
        ({"training": {"flags": {"eval_strategy": "banana"}}}, "training.flags.eval_strategy is 'banana'; it must be"),
        ({"training": {"flags": {"eval_strategy": "steps"}}}, "does not go with --eval_strategy steps"),
        (
            {"training": {"flags": {"vitask_eval_data": "nothere.json", "eval_strategy": "steps"}}},
            "training.flags.vitask_eval_data 'nothere.json' is no file",
        ),
        ({"data": [{**SCANS, "name": "images"}, SCANS]}, "data.0 is called 'images', .*; give it a name"),
        ({"evaluate": {"splits": ["train"]}}, "evaluate.splits is 'train'; it must be one of val, test"),
        ({"evaluate": {"splits": ["val", "val"]}}, "name each split once"),
        ({"launch": {"device": "gpu"}}, "launch.device is 'gpu'; it must be one of auto, cuda, cpu"),
        ({"launch": {"device": "cpu", "deepspeed": "zero4"}}, "launch.deepspeed is 'zero4'; it must be one of zero2"),
        ({"launch": {"device": "cpu", "nodes": 2}}, "launch.nodes is 2, and this is no Slurm job"),
        (
            {"launch": {"device": "cuda", "processes": 999}},
            "launch.processes is 999, one for each GPU",
        ),
        (
            {"launch": {"device": "auto", "processes": 999}},
            "launch.processes is 999, one for each GPU",
        ),
        ({"out": "a,b"}, "holds a comma"),
        ({"out": "scans"}, "out '.*scans' already holds 'across', which is not of an earlier run"),
        ({"out": "recipe.yaml"}, "is a file"),
        ({"tsm": {"arch": "resnet10"}}, "timm has no model 'resnet10'; did you mean resnet10t"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_one_sentence(values, sentence, refused, monkeypatch) -> None:
    import re

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = refused(values)
    assert re.search(sentence, found) or sentence in found


@pytest.mark.parametrize("host", ["llava", "hf"])
def test_flags_that_the_trainings_take_pass(host, tmp_path) -> None:
    (tmp_path / "val.json").touch()
    watched = {"vitask_eval_data": str(tmp_path / "val.json"), "eval_strategy": "steps", "eval_steps": 5}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "vitask_eval_samples": 20}
    for given in (
        {"vitask_rda_weight": 2.0, "warmup_ratio": 0.1, "lr_scheduler_type": "constant", "vitask_ep": "text"},
        {**watched, **best, "optim": "adamw_torch", "dataloader_num_workers": 2, "max_grad_norm": 0.5},
        {"vitask_ep": "learned", "vitask_class_balance": 0.5, "logging_steps": 7, "max_steps": 3},
        {"vitask_eval_data": "out/data/scans/val.json", "eval_strategy": "epoch"},
    ):
        values = {"model": "tiny", "host": host, "out": "out", "training": {"flags": given}}
        _check_training(parsed(values))


def test_a_model_of_the_other_host(refused, tmp_path) -> None:
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen/config.json").write_text(json.dumps({"vision_config": {}, "text_config": {}}))
    assert "'qwen' is a model of host hf, not of llava" in refused({"model": "qwen", "host": "llava"})


def test_a_disk_that_is_too_small_for_the_features(refused, monkeypatch) -> None:
    """4 images of 512 numbers of 4 bytes are 8,192 bytes."""
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10_000, 0, 8_191))
    assert "features of 4 images take 8.19e-06 GB, and 8.19e-06 GB are free" in refused({})
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(10_000, 0, 0))
    assert "features" in refused({"training": {"flags": {"vitask_ep": "all"}}})


def test_flags_of_the_command_line_that_contradict(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text("data: [{medmnist: breast}]\n")
    for words, sentence in (
        (["recipe.yaml", "--images", "scans"], "the recipe names its data"),
        (["--modality", "MRI"], "--modality is of --images or --medmnist"),
        (["--images", "a", "b", "--modality", "MRI"], "--modality is of one set"),
    ):
        assert main(["run", *words]) == 1
        assert sentence in capsys.readouterr().err


def test_a_folder_that_holds_a_recipe_and_other_things_is_not_taken_for_a_run(tmp_path, refused) -> None:
    """A recipe in the folder of one's own project, and that folder as --out: its README would be overwritten."""
    (tmp_path / "mine").mkdir()
    for name in ("recipe.yaml", "README.md"):
        (tmp_path / "mine" / name).write_text("seed: 0\n")
    assert "'README.md', which is not of an earlier run" in refused({"out": "mine"})
    assert (tmp_path / "mine/README.md").read_text() == "seed: 0\n"


def test_a_recipe_that_says_the_same_stays_as_its_owner_wrote_it(tmp_path) -> None:
    from vitask_plugin.run.command import _write_recipe
    from vitask_plugin.run.recipe_file import read_recipe

    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3  # my lucky number\n")
    _write_recipe(path, parsed({"seed": 3}))
    assert path.read_text() == "seed: 3  # my lucky number\n"
    _write_recipe(path, parsed({"seed": 4}))
    assert parsed(read_recipe(str(path))).seed == 4


@pytest.mark.parametrize("more", [[], ["--slurm", "job.sh"]], ids=["run", "slurm"])
def test_a_run_that_goes_on_keeps_its_recipe(more, tmp_path, monkeypatch, capsys) -> None:
    """A second one in its folder is refused before it writes anything: figures name the recipe that lies there."""
    draw_folder(tmp_path / "scans", 1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    for name in ("recipe.yaml", "commands.sh"):
        (tmp_path / "out" / name).write_text("seed: 0\n")
    words = ["--images", "scans", "--modality", "MRI", "--model", "tiny", "--device", "cpu", "--seed", "5"]
    with locked(tmp_path / "out"):
        assert main(["run", *words, "--out", "out", *more]) == 1
    assert "works in" in capsys.readouterr().err and not (tmp_path / "job.sh").exists()
    assert {(tmp_path / "out" / name).read_text() for name in ("recipe.yaml", "commands.sh")} == {"seed: 0\n"}


def test_room_is_not_asked_for_what_is_there_already(tmp_path, monkeypatch) -> None:
    from vitask_plugin.errors import VITaskError
    from vitask_plugin.run.machine import check_room

    recipe = parsed({"model": "tiny", "data": [{**SCANS, "images": str(draw_folder(tmp_path / "scans", 1))}]})
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("Usage", "free")(0))
    with pytest.raises(VITaskError, match="features of 4 images"):
        check_room(recipe, tmp_path / "out")
    (tmp_path / "out/features").mkdir(parents=True)
    check_room(recipe, tmp_path / "out")
