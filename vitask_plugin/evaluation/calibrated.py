"""The calibrations of a checkpoint where its label scores are used: in lmms-eval's tasks and by a specialist."""

from collections.abc import Sequence
from pathlib import Path

from vitask_plugin.data.instructions import answers_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import read_calibration


class Calibrations:
    """Of one checkpoint, read as they are asked for.

    Args:
        checkpoint: its folder. tsm: hash of the TSM in use, None without. connector: folder of the connector in use, if
            it is not the checkpoint's own.
    """

    def __init__(self, checkpoint: str | Path, tsm: str | None, connector: str | Path | None) -> None:
        self._checkpoint, self._tsm, self._connector = checkpoint, tsm, connector
        self._known: dict[tuple[str, bool], Calibration | None] = {}

    def of(self, task: str, ep: bool) -> Calibration | None:
        """The calibration of the data's task, with exemplars or without; None where there is none.

        Raises:
            VITaskError: it is damaged, or of other weights.
        """
        if (task, ep) not in self._known:
            found = read_calibration(self._checkpoint, task, ep, tsm=self._tsm, connector=self._connector)
            self._known[task, ep] = found
        return self._known[task, ep]

    def needed(self, task: str, ep: bool) -> Calibration:
        """`of`, where there has to be one.

        Raises:
            VITaskError: there is none, or see `of`.
        """
        found = self.of(task, ep)
        if found is None:
            raise VITaskError(
                f"checkpoint {str(self._checkpoint)!r} has no calibration of task {task!r} "
                f"{'with' if ep else 'without'} exemplars; fit one with `vitask calibrate{' --tsm DIR' * ep}`, or "
                "leave calibrated=True out"
            )
        return found

    def fitting(self, task: str, ep: bool, answers: Sequence[str], question: str, where: str) -> Calibration:
        """`needed`, for the scores of these answers to this question.

        Args:
            answers: what is scored, C texts. question: as it is asked. where: what is asked about, opens the sentence.

        Raises:
            VITaskError: it is of another question, other answers or another order of them, or see `needed`.
        """
        calibration = self.needed(task, ep)
        expected = answers_of(calibration.classes, multi_label=calibration.multi_label)
        found = [answer.strip() for answer in answers]
        if found != expected:
            raise VITaskError(
                f"{where} has the answers {found}, and the calibration of task {task!r} is for {expected} in this "
                "order; calibrate again with data of these labels, or give calibrated=False"
            )
        if question.strip() != calibration.question:
            raise VITaskError(
                f"{where} asks {question.strip()!r}, and the calibration of task {task!r} is for the answers to "
                f"{calibration.question!r}; calibrate again with data that asks this, or give calibrated=False"
            )
        return calibration
