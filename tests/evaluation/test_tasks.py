"""The task files inside the real lmms-eval: all 36 with our model, one of each kind with a stock model and `dummy`."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from medmnist import INFO
from medmnist.evaluator import getACC, getAUC

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import LabelSet, instruction, label_set, label_sets, response
from vitask_plugin.evaluation import intervals
from vitask_plugin.evaluation.answers import parse_flexible, parse_strict
from vitask_plugin.evaluation.metric_list import METRICS, STRICT, TITLES
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities
from vitask_plugin.llava.tiny import make_tiny_llava

FOLDER = Path(__file__).parents[2] / "eval_tasks"
SETS = [known for task, known in label_sets().items() if task.startswith("medmnist_")]
SUFFIXES = ("", "_incomplete", "_score")
GROUPS = [f"medmnist{suffix}" for suffix in SUFFIXES]
FOR_UPSTREAM = "medmnist2d"  # the same sets in lmms-eval's own conventions: eval_tasks/upstream
TASKS = [f"{known.task}{suffix}" for known in SETS for suffix in SUFFIXES]
CHAT_TEMPLATE = (
    "{% for turn in messages %}{{ turn.role.upper() }}: {% for part in turn.content %}"
    "{{ '<image>\n' if part.type == 'image' else part.text }}{% endfor %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
OF_EACH_KIND = ("medmnist_breast", "medmnist_blood", "medmnist_retina", "medmnist_chest")


# What the files say --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def manager() -> Any:
    from lmms_eval.tasks import TaskManager

    return TaskManager(include_path=str(FOLDER), include_defaults=False)


def test_the_harness_finds_36_tasks_and_3_groups(manager: Any) -> None:
    assert len(TASKS) == 36
    endings = ("", "_64", "_128", "_224")
    for_upstream = {FOR_UPSTREAM + ending for ending in endings}
    assert set(manager.all_groups) == {*GROUPS, *(f"vitask_sets{suffix}" for suffix in SUFFIXES)} | for_upstream
    others = {f"{task}{suffix}" for task in ("vitask_drawn", "vitask_folder") for suffix in SUFFIXES}
    others |= {f"{known.flag}{ending}" for known in SETS for ending in endings}
    assert set(manager.all_subtasks) == {*TASKS, *others}
    for suffix in SUFFIXES:
        config = yaml.safe_load((FOLDER / f"medmnist{suffix}.yaml").read_text())
        assert set(config["task"]) == {f"{known.task}{suffix}" for known in SETS}


def test_none_of_the_harness_own_tasks_has_one_of_these_names() -> None:
    """One would win in silence."""
    from lmms_eval.tasks import TaskManager

    assert not set(TaskManager().all_tasks) & {*TASKS, *GROUPS}


@pytest.mark.parametrize("known", label_sets().values(), ids=lambda known: known.task)
def test_every_task_file_is_three_lines_and_knows_its_words(known: LabelSet, manager: Any) -> None:
    for suffix in SUFFIXES:
        config = manager._get_config(known.task + suffix)
        assert len((FOLDER / f"{known.task}{suffix}.yaml").read_text().splitlines()) == 3
        assert config["output_type"] == ("multiple_choice" if suffix == "_score" else "generate_until")
        assert config["doc_to_text"] == ("incomplete_question" if suffix == "_incomplete" else "question")
        assert label_set(config["dataset_name"]) is known
        assert config["metadata"]["version"] == 2.0


def test_the_readme_defines_every_metric(manager: Any) -> None:
    text = (FOLDER / "README.md").read_text()
    listed = [entry["metric"] for entry in manager._get_config("medmnist_breast")["metric_list"]]
    assert len(listed) == len(set(listed)) > 20
    plain = {re.sub("(_strict)?(_ci95)?$", "", metric) for metric in listed}
    assert [metric for metric in plain if f"`{metric}`" not in text] == []
    assert "`_strict`" in text and "`_ci95`" in text


def test_the_task_files_list_the_declared_metrics(manager: Any) -> None:
    listed = {entry["metric"] for entry in manager._get_config("medmnist_breast")["metric_list"]}
    with_interval = {name for name in TITLES if METRICS[name.removesuffix(STRICT)].of}
    assert listed == {*TITLES, *(f"{name}_ci95" for name in with_interval)}
    # What `vitask calibrate` says beside them has an interval too.
    assert intervals.RESAMPLED.keys() == {"nll", *(name for name, metric in METRICS.items() if metric.of)}


# Runs of the command -------------------------------------------------------------------------------------------------


STAND_INS = Path(__file__).parents[1] / "support" / "stand_ins"  # for llava_hf


def draw_files(root: Path) -> None:
    """A file of each set's layout; every class has test images, chest also an image of two labels and one of none."""
    generator = np.random.default_rng(0)
    for known in SETS:
        classes = len(known.choices)
        labels = np.arange(classes + 3) % classes
        if known.multi_label:
            labels = np.eye(classes, dtype=int)[labels]
            labels[-1], labels[-2, :2] = 0, 1
        shape = (len(labels), 28, 28) if INFO[known.flag]["n_channels"] == 1 else (len(labels), 28, 28, 3)
        images = generator.integers(0, 256, shape, dtype=np.uint8)
        np.savez(root / f"{known.flag}.npz", test_images=images, test_labels=labels.reshape(len(labels), -1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    draw_files(root)
    return root


class Run:
    """What one run of the command wrote: figures by task, samples by task, its output."""

    def __init__(self, model: str, model_args: str, tasks: list[str], root: Path, output: Path) -> None:
        command = [
            *(sys.executable, "-m", "lmms_eval", "--model", model, "--model_args", model_args, "--device", "cpu"),
            *("--include_path", FOLDER, "--tasks", ",".join(tasks), "--gen_kwargs", "max_new_tokens=12"),
            *("--batch_size", 1 if model == "llava_hf" else 16, "--output_path", output, "--log_samples"),
        ]
        done = subprocess.run(
            [str(word) for word in command],
            env={
                **os.environ,
                "MEDMNIST_ROOT": str(root),
                "MEDMNIST_ALLOW_MODIFIED": "1",
                "PYTHONPATH": str(STAND_INS),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        self.text = done.stdout
        found = list(output.rglob("*_results.json"))
        assert done.returncode == 0 and len(found) == 1, done.stdout
        record = json.loads(found[0].read_text())
        self.versions, self.groups = record["versions"], record.get("groups", {})
        self.figures = {
            task: {name.removesuffix(",none"): value for name, value in values.items() if "_stderr" not in name}
            for task, values in record["results"].items()
        }
        self.samples = {}
        for path in output.rglob("*_samples_*.jsonl"):
            lines = map(json.loads, path.read_text().splitlines())
            self.samples[path.stem.split("_samples_")[1]] = sorted(lines, key=lambda sample: sample["doc_id"])


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, root: Path) -> Run:
    output = tmp_path_factory.mktemp("everything")
    return Run("vitask_llava", f"pretrained={tiny_checkpoint}", [*GROUPS, FOR_UPSTREAM], root, output)


@pytest.fixture(scope="module")
def dummy(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Run:
    tasks = [f"{task}{suffix}" for task in OF_EACH_KIND for suffix in SUFFIXES]
    tasks += [label_set(task).flag for task in OF_EACH_KIND]
    return Run("dummy", "response=It is normal. There is no finding", tasks, root, tmp_path_factory.mktemp("dummy"))


@pytest.fixture(scope="module")
def llava_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_hf(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory, llava_hf: Path, root: Path) -> Run:
    tasks = [f"{task}{suffix}" for task in OF_EACH_KIND for suffix in ("", "_incomplete")]
    # transformers 5 refuses llava_hf's default for device_map, an empty text.
    return Run("llava_hf", f"pretrained={llava_hf},device_map=cpu", tasks, root, tmp_path_factory.mktemp("stock"))


def make_llava_hf(folder: Path) -> Path:
    """A tiny LLaVA with random weights, in the form of the Hugging Face hub's llava-1.5-7b-hf."""
    from transformers import (
        AutoTokenizer,
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    parts = make_tiny_llava(folder / "parts", texts=["Analyze the given image."], seed=0, hidden_size=64)
    tokenizer = AutoTokenizer.from_pretrained(parts.base, use_fast=False)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=2048,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig.from_pretrained(parts.tower),
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder / "llava-hf")
    processor = LlavaProcessor(
        CLIPImageProcessor.from_pretrained(parts.tower),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder / "llava-hf")
    return folder / "llava-hf"


@pytest.mark.parametrize("known", SETS, ids=lambda known: known.task)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_task_runs_with_our_model(known: LabelSet, suffix: str, everything: Run, root: Path) -> None:
    check(everything, known, suffix, root)


@pytest.mark.parametrize("task", OF_EACH_KIND)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_kind_runs_with_dummy(task: str, suffix: str, dummy: Run, root: Path) -> None:
    check(dummy, label_set(task), suffix, root)


@pytest.mark.parametrize("task", OF_EACH_KIND)
@pytest.mark.parametrize("suffix", ["", "_incomplete"])
def test_each_kind_runs_with_llava_hf(task: str, suffix: str, stock: Run, root: Path) -> None:
    check(stock, label_set(task), suffix, root)


def test_why_llava_hf_does_not_score(llava_hf: Path) -> None:
    """Its `loglikelihood` first tokenizes the prompt without the image, which its own processor refuses. Where this
    fails, lmms-eval or transformers has patched it, and README.md of the tasks should say so."""
    from transformers import AutoProcessor

    with pytest.raises(ValueError, match="no images were passed"):
        AutoProcessor.from_pretrained(llava_hf)(text=["USER: <image>\nAnalyze. ASSISTANT:"], return_tensors="pt")


def check(run: Run, known: LabelSet, suffix: str, root: Path) -> None:
    """Samples hold the file's labels and the model's answers, and every figure follows from them."""
    task = f"{known.task}{suffix}"
    figures, samples = run.figures[task], run.samples[task]
    with np.load(root / f"{known.flag}.npz") as file:
        labels = file["test_labels"]
    records = [sample["n"] for sample in samples]
    assert figures["n"] == len(records) == len(labels)
    assert run.versions[task] == 2.0
    choices = list(known.choices)
    for index, (row, record, sample) in enumerate(zip(labels, records, samples, strict=True)):
        expected = np.flatnonzero(row).tolist() if known.multi_label else int(row[0])
        assert (record["label"], record["index"], record["file"]) == (expected, index, f"{known.flag}.npz")
        assert (record["choices"], record["kind"]) == (choices, known.kind)
        assert sample["target"] == response(choices, expected)
        listed = None if suffix == "_incomplete" else choices
        assert sample["input"] == instruction(known.modality, listed, multi_label=known.multi_label)

    def member(label: Any) -> Any:
        return [int(i in label) for i in range(len(choices))] if known.multi_label and label is not None else label

    outcomes = [Outcome(member(record["label"]), member(record["prediction"])) for record in records]
    expected = {"n": len(records)}
    for ending, read in {
        "": outcomes,
        **({} if suffix == "_score" else {"_strict": strictly(records, member)}),
    }.items():
        taken = dict.fromkeys(("accuracy", "subset_accuracy", "balanced_accuracy", "macro_f1"), read)
        if known.kind == "ordinal-regression":
            taken["quadratic_kappa"] = [metrics.farthest(outcome, len(choices)) for outcome in read]
        for figure, items in taken.items():
            expected[f"{figure}{ending}"] = getattr(metrics, figure)(items)
            expected[f"{figure}{ending}_ci95"] = intervals.interval(figure, items)
        if suffix != "_score":
            expected[f"unmapped{ending}"] = metrics.unmapped(read)
    if suffix == "_score":
        items = [
            Probabilities(o.target, r["probabilities"], known.kind) for o, r in zip(outcomes, records, strict=True)
        ]
        for figure in ("auc", "ece"):
            expected[figure] = getattr(metrics, figure)(items)
            expected[f"{figure}_ci95"] = intervals.interval(figure, items)
        check_scores(figures, records, labels, known)
    else:
        for sample, record in zip(samples, records, strict=True):
            several = {"multi_label": known.multi_label}
            assert record["prediction"] == parse_flexible(sample["filtered_resps"], choices, **several)
            assert record["strict"] == parse_strict(sample["filtered_resps"], choices, **several)
    assert set(figures) - {"alias"} == set(expected)
    for name, value in expected.items():
        assert figures[name] == pytest.approx(value, abs=1e-12), name


def strictly(records: list[dict[str, Any]], member: Any) -> list[Outcome]:
    return [Outcome(member(record["label"]), member(record["strict"])) for record in records]


def check_scores(figures: dict[str, Any], records: list[dict[str, Any]], labels: np.ndarray, known: LabelSet) -> None:
    """Accuracy and AUC are medmnist's, of probabilities that follow from the likelihoods."""
    scores = np.array([record["probabilities"] for record in records])
    likelihoods = np.array([record["log_likelihoods"] for record in records])
    assert scores.shape == (len(labels), len(known.choices))
    assert figures["accuracy"] == pytest.approx(getACC(labels, scores, known.kind), abs=1e-9)
    assert figures["auc"] == pytest.approx(getAUC(labels, scores, known.kind), abs=1e-9)
    if known.kind == MULTI_LABEL:
        assert likelihoods.shape[1] == len(known.choices) + 1
        assert scores == pytest.approx(1 / (1 + np.exp(likelihoods[:, -1:] - likelihoods[:, :-1])))
    else:
        assert scores.argmax(axis=1).tolist() == likelihoods.argmax(axis=1).tolist()
        assert scores.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_group_is_the_plain_mean_over_its_sets(suffix: str, everything: Run) -> None:
    group = everything.figures[f"medmnist{suffix}"]
    assert set(everything.groups) == {*GROUPS, FOR_UPSTREAM}
    assert {"n", "quadratic_kappa"}.isdisjoint(group)
    parts = [everything.figures[f"{known.task}{suffix}"] for known in SETS]
    names = ["accuracy", "subset_accuracy", "balanced_accuracy", "macro_f1"]
    names += ["auc", "ece"] if suffix == "_score" else [f"{name}_strict" for name in names]
    for name in names:
        assert group[name] == pytest.approx(np.mean([part[name] for part in parts])), name
        assert group[f"{name}_ci95"] == intervals.interval_of_mean([part[f"{name}_ci95"] for part in parts]), name
    if suffix != "_score":
        assert group["unmapped"] == sum(part["unmapped"] for part in parts)


def test_the_table_shows_intervals(everything: Run) -> None:
    low, high = everything.figures["medmnist_path_score"]["auc_ci95"]
    assert 0 <= low < high <= 1
    assert re.search(rf"auc_ci95 +\| +\| +\[{low}, {high}\]", everything.text), everything.text


def test_the_tasks_for_upstream_ask_and_find_what_ours_do(everything: Run, dummy: Run) -> None:
    for run, tasks in ((everything, [known.task for known in SETS]), (dummy, OF_EACH_KIND)):
        for task in tasks:
            own, theirs = run.samples[task], run.samples[label_set(task).flag]
            for name in ("input", "target", "filtered_resps"):
                assert [sample[name] for sample in theirs] == [sample[name] for sample in own], task
            assert [sample["accuracy"] for sample in theirs] == [sample["accuracy"] for sample in own]
            for name in ("accuracy", "macro_f1", "unmapped"):
                assert run.figures[label_set(task).flag][name] == pytest.approx(run.figures[task][name], abs=1e-12)
    assert dummy.figures["breastmnist"]["accuracy"] == pytest.approx(2 / 5)
    for name in ("accuracy", "macro_f1"):
        group = everything.figures[FOR_UPSTREAM][name]
        assert group == pytest.approx(everything.figures["medmnist"][name], abs=1e-12)


def test_models_answer_from_the_images(everything: Run, stock: Run, dummy: Run) -> None:
    """The runs are not empty ones."""
    for run in (everything, stock):
        for task in OF_EACH_KIND:
            assert len({sample["filtered_resps"] for sample in run.samples[task]} - {""}) > 1, task
    for task in OF_EACH_KIND:
        scores = np.array([sample["n"]["log_likelihoods"] for sample in everything.samples[f"{task}_score"]])
        assert len(np.unique(scores.round(9))) > len(scores) and (scores < 0).all()
    assert dummy.figures["medmnist_breast"]["unmapped_strict"] == dummy.figures["medmnist_breast"]["n"]
    assert dummy.figures["medmnist_breast"]["accuracy"] == pytest.approx(2 / 5)
    assert dummy.figures["medmnist_blood_score"]["auc"] == 0.5


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MEDMNIST_SIZE": "32"}, "MEDMNIST_SIZE is '32'; it must be one of 28, 64, 128, 224"),
        ({"MEDMNIST_ALLOW_MODIFIED": "0"}, "breastmnist.npz' is not the official one: its MD5 is "),
        ({"cut": "1"}, "breastmnist.npz' is damaged"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(
    change: dict[str, str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command's own entry: it retries loading, and turns every `Exception` into a traceback and status 0."""
    from lmms_eval.__main__ import cli_evaluate

    draw_files(tmp_path)
    path = tmp_path / "breastmnist.npz"
    if change.pop("cut", None):
        path.write_bytes(path.read_bytes()[:1500])
    before = path.read_bytes()
    for name, value in {"MEDMNIST_ROOT": str(tmp_path), "MEDMNIST_ALLOW_MODIFIED": "1", **change}.items():
        monkeypatch.setenv(name, value)
    arguments = ["--model", "dummy", "--tasks", "medmnist_breast_score", "--include_path", FOLDER, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_evaluate()
    assert stopped.value.code.startswith("vitask: error: ")
    assert sentence in stopped.value.code and "\n" not in stopped.value.code
    assert "Traceback" not in "".join(capsys.readouterr())
    assert path.read_bytes() == before


def test_another_size_is_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: Any) -> None:
    from lmms_eval.tasks import get_task_dict

    images = np.zeros((2, 64, 64), np.uint8)
    np.savez(tmp_path / "pneumoniamnist_64.npz", test_images=images, test_labels=[[0], [1]])
    for name, value in {"MEDMNIST_ROOT": str(tmp_path), "MEDMNIST_ALLOW_MODIFIED": "1", "MEDMNIST_SIZE": "64"}.items():
        monkeypatch.setenv(name, value)
    task = get_task_dict(["medmnist_pneumonia"], manager)["medmnist_pneumonia"]
    assert [row["image"].size for row in task.test_docs()] == [(64, 64)] * 2
    assert {row["file"] for row in task.test_docs()} == {"pneumoniamnist_64.npz"}


def test_likelihoods_that_are_no_numbers_are_one_sentence(
    root: Path, monkeypatch: pytest.MonkeyPatch, manager: Any
) -> None:
    """Through the harness' own call, which tries again on every `Exception`."""
    from lmms_eval.tasks import get_task_dict

    monkeypatch.setenv("MEDMNIST_ROOT", str(root))
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    task = get_task_dict(["medmnist_breast_score"], manager)["medmnist_breast_score"]
    document = task.test_docs()[3]
    with pytest.raises(SystemExit) as stopped:
        task.process_results(document, ["(1.5, False)", "(nan, False)"])
    assert "breastmnist.npz, test row 3: the model gives the labels the losses [1.5, nan]" in stopped.value.code
    assert task.process_results(document, ["(1.5, False)", "(2.5, False)"])["n"]["prediction"] == 0


def test_figures_without_a_value_are_nan_not_an_error() -> None:
    """As under `--limit`, when a class has no image."""
    from vitask_plugin.eval_tasks import utils

    items = [Probabilities(0, (0.2, 0.8), "binary-class")] * 2
    assert math.isnan(utils.auc(items)) and all(map(math.isnan, utils.auc_ci95(items)))
    assert math.isnan(utils.mean_over_sets([0.5, math.nan], [1, 1], False))
    assert all(map(math.isnan, utils.mean_over_sets([[0.1, 0.2], [math.nan, math.nan]], [1, 1], False)))
