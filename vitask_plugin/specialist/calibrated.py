"""Which calibration the probabilities go through, if any."""

import logging
from collections.abc import Sequence

from vitask_plugin.evaluation.calibrated import Calibrations
from vitask_plugin.record.calibration import Calibration
from vitask_plugin.specialist.question import Question

logger = logging.getLogger(__name__)


class CalibratedQuestion:
    """Those of a checkpoint that are of one question.

    Args:
        wanted: None = where there is one.
    """

    def __init__(self, calibrations: Calibrations, question: Question, wanted: bool | None) -> None:
        self._calibrations, self._question, self._wanted = calibrations, question, wanted
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
        line = f"calibrated (temperature {' and '.join(f'{one.temperature:.3g}' for one in found)})"
        if any(one.thresholds or one.abstention for one in found):
            line += "; its thresholds are not applied: labels go by the probabilities alone"
        return line

    def _read(self, prompted: bool) -> Calibration | None:
        own = self._question
        if not self._wanted and self._calibrations.of(own.task, prompted) is None:
            return None
        where = f"task {own.task!r} here"
        return self._calibrations.fitting(own.task, prompted, own.answers, own.text, where)
