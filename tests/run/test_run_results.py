"""`results.json` and the card of a run, from what lmms-eval wrote."""

import io
import json
import sys

import pytest
from huggingface_hub import ModelCard
from lmms_output import write_file, write_run
from rich.console import Console

from vitask_plugin.cli import main
from vitask_plugin.errors import VITaskError
from vitask_plugin.run import results
from vitask_plugin.run.command import _show
from vitask_plugin.run.judging_stages import ARMS, EVALUATION
from vitask_plugin.run.recipe import filled
from vitask_plugin.run.recipe_file import parsed, read_recipe, written

SETS = {"breastmnist": 0.5, "retinamnist": 0.2}


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """A run's folder with two sets, judged on val and test by two arms, whose answers are drawn."""
    root, out = tmp_path / "medmnist", tmp_path / "out"
    monkeypatch.setenv("MEDMNIST_ROOT", str(root))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    data = [{"medmnist": flag, "allow_duplicates": True} for flag in SETS]
    for flag in SETS:
        write_file(root, flag)
        words = ["--task", flag, "--out", str(out / "data" / flag), "--allow-duplicates"]
        assert main(["data", "medmnist", *words]) == 0
    for arm, seed in (("vitask", 0), ("vitask-ep", 1)):
        for split in ("test", "val"):
            date = f"2026010{1 + (split == 'val')}_000000"
            write_run(out / EVALUATION / arm, SETS, root, seed=seed + 2 * (split == "val"), split=split, date=date)
    (out / "recipe.yaml").write_text(written(parsed({"model": "tiny", "out": str(out), "data": data})))
    monkeypatch.setattr(sys, "argv", ["results", str(out), "--arms", "vitask", "vitask-ep"])
    return out


def test_a_row_for_each_arm_split_and_set_and_the_mean_of_the_sets(judged) -> None:
    results.main()
    found = json.loads((judged / "results.json").read_text())
    places = [(row["arm"], row["split"], row["set"]) for row in found["rows"]]
    sets = ("medmnist_breast", "medmnist_retina", "mean of 2 sets")
    arms = ("vitask", "vitask-ep")
    assert places == [(arm, split, name) for arm in arms for split in ("val", "test") for name in sets]
    for start in range(0, len(found["rows"]), 3):
        breast, retina, mean = found["rows"][start : start + 3]
        for name in ("accuracy", "macro_f1", "auc"):
            assert mean[name] == pytest.approx((breast[name] + retina[name]) / 2) and 0 < mean[name] < 1
        assert (breast["n"], retina["n"], mean["n"]) == (24, 24, 48)
    (path,) = (judged / EVALUATION / "vitask").rglob("20260101*_results.json")
    wrote = json.loads(path.read_text())["results"]
    assert found["rows"][3]["accuracy"] == wrote["medmnist_breast"]["accuracy,none"]
    assert found["rows"][3]["auc"] == wrote["medmnist_breast_score"]["auc,none"]
    assert found["rows"][3]["intervals"]["accuracy"] == wrote["medmnist_breast"]["accuracy_ci95,none"]
    assert found["rows"][3]["intervals"]["auc"] == wrote["medmnist_breast_score"]["auc_ci95,none"]
    low, high = found["rows"][5]["intervals"]["accuracy"]
    assert low < found["rows"][5]["accuracy"] < high
    assert found["rows"][3] != {**found["rows"][0], "split": "test"}


def test_of_several_labels_accuracy_is_the_papers_all_of_them_right(tmp_path, monkeypatch) -> None:
    """As the page has it; the share of right (image, label) pairs is far above."""
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    sets = {"chestmnist": 0.5, "breastmnist": 0.5}
    for flag in sets:
        write_file(tmp_path, flag)
    path = write_run(tmp_path / "out" / EVALUATION / "vitask", sets, tmp_path)
    recipe = parsed({"model": "tiny", "evaluate": {"splits": ["test"]}, "data": [{"medmnist": flag} for flag in sets]})
    breast, chest, mean = results.results(tmp_path / "out", recipe, ["vitask"])["rows"]
    wrote = json.loads(path.read_text())["results"]["medmnist_chest"]
    assert chest["accuracy"] == wrote["subset_accuracy,none"] < wrote["accuracy,none"] - 0.1
    assert chest["intervals"]["accuracy"] == wrote["subset_accuracy_ci95,none"]
    assert mean["accuracy"] == (breast["accuracy"] + chest["accuracy"]) / 2


