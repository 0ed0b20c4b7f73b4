"""Results folders as runs: one name each, the latest of each task, and the same data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from lmms_output import write_file, write_record, write_run

from vitask_plugin.errors import VITaskError
from vitask_plugin.report.runs import read_runs

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
    flags = {"vitask_stage": 2, "vitask_ep": "cls", "vitask_rda_weight": 1.0, "vitask_crt_weight": 1.0}
    breast, retina, other = (write_record(tmp_path / name, flags) for name in ("breast/llava", "retina/llava", "other"))
    write_run(out, {"breastmnist": 1.0}, root, model_args=f"pretrained={breast},ep=True", date="20260101_000000")
    write_run(out, {"retinamnist": 0.5}, root, model_args=f"pretrained={retina},ep=True", date="20260102_000000")
    (run,) = read_runs([out])
    assert run.name == "vitask"
    assert {task.split("_")[1] for task in run.tasks} == {"breast", "retina"}
    assert run.arguments == {"pretrained": f"{breast} | {retina}", "ep": "True"}
    # A second model on one of the sets is a run of its own.
    write_run(out, {"retinamnist": 0.7}, root, model_args=f"pretrained={other},ep=True", date="20260103_000000")
    assert len(read_runs([out])) == 2


@pytest.mark.parametrize("difference", ["ep", "training", "unknown"])
def test_models_that_differ_in_more_than_their_paths_stay_apart(tmp_path: Path, root: Path, difference: str) -> None:
    flags = {"vitask_stage": 2, "vitask_ep": "cls", "vitask_rda_weight": 1.0, "vitask_crt_weight": 1.0}
    breast = write_record(tmp_path / "breast", flags)
    retina = write_record(tmp_path / "retina", flags | {"vitask_rda_detach": difference != "training"})
    given = [f"pretrained={breast},ep=True", f"pretrained={retina},ep={difference != 'ep'}"]
    if difference == "unknown":
        # Neither is on this machine: nobody knows how they were trained.
        given = ["pretrained=a/breast,ep=True", "pretrained=a/retina,ep=True"]
    write_run(tmp_path / "out", {"breastmnist": 1.0}, root, model_args=given[0], date="20260101_000000")
    write_run(tmp_path / "out", {"retinamnist": 1.0}, root, model_args=given[1], date="20260102_000000")
    runs = read_runs([tmp_path / "out"])
    assert [sorted(run.tasks)[0] for run in runs] == ["medmnist_breast", "medmnist_retina"]
    assert len({run.name for run in runs}) == 2


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
        "star": flags | {"vitask_rda_detach": False},
        "none": flags | {"vitask_ep": "none"},
    }
    for name, record in records.items():
        folder = tmp_path / "checkpoints" / name
        if record:
            write_record(folder, record)
        else:
            folder.mkdir(parents=True)
        write_run(tmp_path / name, BREAST, root, model_args=f"pretrained={folder}")
    write_run(tmp_path / "elsewhere", BREAST, root)
    found = {run.name: run.training for run in read_runs(tmp_path / name for name in (*records, "elsewhere"))}
    terms = {name: training and (training.rda, training.crt) for name, training in found.items()}
    # CRT is a term of stage 2 alone.
    assert terms == {
        "vanilla": (False, False),
        "both": (True, True),
        "stage1": (True, False),
        "off": (False, True),
        "star": (True, True),
        "none": (False, True),  # without exemplars there is no RDA
        "elsewhere": None,
    }
    assert found["both"].text == "stage 2, EP cls, RDA 1, CRT 0.5"
    assert found["star"].text == "stage 2, EP cls, RDA* (not detached) 1, CRT 0.5"


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
