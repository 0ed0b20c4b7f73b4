"""What `vitask calibrate` says: the figures, whether they are worth anything, and rates of no image."""

import io
from typing import Any

import pytest
from rich.console import Console

from vitask_plugin.calibrate_tables import show
from vitask_plugin.record.calibration import Abstention, Calibration, Rate

RATE, NONE = Rate(0.9, 0.7, 0.97, 20), Rate(None, None, None, 0)
CHOICE = {"bias": True, "temperature_nll": 0.6, "bias_nll": 0.5, "gain": 0.1, "error": 0.02}
FOUND = Calibration("scans", True, ("ill", "well"), 1.75, (0.25, -0.25))


def said(calibration: Calibration, after: float, difference: list[float], **more: Any) -> str:
    own = {"before": 0.6, "after": after, "difference": after - 0.6}
    own |= {"before_ci95": [0.5, 0.7], "after_ci95": [0.4, 0.6], "difference_ci95": difference}
    about = {"data": {"path": "val.json"}, "judged_by": None, "training_data": "nothing is known", "images": 40}
    about |= {"choice": CHOICE, "figures": {name: own for name in ("accuracy", "nll", "ece")}, **more}
    console = Console(file=io.StringIO(), width=80)
    show(calibration, about, console)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("after", "difference", "sentence"),
    [
        (0.5, [-0.2, -0.05], None),
        (0.5, [-0.2, 0.01], "falls by no more than chance may give"),
        (0.61, [-0.1, 0.2], "does not fall: these probabilities are better left as they are"),
    ],
)
def test_it_says_whether_the_figures_are_worth_anything(after: float, difference: list, sentence: str | None) -> None:
    text = said(FOUND, after, difference)
    assert ("On held-out images the NLL" in text) == (sentence is not None) and (sentence or "") in text
    assert "scans with exemplars, on held-out folds of the same images" in text and "0.500 to 0.700" in text
    assert "Temperature 1.750; bias ill +0.250, well -0.250 (on held-out images it gains 0.1000 ± 0.0200 nats" in text
    assert "Fitted on 40 images of val.json; nothing is known." in text and "applies these" not in text


def test_without_a_bias_and_with_rates_of_no_image() -> None:
    kept_back = Abstention(0.05, 1.5, NONE, RATE, {"error": NONE, "answered": RATE})
    plain = Calibration("scans", False, ("ill", "well"), 1.75, (0.0, 0.0), abstention=kept_back)
    judged = {"path": "test.json"}
    text = said(plain, 0.5, [-0.2, -0.1], choice=CHOICE | {"bias": False}, judged_by=judged)
    assert "scans without exemplars, on test.json" in text
    assert "Temperature 1.750, which changes no answer; no bias" in text
    assert "Nothing applies these" in text and "go on giving the likeliest class" in text
    assert "wrong n/a (no image), answered 0.900 [0.700, 0.970] of 20; held out: wrong n/a (no image)" in text
