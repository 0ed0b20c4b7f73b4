"""From the label scores of a validation round to its metrics, by the name under which the Trainer knows them.

Per data set and as the plain mean over data sets, as lmms-eval's `_score` tasks and groups give them.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitask_plugin.data.class_names import MULTI_LABEL
from vitask_plugin.data.instructions import kind_of
from vitask_plugin.errors import VITaskError
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities
from vitask_plugin.inference.off_label import MOST_UNREAD

PREFIX = "eval"
BRANCHES = {False: "", True: "ep_"}  # prompted with an exemplar -> what its metrics' names begin with
METRICS = ("loss", "accuracy", "macro_f1", "auc", "on_label")
COLLAPSED = 0.95  # share of answers that are one class


@dataclass(frozen=True)
class Scored:
    """How likely one sample's answers are, by one branch.

    Attributes:
        losses: negative log-likelihood of each candidate answer, summed over its tokens (nats).
        loss: the same of the sample's own answer. tokens: how many that has.
        on_label: whether greedy decoding would give one of the answers, to the end token.
    """

    losses: list[float]
    loss: float
    tokens: int
    on_label: bool


class ValidationMetrics:
    """What is made of the scores of a run's validation samples.

    Args:
        samples: of LLaVA's JSON, with a `vitask` block each. tasks: see `tasks_of`. exemplars: whether there is a
            branch with exemplars.

    Attributes:
        names: of all metrics of a round, the means over data sets first.

    Raises:
        VITaskError: two metrics would have one name, because of what a task is called.
    """

    def __init__(
        self, samples: Sequence[Mapping[str, Any]], tasks: Mapping[str, Mapping[str, Any]], *, exemplars: bool
    ) -> None:
        self.branches = [False, True] if exemplars else [False]
        self.blocks = [sample["vitask"] for sample in samples]
        self.kinds = {
            task: kind_of(tasks[task]["choices"], multi_label=tasks[task]["multi_label"])
            for task in dict.fromkeys(block["task"] for block in self.blocks)
        }
        self._own = {
            task: [number for number, block in enumerate(self.blocks) if block["task"] == task] for task in self.kinds
        }
        self._named = {task: self._of_kind(task) for task in self.kinds}
        self.names = [name for name, _ in self._values(lambda task, prompted, metric: 0.0)]
        for name, count in Counter(self.names).items():
            if count > 1:
                raise VITaskError(
                    f"{name!r} would be the name of two validation metrics, because of what a task is called "
                    f"({', '.join(self.kinds)}); call it something else"
                )

    def of(self, scored: Sequence[Mapping[bool, Scored]]) -> dict[str, float]:
        """The metrics of a round.

        Args:
            scored: of each sample, by branch, all of them finite.
        """
        found: dict[tuple[str, bool], dict[str, float]] = {}
        for task in self.kinds:
            for prompted in self.branches:
                found[task, prompted] = self._of_task(task, [scored[number][prompted] for number in self._own[task]])
        return dict(self._values(lambda task, prompted, metric: found[task, prompted][metric]))

    def _values(self, value: Callable[[str, bool, str], float]) -> list[tuple[str, float]]:
        """(name, metric) of each: the means over data sets first."""
        means, sets = [], []
        for prompted in self.branches:
            for metric in METRICS:
                tasks = [task for task in self.kinds if metric in self._named[task]]
                values = {task: value(task, prompted, metric) for task in tasks}
                if len(tasks) == len(self.kinds):
                    means.append((f"{PREFIX}_{BRANCHES[prompted]}{metric}", statistics.fmean(values.values())))
                sets += [(f"{PREFIX}_{task}_{BRANCHES[prompted]}{metric}", values[task]) for task in tasks]
        return means + sets

    def _of_task(self, task: str, scored: Sequence[Scored]) -> dict[str, float]:
        kind = self.kinds[task]
        likely = [metrics.probabilities(one.losses, kind) for one in scored]
        targets = [self._target(number) for number in self._own[task]]
        outcomes = [Outcome(target, metrics.decide(one, kind)) for target, one in zip(targets, likely, strict=True)]
        found = {
            "loss": sum(one.loss for one in scored) / sum(one.tokens for one in scored),
            "accuracy": metrics.accuracy(outcomes),
            "macro_f1": metrics.macro_f1(outcomes),
        }
        if "on_label" in self._named[task]:
            found["on_label"] = statistics.fmean(one.on_label for one in scored)
        if "auc" in self._named[task]:
            items = [Probabilities(target, one, kind) for target, one in zip(targets, likely, strict=True)]
            found["auc"] = metrics.auc(items)
        return found

    def collapsed(self, scored: Sequence[Mapping[bool, Scored]]) -> dict[str, str]:
        """`{task: sentence}` of data sets for which the branch without exemplars gives nearly always one answer.

        Not where the samples themselves have nearly always one label.
        """
        sentences = {}
        for task, numbers in self._own.items():
            kind, choices = self.kinds[task], self.blocks[numbers[0]]["choices"]
            answers = Counter(
                _key(metrics.decide(metrics.probabilities(scored[number][False].losses, kind), kind))
                for number in numbers
            )
            (answer, count), *_ = answers.most_common(1)
            labels = Counter(_key(self._target(number)) for number in numbers)
            if count > COLLAPSED * len(numbers) and max(labels.values()) <= COLLAPSED * len(numbers):
                sentences[task] = (
                    f"task {task!r}: without exemplars {count} of {len(numbers)} validation images are answered "
                    f"{_called(answer, choices)!r}, which {labels[answer]} of them are; the model does not tell the "
                    "classes apart yet, or no longer does"
                )
        return sentences

    def off_label(self, scored: Sequence[Mapping[bool, Scored]]) -> dict[tuple[str, bool], str]:
        """`{(task, branch): sentence}` where the model's own answers are too often none of the labels."""
        sentences = {}
        for task, numbers in self._own.items():
            for prompted in self.branches if "on_label" in self._named[task] else ():
                off = sum(not scored[number][prompted].on_label for number in numbers)
                if off > MOST_UNREAD * len(numbers):
                    where = f"task {task!r}: {'with' if prompted else 'without'} exemplars"
                    sentences[task, prompted] = (
                        f"{where} the model's own answers to {off} of {len(numbers)} validation images are no labels; "
                        "it has not learnt them yet, or loses them"
                    )
        return sentences

    def _of_kind(self, task: str) -> list[str]:
        """Metrics of a task. The answers of multi-label samples are combinations, of which few are scored."""
        found = ["loss", "accuracy", "macro_f1", *["auc"] * self._has_auc(task)]
        return found if self.kinds[task] == MULTI_LABEL else [*found, "on_label"]

    def _target(self, number: int) -> int | list[int]:
        label, choices = self.blocks[number]["label"], self.blocks[number]["choices"]
        return [int(index in label) for index in range(len(choices))] if isinstance(label, list) else label

    def _has_auc(self, task: str) -> bool:
        """Whether every class, or every label, is there and is not the only one."""
        members = [self._target(number) for number in self._own[task]]
        classes = len(self.blocks[self._own[task][0]]["choices"])
        if self.kinds[task] == MULTI_LABEL:
            return all(0 < sum(one[index] for one in members) < len(members) for index in range(classes))
        return len(set(members)) == classes


def check_finite(scored: Mapping[bool, Scored], where: str) -> None:
    """Refuses scores that are no numbers, which no metric could be made of.

    Raises:
        VITaskError: naming the sample.
    """
    for one in scored.values():
        if not all(map(math.isfinite, [*one.losses, one.loss])):
            raise VITaskError(
                f"{where}: the model gives the answers the losses {one.losses}, not all of them finite; go on from an "
                "earlier checkpoint with a smaller --learning_rate, or in another dtype"
            )


def _key(label: Any) -> Hashable:
    return tuple(label) if isinstance(label, list) else label


def _called(answer: Hashable, choices: Sequence[str]) -> str:
    if isinstance(answer, tuple):
        return ", ".join(name for name, there in zip(choices, answer, strict=True) if there) or "no finding"
    return choices[answer]
