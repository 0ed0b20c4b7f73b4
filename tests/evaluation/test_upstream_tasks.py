"""`eval_tasks/upstream/`: what the command writes, needs nothing of ours, reads answers as our tasks do.

`test_tasks.py` compares both in one run of lmms-eval.
"""

import importlib.util
import itertools
import os
from pathlib import Path
from types import ModuleType

import pytest
from vitask_plugin.eval_tasks import utils as ours

from vitask_plugin.data.instructions import DRAWN, LabelSet, label_sets

ROOT = Path(__file__).parents[2]
UPSTREAM = ROOT / "eval_tasks" / "upstream"
FOLDER = UPSTREAM / "lmms_eval" / "tasks" / "medmnist"
SETS = [known for known in label_sets().values() if known != DRAWN]


def module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def theirs() -> ModuleType:
    return module(FOLDER / "utils.py")


def test_the_folder_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = module(ROOT / "tools" / "upstream_tasks.py")
    assert command.differences() == []
    for path in FOLDER.glob("*[!c]"):
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "breastmnist.yaml").unlink()
    (tmp_path / "utils.py").write_text("changed = True\n")
    monkeypatch.setattr(command, "FOLDER", tmp_path)
    assert command.differences() == ["breastmnist.yaml", "utils.py"]


def test_nothing_of_ours_is_imported() -> None:
    found = [path for part in ("lmms_eval", "test") for path in (UPSTREAM / part).rglob("*.*") if path.suffix != ".pyc"]
    assert len(found) > 50
    assert [path.name for path in found if "vitask_plugin" in path.read_text()] == []


def test_their_own_test_passes(capsys: pytest.CaptureFixture[str]) -> None:
    """With the settings of no project; in this process, where lmms-eval is imported already."""
    path = UPSTREAM / "test" / "eval" / "test_medmnist.py"
    words = ["-q", "-p", "no:cacheprovider", "--rootdir", str(UPSTREAM), "-c", os.devnull, str(path)]
    assert pytest.main(words) == 0
    assert "12 passed" in capsys.readouterr().out


def answers(known: LabelSet) -> list[str]:
    """Answers of every kind: plain ones, in sentences, denied, of two labels, of none."""
    names = known.choices
    said = [f"{names[-1]}.", names[0].upper(), f"The image shows {names[1]}.", f"It is not {names[0]}."]
    return [*said, f"{names[0]} or {names[-1]}", "No finding.", "I cannot tell.", ""]


@pytest.mark.parametrize("known", SETS, ids=lambda known: known.flag)
def test_answers_are_read_as_our_tasks_read_them(known: LabelSet, theirs: ModuleType) -> None:
    choices, own, other = list(known.choices), [], []
    for index, answer in itertools.product(range(len(choices)), answers(known)):
        labels = [index, (index + 1) % len(choices)][: 1 + known.multi_label]
        block = {"task": known.task, "label": labels if known.multi_label else index, "choices": choices}
        doc = {**dict.fromkeys(("file", "split", "index")), "kind": known.kind, "vitask": block}
        own.append(ours.answer_results(doc, [answer]))
        doc = {"choices": choices, "labels": labels, "multi_label": known.multi_label}
        other.append(theirs.medmnist_process_results(doc, [answer]))
    values = {name: [one[name] for one in own] for name in ("accuracy", "macro_f1", "unmapped")}
    assert [one["accuracy"] for one in other] == values["accuracy"] and sum(values["accuracy"]) > 0
    assert theirs.medmnist_macro_f1([one["macro_f1"] for one in other]) == ours.macro_f1(values["macro_f1"]) > 0
    assert theirs.medmnist_unmapped([one["unmapped"] for one in other]) == sum(values["unmapped"]) > 0