def test_a_set_or_split_that_was_not_judged_is_refused(judged) -> None:
    recipe = parsed(read_recipe(str(judged / "recipe.yaml")))
    for path in (judged / EVALUATION / "vitask-ep").rglob("*samples_medmnist_retina.jsonl"):
        path.unlink()
    with pytest.raises(VITaskError, match="vitask-ep' holds no judged image of medmnist_retina on val"):
        results.results(judged, recipe, ["vitask", "vitask-ep"])
    for path in (judged / EVALUATION / "vitask").rglob("20260101*"):
        path.unlink()
    with pytest.raises(VITaskError, match="vitask' holds no judged image of medmnist_breast on test"):
        results.results(judged, recipe, ["vitask"])


def test_figures_are_not_those_of_another_recipe(judged, monkeypatch) -> None:
    digest = filled(parsed(read_recipe(str(judged / "recipe.yaml")))).digest
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--digest", "0" * 64])
    with pytest.raises(VITaskError, match=r"recipe.yaml' has the digest .*, and the recipe that was run 000000000000:"):
        results.main()
    assert not (judged / "results.json").exists()
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], digest])
    results.main()
    assert json.loads((judged / "results.json").read_text())["recipe"] == digest


def test_the_same_figures_are_the_same_bytes_whenever_and_wherever(judged) -> None:
    results.main()
    before = (judged / "results.json").read_bytes()
    for path in sorted((judged / EVALUATION).rglob("2026*")):
        path.rename(path.with_name(path.name.replace("2026", "2027", 1)))
    results.main()
    assert (judged / "results.json").read_bytes() == before and str(judged).encode() not in before


def test_the_card_says_what_and_on_what(judged) -> None:
    results.main()
    card = (judged / "README.md").read_text()
    assert "**Not for clinical use.**" in card and "a tiny model of random weights" in card
    assert "| malignant | 12 | 12 | 12 |" in card and "| mean of 2 sets | test | VITask with EP |" in card
    assert "**retinamnist**: retinal fundus; licence: CC BY 4.0" in card and "stage 1: 1 epochs" in card
    results_of = ModelCard(card).data.eval_results
    assert {one.dataset_name for one in results_of} == {"medmnist_breast", "medmnist_retina", "mean of 2 sets"}
    assert len(results_of) == 2 * 2 * 3 * 3 and str(judged) not in card  # arms, splits, sets with their mean, metrics


def test_the_card_names_the_flags_of_the_tsm(judged) -> None:
    path = judged / "recipe.yaml"
    recipe = parsed({**read_recipe(str(path)), "tsm": {"flags": {"flip": "none", "folds": 3}}})
    path.write_text(written(recipe))
    results.main()
    assert (
        "resnet10t (from random weights), 5 epochs; more flags: flip=none, folds=3"
        in (judged / "README.md").read_text()
    )


def test_the_table_of_a_run_fits_80_columns() -> None:
    figures = {"accuracy": 0.5, "macro_f1": 0.25, "auc": None, "unmapped": 1234, "n": 7180}
    rows = [
        {"set": name, "split": "test", "arm": arm, **figures} for name in ("medmnist_pneumonia", "s") for arm in ARMS
    ]
    with io.StringIO() as shown:
        _show(rows, ARMS, Console(file=shown, width=80))
        lines = shown.getvalue().splitlines()
    assert "…" not in "".join(lines) and max(map(len, lines)) <= 80
    for word in ("accuracy", "macro-F1", "unread", "medmnist_pneumonia", "VITask without EP", "7180"):
        assert any(word in line for line in lines)
