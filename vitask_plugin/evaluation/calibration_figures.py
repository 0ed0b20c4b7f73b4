"""Accuracy, NLL and calibration error before and after a calibration, with 95% intervals, and of the difference too."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vitask_plugin.evaluation import intervals, paired
from vitask_plugin.inference import metrics
from vitask_plugin.inference.calibration import Round, untouched
from vitask_plugin.inference.metrics import Outcome, Probabilities
from vitask_plugin.record.calibration import Calibration

SHOWN = ("accuracy", "nll", "ece")
Items = list[Outcome] | list[Probabilities]


def figures(rounds: Sequence[Round], kind: str) -> dict[str, dict[str, Any]]:
    """{metric: {"before", "after", "difference", and each with its interval as "..._ci95"}} on the judged images of all
    rounds together.

    Args:
        kind: `medmnist`'s word for the task.
    """
    before, after = _items(rounds, kind, calibrated=False), _items(rounds, kind, calibrated=True)
    found = {}
    for name in SHOWN:
        sides = {"before": before[name], "after": after[name]}
        values = {side: getattr(metrics, name)(items) for side, items in sides.items()}
        values["difference"] = values["after"] - values["before"]
        ends = {side: intervals.interval(name, items) for side, items in sides.items()}
        ends["difference"] = paired.over_samples(name, [(before[name], after[name])])
        found[name] = values | {f"{side}_ci95": interval for side, interval in ends.items()}
    return found


def _items(rounds: Sequence[Round], kind: str, *, calibrated: bool) -> dict[str, Items]:
    def likely(calibration: Calibration, scores: np.ndarray) -> np.ndarray:
        return (calibration if calibrated else untouched(calibration)).probabilities(scores)

    rows = [row for one in rounds for row in likely(one.calibration, one.judged.scores).tolist()]
    targets = [target for one in rounds for target in one.judged.targets.tolist()]
    outcomes = [Outcome(target, metrics.decide(row, kind)) for target, row in zip(targets, rows, strict=True)]
    items = [Probabilities(target, row, kind) for target, row in zip(targets, rows, strict=True)]
    return {"accuracy": outcomes, "nll": items, "ece": items}
