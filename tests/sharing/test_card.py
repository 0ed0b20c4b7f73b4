"""The model card: what it says, and that the Hub's own client reads from it what was put in."""

import json
import shutil
from dataclasses import replace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from lmms_output import write_file, write_run
from trained import make_tsm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.record.checkpoint import save_record
from vitask_plugin.sharing.base import base_model
from vitask_plugin.sharing.card import save_card, text
from vitask_plugin.sharing.facts import BaseModel, DataSet, Facts, Row, class_counts, license_of, read_facts

FIGURES = {"accuracy": 0.8125, "macro_f1": 0.75, "auc": None}
ROW = Row("medmnist_derma", "test", "with EP", FIGURES, {"accuracy": [0.7, 0.9]}, 160, 3)
FACTS = Facts(
    title="llava-v1.5-7b, tuned by VITask",
    library="peft",
    base=BaseModel("liuhaotian/llava-v1.5-7b", "liuhaotian/llava-v1.5-7b", "llama2"),
    data=(
        DataSet("medmnist_derma", "dermatoscopy", "CC BY-NC 4.0", {"train": {"melanoma": 7, "nevi": 9}}),
        DataSet("mine", None, None),
    ),
    training=("stage 2; exemplar: cls", "seed: 3"),
    versions={"vitask-plugin": "0.1.0"},
    rows=(ROW, Row("medmnist_derma", "test", "TSM alone", {"accuracy": 0.9}, {}, 160, 0, own=False)),
)


def test_the_hubs_client_reads_what_was_written(hub) -> None:
    card = ModelCard(text(FACTS))
    card.validate()
    found = card.data
    assert (found.license, found.base_model, found.library_name) == ("llama2", FACTS.base.hub, "peft")
    results = {result.metric_name: result for result in found.eval_results}
    # Neither the AUC, which is not known, nor what the TSM reached.
    assert set(results) == {"accuracy, with EP", "macro-F1, with EP"}
    accuracy = results["accuracy, with EP"]
    assert (accuracy.metric_type, accuracy.metric_value, accuracy.dataset_split) == ("accuracy", 0.8125, "test")
    assert accuracy.metric_args == {"interval_95": [0.7, 0.9]} and accuracy.dataset_type == "medmnist_derma"
    with pytest.raises(ValueError, match="not whole"):
        ModelCard(text(FACTS.judged([replace(ROW, set="")]))).validate()


def test_the_card_says_what_it_is_not_for_and_whose_the_data_are() -> None:
    written = text(FACTS)
    for words in (
        "**Not for clinical use.**",
        "its licence holds for this one too: llama2",
        "**medmnist_derma**: dermatoscopy; licence: CC BY-NC 4.0",
        "| melanoma | 7 |",
        "**mine**; licence: unknown",
        "| medmnist_derma | test | with EP | 0.812 [0.700, 0.900] | 0.750 | n/a | 160 | 3 |",
        "| TSM alone | 0.900 |",
        "vitask-plugin 0.1.0",
    ):
        assert words in written, words
    unjudged = text(FACTS.judged(()))
    assert "Not judged yet" in unjudged and "model-index" not in unjudged


def test_the_card_can_be_written_again_from_what_lies_beside_it(tmp_path) -> None:
    save_card(FACTS, tmp_path)
    assert read_facts(tmp_path) == FACTS
    assert (tmp_path / "README.md").read_text() == text(FACTS)


