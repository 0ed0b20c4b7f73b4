"""The calibrations of a checkpoint where its label scores are used: `calibrated=True` in `--model_args`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitask_plugin.data.instructions import NO_FINDING, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import read_calibration


def answers_of(classes: Sequence[str], *, multi_label: bool) -> list[str]:
    """What the columns of the scores are of: each class as an answer, of several labels each alone and then none."""
    answers = [response(classes, [label] if multi_label else label) for label in range(len(classes))]
    return [*answers, f"{NO_FINDING}."] if multi_label else answers


class Calibrations:
    """Of one checkpoint, read as they are asked for.

    Args:
        checkpoint: its folder. tsm: hash of the TSM in use, None without. connector: folder of the connector in use, if
            it is not the checkpoint's own.
    """

    def __init__(self, checkpoint: str | Path, tsm: str | None, connector: str | Path | None) -> None:
        self._checkpoint, self._tsm, self._connector = checkpoint, tsm, connector
        self._known: dict[tuple[str, bool], Calibration] = {}

    def of(self, task: str, ep: bool) -> Calibration:
        """The calibration of the data's task, with exemplars or without.

        Raises:
            VITaskError: there is none, or one of other weights.
        """
        if (task, ep) not in self._known:
            found = read_calibration(self._checkpoint, task, ep, tsm=self._tsm, connector=self._connector)
            if found is None:
                raise VITaskError(
                    f"checkpoint {str(self._checkpoint)!r} has no calibration of task {task!r} "
                    f"{'with' if ep else 'without'} exemplars; fit one with `vitask calibrate{' --tsm DIR' * ep}`, or "
                    "leave calibrated=True out"
                )
            self._known[task, ep] = found
        return self._known[task, ep]

    def losses(
        self, task: str | None, ep: bool, question: str, answers: Sequence[str], scores: Any, where: str
    ) -> list[float]:
        """The calibrated losses of one image: their softmax with the sign turned is the calibrated probabilities.

        Args:
            task: of the data. question: as it was asked. answers: what was scored, C texts. scores: float [C] (nats).
            where: names the document.

        Raises:
            VITaskError: the calibration is of another question, other answers or another order of them.
        """
        if task is None:
            raise VITaskError(f"{where} has no labels of a task, so no calibration fits it; leave calibrated=True out")
        calibration = self.of(task, ep)
        expected = answers_of(calibration.classes, multi_label=calibration.multi_label)
        found = [answer.strip() for answer in answers]
        if found != expected:
            raise VITaskError(
                f"{where} has the answers {found}, and the calibration of task {task!r} is for {expected} in this "
                "order; calibrate again with data of these labels"
            )
        if question.strip() != calibration.question:
            raise VITaskError(
                f"{where} asks {question.strip()!r}, and the calibration of task {task!r} is for the answers to "
                f"{calibration.question!r}; calibrate again with data that asks this"
            )
        return (-calibration.scaled(scores)).tolist()
