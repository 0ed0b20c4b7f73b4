"""Results folders as runs: one name each, the latest of each task, and the same data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lmms_output import write_file, write_run

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.report.runs import read_runs

BREAST = {"breastmnist": 1.0}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_file(tmp_path / "data", "breastmnist")
    write_file(tmp_path / "data", "retinamnist")
    return tmp_path / "data"


def names(*folders: Path) -> list[str]:
    return [run.name for run in read_runs(folders)]


def test_a_run_is_named_after_its_folder(tmp_path: Path, root: Path) -> None:
    for name in ("with", "without"):
        write_run(tmp_path / name, BREAST, root)
    assert names(tmp_path / "without", tmp_path / "with") == ["without", "with"]
    # One folder may hold several.
    assert sorted(names(tmp_path)) == ["with", "without"]
    # A folder that is given twice is there once.
    assert names(tmp_path / "with", tmp_path / "with") == ["with"]


def test_runs_in_one_folder_are_told_apart_by_model_or_arguments(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "out", BREAST, root, model_args="pretrained=llava", date="20260101_000000")
    write_run(tmp_path / "out", BREAST, root, model_args="pretrained=llava,tsm=a/tsm", date="20260102_000000")
    assert names(tmp_path / "out") == ["out/llava", "out/llava (tsm=tsm)"]
    (tmp_path / "out/somewhere__llava").rename(tmp_path / "out/somewhere__first")
    write_run(tmp_path / "more", BREAST, root)
    (tmp_path / "more/somewhere__llava").rename(tmp_path / "out/somewhere__second")
    for path in (tmp_path / "out/somewhere__first").glob("20260102*"):
        path.unlink()
    assert names(tmp_path / "out") == ["first", "second"]


def test_specialists_of_one_folder_are_one_run(tmp_path: Path, root: Path) -> None:
    out = tmp_path / "vitask"
    write_run(out, {"breastmnist": 1.0}, root, model_args="pretrained=breast/llava", date="20260101_000000")
    write_run(out, {"retinamnist": 0.5}, root, model_args="pretrained=retina/llava", date="20260102_000000")
    (run,) = read_runs([out])
    assert run.name == "vitask"
    assert {task.split("_")[1] for task in run.tasks} == {"breast", "retina"}
    assert run.arguments == {"pretrained": "breast/llava | retina/llava"}
    # A second model on one of the sets is a run of its own.
    write_run(out, {"retinamnist": 0.7}, root, model_args="pretrained=other/llava", date="20260103_000000")
    assert len(read_runs([out])) == 2


def test_a_model_without_a_folder_of_its_own(tmp_path: Path, root: Path) -> None:
    path = write_run(tmp_path / "dummy", BREAST, root, model="dummy", model_args="")
    record = json.loads(path.read_text()) | {"model_name_sanitized": ""}
    path.write_text(json.dumps(record))
    for file in path.parent.iterdir():
        file.rename(tmp_path / "dummy" / file.name)
    (run,) = read_runs([tmp_path / "dummy"])
    assert (run.name, run.model, run.arguments) == ("dummy", "dummy", {})


def test_folders_of_one_name_are_told_apart_by_their_paths(tmp_path: Path, root: Path) -> None:
    for name in ("a/out", "b/out"):
        write_run(tmp_path / name, BREAST, root)
    assert names(tmp_path / "a", tmp_path / "b") == ["a/out", "b/out"]


def test_checkpoints_of_one_name_are_told_apart_by_their_parents(tmp_path: Path, root: Path) -> None:
    for place in ("breast", "retina"):
        write_run(tmp_path / "out", BREAST, root, model_args=f"pretrained={place}/llava")
        (tmp_path / "out/somewhere__llava").rename(tmp_path / f"out/{place}__llava")
    assert sorted(names(tmp_path / "out")) == ["out/breast__llava", "out/retina__llava"]


def test_runs_that_nothing_short_tells_apart_are_numbered(tmp_path: Path, root: Path) -> None:
    for day, tsm in enumerate(("a/tsm", "b/tsm"), start=1):
        write_run(tmp_path / "out", BREAST, root, model_args=f"tsm={tsm}", date=f"2026010{day}_000000")
    assert names(tmp_path / "out") == ["out/llava (tsm=tsm) #1", "out/llava (tsm=tsm) #2"]


def test_of_each_task_the_latest_result_counts(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "out", {"breastmnist": 9.0, "retinamnist": 0.0}, root, date="20260101_000000")
    write_run(tmp_path / "out", {"breastmnist": 0.0}, root, variants=("",), date="20260102_000000")
    (run,) = read_runs([tmp_path / "out"])
    assert {task for task in run.tasks if "retina" in task} and run.tasks["medmnist_breast"].source.name.startswith(
        "20260102"
    )
    assert run.tasks["medmnist_breast_score"].source.name.startswith("20260101")


def test_arguments_and_exemplars(tmp_path: Path, root: Path) -> None:
    arguments = {
        "plain": "pretrained=x",
        "tsm": "pretrained=x,tsm=t",
        "off": "pretrained=x,tsm=t,ep=False",
        "on": "tsm=t,ep=True",
    }
    for name, given in arguments.items():
        write_run(tmp_path / name, BREAST, root, model_args=given)
    runs = {run.name: run for run in read_runs(tmp_path / name for name in arguments)}
    assert {name: run.ep for name, run in runs.items()} == {"plain": False, "tsm": True, "off": False, "on": True}
    assert runs["off"].arguments == {"pretrained": "x", "tsm": "t", "ep": "False"}


def test_what_the_checkpoint_says_of_its_training(tmp_path: Path, root: Path) -> None:
    flags = {"vitask_stage": 2, "vitask_ep": "cls", "vitask_rda_weight": 1.0, "vitask_crt_weight": 0.5}
    records = {
        "vanilla": None,
        "both": flags,
        "stage1": flags | {"vitask_stage": 1},
        "off": flags | {"vitask_rda_weight": 0},
    }
    for name, record in records.items():
        checkpoint = tmp_path / "checkpoints" / name
        checkpoint.mkdir(parents=True)
        if record:
            (checkpoint / "vitask.json").write_text(json.dumps({"arguments": record}))
        write_run(tmp_path / name, BREAST, root, model_args=f"pretrained={checkpoint}")
    write_run(tmp_path / "elsewhere", BREAST, root)
    found = {run.name: run.training for run in read_runs(tmp_path / name for name in (*records, "elsewhere"))}
    terms = {name: training and (training.rda, training.crt) for name, training in found.items()}
    # CRT is a term of stage 2 alone.
    assert terms == {
        "vanilla": (False, False),
        "both": (True, True),
        "stage1": (True, False),
        "off": (False, True),
        "elsewhere": None,
    }
    assert found["both"].text == "stage 2, EP cls, RDA 1, CRT 0.5"


def test_results_of_no_task_of_ours_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m/2026_results.json").write_text('{"results": {"mme": {"score,none": 1}}, "versions": {}}')
    with pytest.raises(VITaskError, match="holds results of lmms-eval, but of none of our tasks"):
        read_runs([tmp_path])


def test_runs_on_different_labels_are_refused(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "one", BREAST, root)
    with np.load(root / "breastmnist.npz") as file:
        arrays = dict(file)
    arrays["test_labels"][5] = 1 - arrays["test_labels"][5]
    np.savez(root / "breastmnist.npz", **arrays)
    write_run(tmp_path / "two", BREAST, root)
    with pytest.raises(
        VITaskError, match=r"mixed data: image 5 of 'medmnist_breast' has label .*two.*one.*report them apart"
    ):
        read_runs([tmp_path / "one", tmp_path / "two"])
    assert names(tmp_path / "two") == ["two"]


def test_runs_on_different_files_are_refused(tmp_path: Path, root: Path) -> None:
    write_run(tmp_path / "one", BREAST, root)
    for path in write_run(tmp_path / "two", BREAST, root).parent.glob("*.jsonl"):
        path.write_text(path.read_text().replace("breastmnist.npz", "breastmnist_224.npz"))
    sentence = "mixed data: 'medmnist_breast' of 'two' was judged on 'breastmnist_224.npz'"
    with pytest.raises(VITaskError, match=re.escape(sentence)):
        read_runs([tmp_path / "one", tmp_path / "two"])