def test_a_base_is_called_as_the_hub_calls_it_or_as_its_folder(tmp_path, monkeypatch) -> None:
    own = tmp_path / "own" / "my-model"
    own.mkdir(parents=True)
    assert base_model(str(own)) == BaseModel("my-model")
    (own / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Mine\n")
    assert base_model(str(own)) == BaseModel("my-model", None, "apache-2.0")
    snapshot = tmp_path / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "abc"
    shutil.copytree(own, snapshot)
    assert base_model(str(snapshot)) == BaseModel(*["llava-hf/llava-1.5-7b-hf"] * 2, "apache-2.0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert base_model("llava-hf/llava-1.5-7b-hf") == BaseModel("llava-1.5-7b-hf")  # as a folder of elsewhere is called
    assert base_model("models/llava-v1.5-7b") == BaseModel("llava-v1.5-7b")
    (snapshot / "config.json").write_text("{}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    assert base_model("llava-hf/llava-1.5-7b-hf") == BaseModel(*["llava-hf/llava-1.5-7b-hf"] * 2, "apache-2.0")
    (snapshot / "README.md").unlink()
    assert base_model("llava-hf/llava-1.5-7b-hf") == BaseModel(*["llava-hf/llava-1.5-7b-hf"] * 2)
    assert base_model("/gone/from/here/llava") == BaseModel("llava")
    save_card(FACTS, own)
    assert base_model(str(own)) == FACTS.base  # of its stage 1


def test_images_are_counted_by_class_and_several_labels_each() -> None:
    def sample(task, label):
        return {"vitask": {"task": task, "label": label, "choices": ["a", "b", "c"]}}

    found = class_counts([sample("one", 1), sample("one", 1), {"id": "general"}, sample("many", [0, 2])])
    assert found == {"one": {"a": 0, "b": 2, "c": 0}, "many": {"a": 1, "b": 0, "c": 1}}
    assert (license_of("medmnist_derma"), license_of("one")) == ("CC BY-NC 4.0", None)


def test_vitask_card_puts_in_what_lmms_eval_found(tmp_path, monkeypatch, capsys) -> None:
    root, ckpt = tmp_path / "medmnist", tmp_path / "llava-breast"
    for name, value in {"MEDMNIST_ROOT": str(root), "MEDMNIST_ALLOW_MODIFIED": "1"}.items():
        monkeypatch.setenv(name, value)
    write_file(root, "breastmnist")
    ckpt.mkdir()
    save_card(FACTS.judged(()), ckpt)
    for seed, more in enumerate(("", ",tsm=tsm/breast")):
        folder = tmp_path / f"results-{seed}"
        write_run(folder, {"breastmnist": 0.5}, root, model_args=f"pretrained={ckpt}{more}", seed=seed)
    assert main(["card", str(ckpt), "--results", str(tmp_path / "results-0"), str(tmp_path / "results-1")]) == 0
    wrote = json.loads(next((tmp_path / "results-1").rglob("*_results.json")).read_text())["results"]
    results = {one.metric_name: one for one in ModelCard.load(ckpt / "README.md").data.eval_results}
    assert len(results) == 6
    for name, task, key in (
        ("accuracy", "medmnist_breast", "accuracy"),
        ("macro-F1", "medmnist_breast", "macro_f1"),
        ("AUC", "medmnist_breast_score", "auc"),
    ):
        found = results[f"{name}, with EP"]
        assert found.metric_value == pytest.approx(wrote[task][f"{key},none"], abs=1e-4)
        assert found.metric_args["interval_95"] == pytest.approx(wrote[task][f"{key}_ci95,none"], abs=1e-4)
    assert main(["card", str(ckpt)]) == 0  # the figures stay
    assert len(ModelCard.load(ckpt / "README.md").data.eval_results) == 6
    capsys.readouterr()
    other = tmp_path / "llava-other"
    other.mkdir()
    save_card(FACTS, other)
    assert main(["card", str(other), "--results", str(tmp_path / "results-0")]) == 1
    assert "give the results of this checkpoint alone" in capsys.readouterr().err


def test_accuracy_of_several_labels_is_that_of_the_report(tmp_path, monkeypatch) -> None:
    """All labels right, not the share of right (image, label) pairs."""
    root, ckpt = tmp_path / "medmnist", tmp_path / "llava-chest"
    for name, value in {"MEDMNIST_ROOT": str(root), "MEDMNIST_ALLOW_MODIFIED": "1"}.items():
        monkeypatch.setenv(name, value)
    write_file(root, "chestmnist")
    ckpt.mkdir()
    save_card(FACTS.judged(()), ckpt)
    path = write_run(tmp_path / "results", {"chestmnist": 0.5}, root, model_args=f"pretrained={ckpt}")
    wrote = json.loads(path.read_text())["results"]["medmnist_chest"]
    assert main(["card", str(ckpt), "--results", str(tmp_path / "results")]) == 0
    (row,) = read_facts(ckpt).rows
    assert row.figures["accuracy"] == wrote["subset_accuracy,none"] < wrote["accuracy,none"] - 0.1
    assert row.intervals["accuracy"] == pytest.approx(wrote["subset_accuracy_ci95,none"])


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """`vitask card` of a checkpoint with the results of a model of those arguments: status and rows."""
    root, ckpt = tmp_path / "medmnist", tmp_path / "llava-breast"
    for name, value in {"MEDMNIST_ROOT": str(root), "MEDMNIST_ALLOW_MODIFIED": "1"}.items():
        monkeypatch.setenv(name, value)
    write_file(root, "breastmnist")
    ckpt.mkdir()
    save_card(FACTS.judged(()), ckpt)

    def of(model_args, model="vitask_llava"):
        folder = tmp_path / f"results-{len(list(tmp_path.iterdir()))}"
        write_run(folder, {"breastmnist": 0.5}, root, model_args=model_args, model=model, variants=("",))
        return main(["card", str(ckpt), "--results", str(folder)]), read_facts(ckpt).rows

    of.checkpoint = ckpt
    return of


@pytest.mark.parametrize(
    ("more", "model", "own"),
    [
        ("dtype=float32,contrast=0", "without EP", True),
        ("tsm=t/breast,ep=True", "with EP", True),
        ("tsm=t/breast,ep=all", "with EP, ep=all", False),
        ("tsm=t/new,connector=out/aligned", "with EP, connector=aligned", False),
        ("tsm=t/new,swap=force", "with EP, swap=force", False),
        ("contrast=0.5", "without EP, contrast=0.5", False),
    ],
)
def test_another_way_of_using_the_model_is_named_and_none_of_its_own_figures(judged, more, model, own) -> None:
    status, (row,) = judged(f"pretrained={judged.checkpoint},{more}")
    assert (status, row.model, row.own) == (0, model, own)
    assert bool(ModelCard.load(judged.checkpoint / "README.md").data.eval_results) is own


def test_a_row_of_the_tsm_is_of_the_one_that_it_was_trained_with(judged, tmp_path, capsys) -> None:
    status, rows = judged("version=other", model="dummy")
    assert (status, rows) == (1, ()) and "--model dummy without a checkpoint" in capsys.readouterr().err
    tsm = make_tsm(tmp_path / "tsm")
    record = {"hash": tsm.hash, "width": 1}
    save_record(judged.checkpoint, VITaskArguments(vitask=True, vitask_tsm="tsm"), None, record, {}, version="v1")
    status, (row,) = judged(f"tsm={tmp_path / 'tsm'},ep=False", model="vitask_tsm")
    assert (status, row.model, row.own) == (0, "TSM alone", False)
    make_tsm(tmp_path / "other", seed=1)
    for folder in ("other", "gone"):
        assert judged(f"tsm={tmp_path / folder},ep=False", model="vitask_tsm")[0] == 1
        assert f"was trained with TSM {tsm.hash[:12]}" in capsys.readouterr().err
