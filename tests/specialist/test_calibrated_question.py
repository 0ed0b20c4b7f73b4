"""Which calibration a specialist takes, and that lmms-eval's tasks take and refuse the same."""

from pathlib import Path

import pytest

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import answers_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.calibrated import Calibrations
from vitask_plugin.record.calibration import Abstention, Calibration, Rate, Threshold
from vitask_plugin.record.calibration_file import connector_hash, write_calibration
from vitask_plugin.specialist.calibrated import CalibratedQuestion
from vitask_plugin.specialist.question import Question

ASKED = Question("scans", ("ill", "well"), "What is it?", "binary-class")


def folder(path: Path, weights: bytes) -> Path:
    path.mkdir()
    (path / "model.safetensors").write_bytes(weights)
    (path / "vitask_connector.safetensors").write_bytes(weights)
    return path


@pytest.mark.parametrize("question", ["", "What else?"])
def test_one_of_another_question_or_of_none_is_refused(question: str, tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "checkpoint", b"1")
    made = Calibration("scans", False, ASKED.choices, 2.0, (0.0, 0.0), question=question)
    write_calibration(checkpoint, made, {})
    known = Calibrations(checkpoint, None, None)
    for wanted in (None, True):
        with pytest.raises(VITaskError, match="task 'scans' here asks 'What is it\\?'"):
            CalibratedQuestion(known, ASKED, wanted).of((False,))
    assert CalibratedQuestion(known, ASKED, False).of((False,)) == [None]
    with pytest.raises(VITaskError, match="give calibrated=False"):
        known.fitting("scans", False, ASKED.answers, ASKED.text, "document 1")


def test_a_learned_prefix_in_another_folder_is_the_one_that_was_calibrated(tmp_path: Path) -> None:
    """It needs no TSM, and its file is looked at all the same."""
    checkpoint, other = folder(tmp_path / "checkpoint", b"1"), folder(tmp_path / "other", b"2")
    more = {"question": ASKED.text, "connector": connector_hash(other)}
    made = Calibration("scans", True, ASKED.choices, 2.0, (0.0, 0.0), **more)
    write_calibration(checkpoint, made, {})
    assert made.connector is not None
    assert CalibratedQuestion(Calibrations(checkpoint, None, other), ASKED, True).of((True,)) == [made]
    with pytest.raises(VITaskError, match="exemplars of another connector"):
        CalibratedQuestion(Calibrations(checkpoint, None, None), ASKED, None).of((True,))


def test_without_one_none_is_used_unless_it_is_wanted(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "checkpoint", b"1")
    known = Calibrations(checkpoint, None, None)
    write_calibration(checkpoint, Calibration("scans", False, ASKED.choices, 2.0, (0.0,) * 2, question=ASKED.text), {})
    assert CalibratedQuestion(known, ASKED, None).of((False, True)) == [None, None]
    with pytest.raises(VITaskError, match="no calibration of task 'scans' with exemplars; fit one with"):
        CalibratedQuestion(known, ASKED, True).of((False, True))


def test_thresholds_that_decide_nothing_are_said_to(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "checkpoint", b"1")
    rate = Rate(0.9, 0.7, 0.97, 20)
    own = Threshold("ill", "sensitivity", 0.9, 0.2, rate, rate, {"sensitivity": rate, "specificity": rate})
    kept_back = Abstention(0.05, 0.7, rate, rate, {"error": rate, "answered": rate})
    for more in ({"thresholds": (own,)}, {"abstention": kept_back}, {}):
        made = Calibration("scans", False, ASKED.choices, 2.0, (0.0,) * 2, question=ASKED.text, **more)
        write_calibration(checkpoint, made, {})
        line = CalibratedQuestion(Calibrations(checkpoint, None, None), ASKED, None).line((False,))
        assert line.startswith("calibrated (temperature 2)")
        assert ("its thresholds are not applied" in line) is bool(more)


def test_the_answers_that_are_scored() -> None:
    assert ASKED.answers == answers_of(ASKED.choices, multi_label=False) == ["ill.", "well."]
    several = Question("scans", ("ill", "well"), "What is it?", MULTI_LABEL)
    assert several.answers == answers_of(ASKED.choices, multi_label=True) == ["ill.", "well.", "no finding."]
