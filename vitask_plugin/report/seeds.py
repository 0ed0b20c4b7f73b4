"""Several seeds of one configuration as one row: which runs those are, and the mean of their results."""

import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vitask_plugin.report.origins import differences
from vitask_plugin.report.page import MISSING, Section, Table
from vitask_plugin.report.results import TaskResult
from vitask_plugin.report.runs import PATHS, Run

# How a seed stands in a run's name: "vitask-seed1", "vitask_s1", "1/vitask".
_SEED = r"[\W_]*(?:(?<![^\W\d_])s(?:eed)?)?[\W_]*(?<!\d){}(?!\d)"


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in their seeds alone.

    Attributes:
        runs: in the order of their seeds. name: unique among the configurations of a report.
        apart: in what it differs from the configuration before it that it is most like; empty for the first.
        like: the name of that one.
    """

    name: str
    runs: tuple[Run, ...]
    apart: tuple[str, ...] = ()
    like: str = ""

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(run.seed for run in self.runs)

    @property
    def row(self) -> Run:
        """The runs as one, whose results are means; the run itself where there is one."""
        if len(self.runs) == 1:
            return self.runs[0]
        first = self.runs[0]
        tasks, groups = (
            {task: mean(found) for task, found in _by_task(dicts).items()}
            for dicts in ([run.tasks for run in self.runs], [run.groups for run in self.runs])
        )
        return replace(first, name=self.name, tasks=tasks, groups=groups)


def _by_task(dicts: Iterable[dict[str, TaskResult]]) -> dict[str, list[TaskResult]]:
    found: dict[str, list[TaskResult]] = {}
    for results in dicts:
        for task, result in results.items():
            found.setdefault(task, []).append(result)
    return found


def mean(results: Sequence[TaskResult]) -> TaskResult:
    """The plain mean of each metric over trainings that all have it; without intervals and samples, which are of one
    training."""
    if len(results) == 1:
        return results[0]
    metrics: dict[str, float | None] = {}
    for name in results[0].metrics:
        values = [result.metrics.get(name) for result in results]
        metrics[name] = None if None in values else statistics.fmean(values)
    first = results[0]
    return TaskResult(
        metrics,
        images=first.images,
        split=first.split,
        group=first.group,
        source=first.source,
        over_seeds=tuple(results),
    )


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """The runs, those that differ in their seeds alone together, in the order of the first of each."""
    groups: list[list[Run]] = []
    reasons: list[tuple[tuple[str, ...], int]] = []  # of each group, and which one it is most like
    for run in runs:
        found = [_apart(group, run) for group in groups]
        if [] in found:
            groups[found.index([])].append(run)
            continue
        nearest = min(range(len(found)), key=lambda place: len(found[place]), default=0)
        reasons.append((tuple(found[nearest]) if found else (), nearest))
        groups.append([run])
    names = _names(groups)
    return [
        Configuration(name, tuple(sorted(group, key=_order)), apart, names[near] if apart else "")
        for name, group, (apart, near) in zip(names, groups, reasons, strict=True)
    ]


def _order(run: Run) -> int:
    return -1 if run.seed is None else run.seed


def _apart(group: Sequence[Run], run: Run) -> list[str]:
    """In what a run differs from those of a configuration, beside its seed; empty if it is one more of them."""
    first = group[0]
    found = [] if first.model == run.model else [f"--model {run.model}, not {first.model}"]
    for name in sorted(first.arguments.keys() | run.arguments.keys()):
        one, other = (side.arguments.get(name, "not given") for side in (first, run))
        # Where a checkpoint lies is no difference; whether there is a TSM is one.
        alike = name in PATHS and "not given" not in (one, other)
        if one != other and not alike:
            found.append(f"{name} {other} ({one} there)" if name not in PATHS else f"{name} {_given(other)}")
    sizes = [{task: result.images for task, result in side.tasks.items()} for side in (first, run)]
    if any(sizes[0][task] != sizes[1][task] for task in sizes[0].keys() & sizes[1].keys()):
        found.append("judged on another part of the images (--limit)")
    if first.tasks.keys() != run.tasks.keys():
        found.append("judged by other tasks")
    both = first.origins.keys() & run.origins.keys()
    found += dict.fromkeys(
        text for name in sorted(both) for text in differences(run.origins[name], first.origins[name])
    )
    if found:
        return found
    if run.seed is None or first.seed is None:
        unknown = run if run.seed is None else first
        found.append(f"the seed of {unknown.name} is not known (no record of its training can be read here)")
    elif any(run.seed == other.seed for other in group):
        found.append(f"the same seed, {run.seed}")
    return found


def _given(value: str) -> str:
    return value if value == "not given" else "given"


def _names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A run's name; of several, what is left of all their names without the seed, if that is one text."""
    wanted = [_without_seed(group) if len(group) > 1 else group[0].name for group in groups]
    return [
        name if name and wanted.count(name) == 1 else f"{group[0].name} and {len(group) - 1} more"
        for name, group in zip(wanted, groups, strict=True)
    ]


def _without_seed(group: Sequence[Run]) -> str:
    left: list[set[str]] = []
    for run in group:
        found = re.finditer(_SEED.format(run.seed), run.name)
        left.append({(run.name[: one.start()] + run.name[one.end() :]).strip(" -_/.") for one in found})
    return max(set.intersection(*left), key=len, default="")


def section(found: Sequence[Configuration]) -> Section | None:
    """Which runs are one row and why others are not; None where no two seeds are known."""
    known = {seed for configuration in found for seed in configuration.seeds if seed is not None}
    if len(known) < 2:
        return None
    rows = [
        [
            one.name,
            ", ".join(MISSING if seed is None else str(seed) for seed in one.seeds),
            ", ".join(run.name for run in one.runs),
            f"{one.like}: {'; '.join(one.apart)}" if one.apart else MISSING,
        ]
        for one in found
    ]
    notes = [
        "Runs that differ in their seed alone are one row of the tables below: the mean over them, ± their standard "
        "deviation (n - 1), and how many they are. All else that their files say has to be equal: arguments of the "
        "evaluation, flags, data, schedule, label sets, versions of packages; where each seed has a TSM of its own, "
        "how that was trained. The sections of the data sets show each run by itself."
    ]
    return Section("Seeds", [Table(["row", "seeds", "runs", "apart from"], rows, words=4)], notes)
