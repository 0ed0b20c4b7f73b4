"""The groups `vitask_sets*`: a task for each set of a folder of `vitask data merge`, named and judged like it."""

import json
import shutil
from pathlib import Path

import pytest
from lmms_eval.tasks import TaskManager, get_task_dict
from vitask_plugin.eval_tasks.sets import task_names

from vitask_plugin.cli import main
from vitask_plugin.data.instructions import read_samples

TASKS = Path(__file__).parents[2] / "eval_tasks"


@pytest.fixture
def load(monkeypatch):
    """Tasks by name of a group, as lmms-eval makes them."""

    def make(group: str, folder: Path, split: str = "test"):
        monkeypatch.setenv("VITASK_FOLDER", str(folder))
        monkeypatch.setenv("VITASK_SPLIT", split)
        manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False, model_name="vitask_llava")
        (outer,) = get_task_dict([group], manager).values()
        (members,) = outer.values()
        return members

    return make


def own_set(source: Path, folder: Path) -> Path:
    """A data set of one's own: MedMNIST's pictures under another task."""
    shutil.copytree(source, folder)
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("medmnist_", "of_"))
    return folder


@pytest.fixture
def three(twelve, tmp_path) -> Path:
    folders = [own_set(twelve / "breastmnist", tmp_path / "scans"), twelve / "chestmnist", twelve / "retinamnist"]
    assert main(["data", "merge", *map(str, folders), "--out", str(tmp_path / "three")]) == 0
    return tmp_path / "three"


@pytest.mark.parametrize("ending", ["", "_incomplete", "_score"])
def test_each_set_is_a_task_with_its_own_words(three, load, ending):
    tasks = load(f"vitask_sets{ending}", three)
    assert [*tasks] == [f"{name}{ending}" for name in ("vitask_scans", "medmnist_chest", "medmnist_retina")]
    for (name, task), folder in zip(tasks.items(), ("scans", "chestmnist", "retinamnist"), strict=True):
        rows, expected = task.test_docs(), read_samples(three / folder / "test.json")
        assert [row["vitask"] for row in rows] == [sample["vitask"] for sample in expected], name
        assert {row["file"] for row in rows} == {f"three/{folder}/test.json"}
        question = expected[0]["conversations"][0]["value"].removeprefix("<image>\n")
        asked = question.split(" The possible")[0] if ending == "_incomplete" else question
        assert task.doc_to_text(rows[0]) == asked
        assert task.config.output_type == ("multiple_choice" if ending == "_score" else "generate_until")
    assert len(tasks[f"medmnist_chest{ending}"].test_docs()[0]["candidates"]) == 15


def test_the_split_is_chosen_as_for_one_folder(three, load):
    (task, *_) = load("vitask_sets", three, "val").values()
    assert task.config.test_split == "val" and {row["split"] for row in task.test_docs()} == {"val"}


def test_sets_are_named_after_their_folders_but_for_medmnists_own():
    def labels(task: str, choices: tuple[str, ...] = ("malignant", "normal or benign")) -> dict:
        return {"task": task, "choices": [*choices]}

    sets = {
        **{"breastmnist": labels("medmnist_breast"), "north": labels("medmnist_oct"), "x_score": labels("x")},
        **{"folder": labels("y"), "one": labels("z"), "two": labels("z")},
    }
    assert task_names(sets) == {
        **{"breastmnist": "medmnist_breast", "north": "vitask_north", "x_score": "vitask_x-score"},
        **{"folder": "vitask_folder-set", "one": "vitask_one", "two": "vitask_two"},
    }
    assert task_names({"a": labels("medmnist_breast"), "b": labels("medmnist_breast")}) == {
        "a": "vitask_a",
        "b": "vitask_b",
    }


def stopped(load, group: str, folder: Path) -> str:
    with pytest.raises(SystemExit) as found:
        load(group, folder)
    assert str(found.value).startswith("vitask: error: ") and "\n" not in str(found.value)
    return str(found.value)


def test_another_kind_of_folder_is_one_sentence(three, twelve, load, tmp_path, monkeypatch):
    assert "is not of several data sets; put them" in stopped(load, "vitask_sets_score", twelve / "breastmnist")
    assert "labels.json' does not exist" in stopped(load, "vitask_sets", tmp_path)
    monkeypatch.setenv("VITASK_FOLDER", str(three))
    manager = TaskManager("ERROR", include_path=str(TASKS), include_defaults=False)
    with pytest.raises(SystemExit) as found:
        get_task_dict(["vitask_folder"], manager)
    assert "has the label sets of several data sets, scans, chestmnist, retinamnist; give the" in str(found.value)
    # A set that was moved away.
    shutil.rmtree(tmp_path / "scans")
    with pytest.raises(SystemExit) as found:
        load("vitask_sets", three)
    assert "labels.json' does not exist" in str(found.value)


def test_the_data_of_a_set_are_looked_at(three, load, tmp_path):
    samples = json.loads((tmp_path / "scans" / "test.json").read_text())
    samples[0]["image"] = "test/none.png"
    (tmp_path / "scans" / "test.json").write_text(json.dumps(samples))
    assert "none.png" in stopped(load, "vitask_sets", three)
