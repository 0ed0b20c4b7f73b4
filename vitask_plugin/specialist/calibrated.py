"""Which calibration the probabilities go through, if any."""

import logging
from collections.abc import Sequence
from pathlib import Path

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.record.calibration_file import read_calibration
from vitask_plugin.specialist.question import Question

logger = logging.getLogger(__name__)


class Calibrations:
    """Those beside a checkpoint, for one question.

    Args:
        connector: folder of the one in use, if it is not the checkpoint's own.
        wanted: None = where there is one.
    """

    def __init__(
        self, folder: str, question: Question, model: AskedModel, connector: str | Path | None, wanted: bool | None
    ) -> None:
        self._folder, self._question, self._model = folder, question, model
        self._connector, self._wanted = connector, wanted
        self._known: dict[tuple[bool, ...], list[Calibration | None]] = {}

    def of(self, ways: Sequence[bool]) -> list[Calibration | None]:
        """One for each way to ask, without exemplars or with them; none at all where one of them has none.

        Raises:
            VITaskError: it is wanted and absent, damaged, or made for other weights, labels or words.
        """
        key = tuple(ways)
        if key not in self._known:
            found = [None if self._wanted is False else self._read(prompted) for prompted in key]
            self._known[key] = found if None not in found else [None] * len(found)
            logger.info("task %r: probabilities are %s", self._question.task, self.line(key))
        return self._known[key]

    def line(self, ways: Sequence[bool]) -> str:
        """What happens to the probabilities, in words."""
        found = [one for one in self.of(ways) if one is not None]
        if not found:
            return "not calibrated"
        return f"calibrated (temperature {' and '.join(f'{one.temperature:.3g}' for one in found)})"

    def _read(self, prompted: bool) -> Calibration | None:
        own, tsm = self._question, self._model.tsm
        used = {"tsm": tsm.hash, "connector": self._connector} if prompted and tsm else {}
        found = read_calibration(self._folder, own.task, prompted, **used)
        how = "with exemplars" if prompted else "without exemplars"
        if found is None:
            if self._wanted:
                raise VITaskError(
                    f"checkpoint {self._folder!r} has no calibration of task {own.task!r} {how}; fit one with "
                    "`vitask calibrate`, or leave calibrated out"
                )
            return None
        found.check_classes(own.choices)
        if found.question and found.question != own.text:
            raise VITaskError(
                f"the calibration of task {own.task!r} in {self._folder!r} is of the question {found.question!r}, and "
                f"here it is {own.text!r}; calibrate again, or give calibrated=False"
            )
        return found
