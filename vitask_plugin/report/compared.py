"""Paired differences between configurations: the same seeds, the same split, the same images."""

import itertools
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tqdm import tqdm

from vitask_plugin.evaluation import paired
from vitask_plugin.evaluation.metric_list import TITLES
from vitask_plugin.report.page import MISSING, Cell, Section, Table
from vitask_plugin.report.results import TaskResult, split_of
from vitask_plugin.report.runs import Run
from vitask_plugin.report.seeds import Configuration
from vitask_plugin.report.tables import VARIANTS, data_sets, title

# Of so many configurations each is compared with each; of more, each with the first. `vitask run` judges so many: what
# one wants to know is VITask less vanilla, and the TSM comes first.
EACH_WITH_EACH = 5
_ANSWERS = ("subset_accuracy", "macro_f1")
_SCORES = ("auc",)  # over seeds alone: resampling it takes seconds per pair and thousands of images
_UNFOLDED = 3  # pairs of configurations
Pair = tuple[Run, Run]


@dataclass(frozen=True)
class Difference:
    """The second configuration's metric less the first's.

    Attributes:
        data_set, variant: of the task. values: of the first and of the second, means over the pairs.
        interval: the ends of the 95% interval. p: two-sided. corrected: the same after Holm, over the data sets.
        how: what both are from. seeds: of the pairs. images: that were judged.
    """

    first: str
    second: str
    data_set: str
    variant: str
    metric: str
    values: tuple[float, float]
    interval: tuple[float, float] | None
    p: float | None
    how: str
    seeds: tuple[int, ...]
    images: int | None
    corrected: float | None = None

    @property
    def value(self) -> float:
        return self.values[1] - self.values[0]

    @property
    def task(self) -> str:
        return f"{self.data_set}_{self.variant}" if self.variant else self.data_set


def compare(found: Sequence[Configuration]) -> list[Difference]:
    """Every difference between two configurations that were judged on the same images.

    Of more than `EACH_WITH_EACH` configurations, those to the first.
    """
    chosen = list(itertools.combinations(found, 2))
    if len(found) > EACH_WITH_EACH:
        chosen = chosen[: len(found) - 1]
    differences: list[Difference] = []
    for first, second in tqdm(chosen, desc="Comparing", unit="pair", disable=None, leave=False):
        own = list(_between(first, second))
        for key in dict.fromkeys(map(_family, own)):
            family = [one for one in own if _family(one) == key]
            corrected = paired.holm([one.p for one in family])
            differences += [replace(one, corrected=p) for one, p in zip(family, corrected, strict=True)]
    return differences


def _family(difference: Difference) -> tuple[str, str, str]:
    """What p-values are corrected together: one question, asked of several data sets."""
    return difference.variant, difference.metric, split_of(difference.data_set)[1]


def _pairs(first: Configuration, second: Configuration) -> list[Pair]:
    """The runs of equal seeds. A single run whose seed the other side lacks, such as an untuned model, meets each run
    there."""
    one, other = ({run.seed: run for run in side.runs} for side in (first, second))
    common = [(one[seed], other[seed]) for seed in one if seed in other]
    single = min(len(one), len(other)) == 1
    return list(itertools.product(first.runs, second.runs)) if single and not common else common


def _between(first: Configuration, second: Configuration) -> Iterator[Difference]:
    pairs = _pairs(first, second)
    if not pairs:
        return
    names = data_sets([run for pair in pairs for run in pair])
    for variant in ("", "score"):
        for name in names:
            results = _judged(pairs, name, variant)
            if results is None or not _same_images(results):
                continue
            # Where both answered in words, what they answered is compared, and of the likelihoods what only these give.
            words = not variant or _judged(pairs, name, "") is None
            for metric in (*(_ANSWERS if words else ()), *(_SCORES if variant else ())):
                if found := _difference(metric, results):
                    values, interval, p, how = found
                    seeds = sorted({run.seed for pair in pairs for run in pair if run.seed is not None})
                    if any(a.seed != b.seed for a, b in pairs) and len(pairs) > 1:
                        how = f"{how} (of one side: the other is one run)"
                    elif len(pairs) < max(len(first.runs), len(second.runs)):
                        how = f"{how} (seed {', '.join(map(str, seeds))})"
                    size = results[0][0].images
                    yield Difference(
                        *(first.name, second.name, name, variant, metric, values, interval, p, how, tuple(seeds)),
                        size[0] if size else None,
                    )


