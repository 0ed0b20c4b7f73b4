"""The recipe of `vitask run`: in, out, over flags; what is unknown is refused with the nearest known name."""

import re

import pytest

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.run.recipe import DEFAULTS, Recipe, filled
from vitask_plugin.run.recipe_file import parsed, read_recipe, with_settings, written

FULL = {
    "model": "tiny",
    "out": "out/mri",
    "baseline": True,
    "data": [{"images": "scans", "modality": "brain MRI", "labels": ["no", "2e4", "a: b"]}, {"medmnist": "breast"}],
    "tsm": {"lr": 0.0002, "flags": {"patience": 3}},
    "training": {"flags": {"vitask_rda_weight": 2.0, "vitask_ep": "all"}},
    "launch": {"environment": {"NCCL_SOCKET_IFNAME": "eth0"}},
}


@pytest.mark.parametrize("values", [FULL, {}], ids=["full", "empty"])
def test_a_printed_recipe_reads_back_as_the_same(values, tmp_path) -> None:
    recipe = parsed(values)
    path = tmp_path / "recipe.yaml"
    path.write_text(written(recipe), encoding="utf-8")
    again = parsed(read_recipe(str(path)))
    assert again.model_copy(update={"data": recipe.data}) == recipe
    assert again.data == (recipe.data or again.data)


def test_every_setting_has_a_comment_and_every_depending_default_is_told() -> None:
    text = written(Recipe())
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) > 50
    assert [line for line in lines if "#" not in line] == []
    assert "{" not in "".join(line.partition("#")[2] for line in lines)
    for plain, tiny in DEFAULTS.values():
        for value in (plain, tiny):
            assert value is None or (f"{value:g}" if isinstance(value, float) else str(value).lower()) in text


def test_print_recipe_takes_flags_and_settings(capsys) -> None:
    words = ["--images", "scans", "--modality", "brain MRI", "--model", "tiny", "--set", "tsm.epochs=7"]
    assert main(["run", *words, "--baseline", "--processes", "2", "--print-recipe"]) == 0
    out = capsys.readouterr().out
    for line in ("model: tiny", "baseline: true", "  - images: scans", "    modality: brain MRI", "  epochs: 7"):
        assert f"\n{line} " in out, line
    assert "\n  processes: 2 " in out


def test_all_is_every_published_set(capsys) -> None:
    assert main(["run", "--medmnist", "all", "--size", "64", "--model", "tiny", "--print-recipe"]) == 0
    out = capsys.readouterr().out
    assert len(set(re.findall(r"medmnist: (\w+mnist\w*) ", out))) == out.count("size: 64") == 12
    assert main(["run", "--medmnist", "all", "breast", "--model", "tiny", "--print-recipe"]) == 1
    assert "--medmnist names 'breastmnist' twice" in capsys.readouterr().err


def test_flags_stand_over_the_file(tmp_path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: models/llava\nseed: 3\nlaunch: {processes: 4, device: cuda}\n", encoding="utf-8")
    assert main(["run", str(path), "--seed", "5", "--device", "cpu", "--print-recipe"]) == 0
    out = capsys.readouterr().out
    for line in ("model: models/llava", "seed: 5", "  processes: 4", "  device: cpu"):
        assert f"\n{line} " in out, line


def test_numbers_as_people_write_them_are_numbers(tmp_path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {learning_rate: 2e-4}\n", encoding="utf-8")
    assert read_recipe(str(path)) == {"training": {"learning_rate": 2e-4}}
    assert with_settings({}, ["tsm.lr=1e-3"]) == {"tsm": {"lr": 1e-3}}
    assert with_settings({"tsm": {"lr": 1.0}}, ["tsm.epochs=2"]) == {"tsm": {"lr": 1.0, "epochs": 2}}


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"modle": "x"}, "unknown key 'modle'; the nearest known one is 'model'"),
        ({"tsm": {"epoch": 3}}, "unknown key 'tsm.epoch'; the nearest known one is 'tsm.epochs'"),
        ({"learning_rate": 1.0}, "unknown key 'learning_rate'; the nearest known one is 'training.learning_rate'"),
        ({"data": [{"image": "x"}]}, "unknown key 'data.0.image'; the nearest known one is 'data.0.images'"),
        ({"zzz": 1}, "unknown key 'zzz'; known there: model, host"),
        ({"seed": "3"}, "/seed is '3'; expected a whole number; change it"),
        ({"tsm": {"epochs": 0}}, "/tsm/epochs is 0; expected greater than or equal to 1"),
        ({"training": {"learning_rate": float("nan")}}, "/training/learning_rate is nan; expected a finite number"),
        ({"training": {"learning_rate": float("inf")}}, "/training/learning_rate is inf; expected a finite number"),
        ({"data": [{"labels": ["yes", True]}]}, "/data/0/labels/1 is True"),
        ({"launch": None}, "/launch is None; expected an object"),
    ],
)
def test_what_is_unknown_or_of_another_kind_is_named(values, sentence) -> None:
    with pytest.raises(VITaskError) as raised:
        parsed(values)
    assert sentence in str(raised.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("seed: 1\nseed: 2\n", "key 'seed' is there twice"),
        ("seed: [1\n", "is no readable YAML"),
        ("seed: " + "[" * 5000, "is no readable YAML"),
        ("seed: " + "1" * 5000, "is no readable YAML"),
        ("seed: 2020-13-45\n", "is no readable YAML"),
        ("? [a, b]\n: 1\n", "is no readable YAML"),
        ("just words\n", "holds no keys"),
        ("", "holds no keys"),
        ("seed: !!python/object/apply:os.system [echo]\n", "is no readable YAML"),
    ],
)
def test_files_that_are_no_recipe(text, sentence, tmp_path, capsys) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    assert main(["run", str(path)]) == 1
    error = capsys.readouterr().err
    assert sentence in error and str(path) in error and len(error.strip().splitlines()) == 1


def test_settings_that_set_nothing() -> None:
    for word, sentence in (("tsm.epochs", "sets nothing"), ("=3", "sets nothing"), ("data.size=3", "holds no keys")):
        with pytest.raises(VITaskError, match=sentence):
            with_settings({"data": []}, [word])


def test_defaults_depend_on_the_model() -> None:
    tiny, plain = filled(parsed({"model": "tiny"})), filled(parsed({"model": "models/llava"}))
    assert (tiny.host, tiny.training.lora, tiny.tsm.arch) == ("llava", False, "resnet10t")
    assert (plain.host, plain.training.lora, plain.training.learning_rate) == (None, True, 2e-4)
    full = filled(parsed({"model": "models/llava", "training": {"lora": False}}))
    assert full.training.learning_rate == 2e-5
    given = filled(parsed({"model": "tiny", "training": {"stage1_epochs": 3, "stage2_epochs": 2.0}}))
    assert given.training.vanilla_epochs == 5


def test_the_digest_tells_settings_apart_and_not_the_folder() -> None:
    one = parsed({"model": "tiny", "out": "a"})
    assert one.digest == parsed({"model": "tiny", "out": "b"}).digest
    assert one.digest != parsed({"model": "tiny", "seed": 1}).digest
