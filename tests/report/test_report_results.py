"""What lmms-eval wrote, read back, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from lmms_output import write_file, write_own_folder, write_run

from vitask_plugin.errors import VITaskError
from vitask_plugin.inference import metrics
from vitask_plugin.report import means
from vitask_plugin.report.results import TASK_VERSION, read_results, split_task
from vitask_plugin.report.runs import read_runs

SAMPLES = "20260101_000000_samples_medmnist_breast.jsonl"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("breastmnist", "chestmnist", "retinamnist"):
        write_file(tmp_path / "data", name, 40)
    return tmp_path / "data"


def test_figures_intervals_and_samples_are_read(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "out", {"breastmnist": 1.0, "chestmnist": 1.0, "retinamnist": 1.0}, root)
    results = read_results(tmp_path / "out")
    assert len(results) == 9
    for task, result in results.items():
        # What is read back gives the figures that were reported.
        assert len(result.answers) == result.metrics["n"] == 40
        assert result.images == (40, 40)
        assert list(result.answers) == sorted(result.answers)
        for name in ("accuracy", "macro_f1", "balanced_accuracy"):
            assert getattr(metrics, name)(result.outcomes) == pytest.approx(result.metrics[name], abs=1e-12)
            low, high = result.intervals[name]
            assert low <= result.metrics[name] <= high and low < high
        scored = split_task(task)[1] == "score"
        assert all(
            bool(a.probabilities) == bool(a.log_likelihoods) == scored != bool(a.text) for a in result.answers.values()
        )
        assert not any(name.endswith("_ci95") for name in result.metrics)
    assert results["medmnist_breast"].data.choices == ("malignant", "normal or benign")
    assert results["medmnist_chest"].data.multi_label
    assert (
        results["medmnist_breast"].metrics["unmapped"]
        == sum(answer.prediction is None for answer in results["medmnist_breast"].answers.values())
        > 0
    )


def test_the_latest_results_are_read(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "b", {"breastmnist": 0.0}, root, date="20260101_000000")
    write_run(tmp_path / "a", {"retinamnist": 9.0}, root, date="20260201_000000")
    assert set(read_results(tmp_path)) == {"medmnist_retina", "medmnist_retina_incomplete", "medmnist_retina_score"}


def test_without_samples_there_are_figures_alone(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "out", {"breastmnist": 1.0}, root, samples=False)
    result = read_results(tmp_path / "out")["medmnist_breast"]
    assert result.metrics["n"] == 40 and result.answers == {} and result.data is None


def test_a_figure_that_is_no_number_is_none(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root)
    record = json.loads(path.read_text())
    record["results"]["medmnist_breast_score"] |= {"auc,none": float("nan"), "auc_ci95,none": [float("nan")] * 2}
    record["results"]["medmnist_breast_score"]["ece,none"] = "N/A"
    path.write_text(json.dumps(record))
    result = read_results(tmp_path / "out")["medmnist_breast_score"]
    assert result.metrics["auc"] is None and result.metrics["ece"] is None
    assert "auc" not in result.intervals


def test_the_version_is_that_of_the_tasks(tmp_path: Path, root: Path) -> None:
    record = json.loads(write_run(tmp_path / "out", {"breastmnist": 1.0}, root).read_text())
    assert set(record["versions"].values()) == {TASK_VERSION}


def test_folders_that_hold_no_results(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(VITaskError, match=r"empty' holds no results of lmms-eval .* the evaluation failed"):
        read_results(tmp_path / "empty")
    with pytest.raises(VITaskError, match=r"'.*nowhere' does not exist; give the --output_path"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(VITaskError, match="file' is no folder"):
        read_results(tmp_path / "file")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not readable JSON"),
        ("[]", r"the whole is \[\]; expected an object; this is not a results file of lmms-eval"),
        ('{"results": {}}', "/versions is missing; this is not a results file of lmms-eval"),
        (
            '{"results": {}, "versions": {}, "n-samples": {"a": {"effective": -1, "original": 2}}}',
            "/n-samples/a/effective",
        ),
        (
            '{"results": {"medmnist_breast": 1}, "versions": {}}',
            "/results/medmnist_breast is 1; expected an object; this is not a results file",
        ),
    ],
)
def test_a_file_of_figures_that_is_none(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "20260101_000000_results.json").write_text(text)
    with pytest.raises(VITaskError, match=f"20260101_000000_results.*{sentence}"):
        read_results(tmp_path)


def test_another_version_of_a_task_is_refused(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root)
    path.write_text(path.read_text().replace('"medmnist_breast": 2.0', '"medmnist_breast": 1.0'))
    with pytest.raises(
        VITaskError,
        match=r"_results.json': task 'medmnist_breast' is of version 1.0, .* version 2.0, .* evaluate it again",
    ):
        read_results(tmp_path / "out")


def drop(lines: list[dict]) -> list[dict]:
    return lines[:-1]


def repeat(lines: list[dict]) -> list[dict]:
    return [*lines[:-1], lines[0]]


def older(lines: list[dict]) -> list[dict]:
    del lines[2]["n"]
    return lines


def unlabelled(lines: list[dict]) -> list[dict]:
    del lines[2]["n"]["label"]
    return lines


def other_data(lines: list[dict]) -> list[dict]:
    lines[2]["n"]["file"] = "breastmnist_224.npz"
    return lines


def other(**values) -> Callable[[list[dict]], list[dict]]:
    def change(lines: list[dict]) -> list[dict]:
        lines[2]["n"] |= values
        return lines

    return change


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"probabilities": [0.7, 0.7]},
            "/n/probabilities are 2 numbers whose sum is 1.4; expected 2",
        ),
        ({"probabilities": [1.5, -0.5]}, "/n/probabilities/0 is 1.5; expected less than or equal to 1"),
        ({"probabilities": [1.0]}, "/n/probabilities are 1 numbers"),
        ({"log_likelihoods": [-1.0]}, "/n/log_likelihoods are 1 numbers; expected 2, one of each possible answer"),
        ({"log_likelihoods": [-1.0, float("nan")]}, "/n/log_likelihoods/1 is nan; expected a finite number"),
    ],
)
def test_probabilities_that_are_none_are_refused(tmp_path: Path, root: Path, values: dict, sentence: str) -> None:
    scored = SAMPLES.replace(".jsonl", "_score.jsonl")
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root).with_name(scored)
    lines = other(**values)([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(VITaskError, match=f"{scored}', line 3: .*{sentence}"):
        read_results(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop, "holds 39 samples, but 40 were judged; evaluate it again"),
        (repeat, "line 40: image 0 is there twice"),
        (older, "line 3: not a sample as the tasks of version 2.0 log it"),
        (unlabelled, "line 3: not a sample as the tasks of version 2.0 log it.* /n/label is missing; evaluate"),
        (other(label=2), "line 3: .*/n/label is 2; expected an index of the 2 choices; evaluate it again"),
        (other(prediction=-1), "line 3: .*/n/prediction is -1; expected greater than or equal to 0"),
        (other(prediction=[1]), r"line 3: .*/n/prediction is \[1\]; expected an index of the 2 choices"),
        (other(kind="guess"), "line 3: .*/n/kind is 'guess'; expected 'multi-class'"),
        (other(strict="malignant"), "line 3: .*/n/strict is 'malignant'; expected"),
        (other_data, "line 3: judged on 'breastmnist_224.npz' .* earlier lines on 'breastmnist.npz'"),
    ],
)
def test_damaged_samples_are_refused(
    tmp_path: Path, root: Path, change: Callable[[list[dict]], list[dict]], sentence: str
) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root).with_name(SAMPLES)
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(VITaskError, match=f"{SAMPLES}'.* {sentence}|{SAMPLES}', {sentence}"):
        read_results(tmp_path / "out")


def test_a_cut_line_and_a_file_that_is_no_text(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root).with_name(SAMPLES)
    text = path.read_text()
    path.write_text(text[: len(text) - 20])
    with pytest.raises(VITaskError, match="line 40: not a sample"):
        read_results(tmp_path / "out")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(VITaskError, match="is not text"):
        read_results(tmp_path / "out")


def test_groups_and_tasks_of_others_are_read_as_they_are(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root)
    record = json.loads(path.read_text())
    record["results"] |= {"medmnist_score": {"auc,none": 0.5}, "mme": {"score,none": 3, "score_stderr,none": 1}}
    record["group_subtasks"] = {"medmnist_score": ["medmnist_breast_score"], "mme": []}
    record["versions"]["mme"] = "Yaml"
    path.write_text(json.dumps(record))
    results = read_results(tmp_path / "out")
    assert results["medmnist_score"].group and results["medmnist_score"].metrics == {"auc": 0.5}
    assert not results["mme"].group and results["mme"].metrics == {"score": 3}
    assert not results["medmnist_breast"].group


def test_a_group_of_a_group_is_of_the_split_of_its_tasks(tmp_path: Path, root: Path) -> None:
    """As `vitask_sets` is, whose sets are a group of their own."""
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root, split="val")
    record = json.loads(path.read_text())
    record["results"] |= {"vitask_sets": {"accuracy,none": 0.5}, "vitask_sets of all": {" ": " "}}
    record["group_subtasks"] = {"vitask_sets of all": ["medmnist_breast"], "vitask_sets": ["vitask_sets of all"]}
    path.write_text(json.dumps(record))
    results = read_results(tmp_path / "out")
    assert results["vitask_sets@val"].group and results["vitask_sets@val"].metrics == {"accuracy": 0.5}
    (run,) = read_runs([tmp_path / "out"])
    (table,) = means.section([run]).blocks
    assert [[cell if isinstance(cell, str) else cell.text for cell in row] for row in table.rows] == [
        ["vitask_sets (val)", "out", "0.500", *["\u2013"] * 4]
    ]


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("medmnist_breast", ("medmnist_breast", "")),
        ("medmnist_breast_score", ("medmnist_breast", "score")),
        ("vitask_drawn_incomplete", ("vitask_drawn", "incomplete")),
    ],
)
def test_a_task_is_a_data_set_and_a_variant(task: str, parts: tuple[str, str]) -> None:
    assert split_task(task) == parts


def test_another_version_of_a_group_is_refused(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "out", {"breastmnist": 1.0}, root, variants=("",))
    record = json.loads(path.read_text())
    record["results"] |= {"medmnist": {"accuracy,none": 0.5}, "mmlu": {"acc,none": 0.5}}
    record["group_subtasks"] = {"medmnist": ["medmnist_breast"], "mmlu": ["mmlu_anatomy"]}
    record["versions"] |= {"medmnist": TASK_VERSION, "mmlu": 1.0}
    path.write_text(json.dumps(record))
    assert read_results(tmp_path / "out")["medmnist"].group
    record["versions"]["medmnist"] = 1.0
    path.write_text(json.dumps(record))
    with pytest.raises(VITaskError, match=r"task 'medmnist' is of version 1\.0"):
        read_results(tmp_path / "out")


def test_without_samples_ones_own_folder_keeps_its_tasks_name(tmp_path: Path, root: Path) -> None:
    write_own_folder(tmp_path / "aptos", "retinamnist", root)
    write_run(tmp_path / "out", {"retinamnist": 1.0}, root, own=tmp_path / "aptos", variants=("score",), samples=False)
    assert list(read_results(tmp_path / "out")) == ["vitask_folder_score"]