def _judged(pairs: Sequence[Pair], name: str, variant: str) -> list[tuple[TaskResult, TaskResult]] | None:
    """The results of a task that all runs were judged by; None where there is one that was not."""
    task = f"{name}_{variant}" if variant else name
    if not all(task in run.tasks for pair in pairs for run in pair):
        return None
    return [(a.tasks[task], b.tasks[task]) for a, b in pairs]


def _same_images(results: Sequence[tuple[TaskResult, TaskResult]]) -> bool:
    every = [result for pair in results for result in pair]
    logged = [result.answers.keys() for result in every if result.answers]
    return all(keys == logged[0] for keys in logged) and len({result.images for result in every}) == 1


_Found = tuple[tuple[float, float], tuple[float, float] | None, float | None, str]


def _difference(metric: str, results: Sequence[tuple[TaskResult, TaskResult]]) -> _Found | None:
    """Values of both, interval, p and where these are from; None where a metric is undefined or cannot be resampled."""
    values = [(a.metrics.get(metric), b.metrics.get(metric)) for a, b in results]
    if any(None in pair for pair in values):
        return None
    means = (statistics.fmean(a for a, _ in values), statistics.fmean(b for _, b in values))
    if len(values) >= paired.FEWEST_SEEDS:
        over = paired.over_seeds([b - a for a, b in values])
        return means, over.interval and tuple(over.interval), over.p, f"{len(values)} seeds: t"
    if metric == "auc":
        return None
    several = "" if len(values) == 1 else f"{len(values)} seeds; "
    if not all(result.answers for pair in results for result in pair):
        return means, None, None, f"{several}no samples logged"
    sides = [(a.outcomes, b.outcomes) for a, b in results]
    low, high = paired.over_samples(metric, sides)
    if several or metric != "subset_accuracy":
        return means, (low, high), None, f"{several}images: bootstrap"
    right = ([one.target == one.prediction for one in side] for side in sides[0])
    return means, (low, high), paired.mcnemar(*right), "images: bootstrap, McNemar"


def section(differences: Sequence[Difference]) -> Section | None:
    """A table per pair of configurations; None without any."""
    pairs = list(dict.fromkeys((one.first, one.second) for one in differences))
    if not pairs:
        return None
    tables = []
    for first, second in pairs:
        rows = [_row(one) for one in differences if (one.first, one.second) == (first, second)]
        columns = ["data set", "metric", first, second, "difference", "p", "p, Holm", "from"]
        tables.append(Table(columns, rows, f"{second} \N{MINUS SIGN} {first}", words=2))
    notes = [
        "Below a difference its 95% interval. From seeds: Student's t of the differences of at least 3 pairs of "
        "trainings with equal seeds: what other seeds would give. From images: of one or two pairs, 1,000 bootstrap "
        "resamples of the images, the same for both models, and for the accuracy of one pair McNemar's exact test: "
        "what other images would give to these very weights, whatever another training might. Holm: p corrected for "
        "the number of data sets, each metric by itself.",
        *(
            ["Each row is compared with the first one given."]
            if len(pairs) >= EACH_WITH_EACH and len({first for first, _ in pairs}) == 1
            else []
        ),
    ]
    return Section("Paired differences", tables, notes, folded=len(pairs) > _UNFOLDED)


def _row(one: Difference) -> list[str | Cell]:
    metric = TITLES[one.metric] if one.metric != "subset_accuracy" else "accuracy"
    if one.variant:
        metric += f" ({VARIANTS[one.variant].lower()})"
    ends = "" if one.interval is None else " to ".join(f"{end:+.3f}" for end in one.interval)
    return [
        title(one.data_set),
        metric,
        *(f"{value:.3f}" for value in one.values),
        Cell(f"{one.value:+.3f}", ends),
        *(MISSING if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}" for p in (one.p, one.corrected)),
        one.how,
    ]
