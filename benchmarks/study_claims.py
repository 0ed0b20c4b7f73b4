"""The claims that the study answers, and the answer of the rows there are: holds, does not hold, unclear, not run yet.

A claim compares two sides on the same sets and seeds. Its mean is over sets, each the same weight; its interval is of
the paired t-test over seeds of that mean, because another seed is another TSM and another tuning. The second interval
draws other test images. P pairs of a set are its seeds.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from study_plan import ONCE, SETS

from vitask_plugin.evaluation.intervals import Interval, interval_of_mean
from vitask_plugin.evaluation.paired import FEWEST_SEEDS, holm, over_samples, over_seeds
from vitask_plugin.inference.metrics import Outcome

HOLDS, FAILS, UNCLEAR, ABSENT = "holds", "does not hold", "unclear", "not run yet"
MARGIN = 0.01  # a claim of "at least as good" allows as much below: the paper's own gap between without EP and TSM


@dataclass(frozen=True)
class Side:
    """Rows of one kind. `drop`: what is compared is how much incomplete instructions cost."""

    arm: str
    ep: bool = False
    drop: bool = False


@dataclass(frozen=True)
class Claim:
    """`better` is at least as good as `other`, or `above` it."""

    text: str
    better: Side
    other: Side
    above: bool = True


@dataclass(frozen=True)
class Answer:
    """Of one claim. Differences are in accuracy on test.

    Attributes:
        mean: None without a pair. seeds_interval: None below `FEWEST_SEEDS` seeds that all its sets have.
        images_interval: of the answers to other images, these very weights. f1: mean difference in macro-F1.
        sets: name -> its seeds.
    """

    claim: Claim
    verdict: str
    mean: float | None = None
    seeds_interval: Interval | None = None
    p: float | None = None
    images_interval: Interval | None = None
    f1: float | None = None
    sets: Mapping[str, Sequence[int]] | None = None


_EP, _PLAIN, _VANILLA, _TSM = Side("vitask", True), Side("vitask"), Side("vanilla"), Side("tsm")
CLAIMS = (
    Claim(
        "Vanilla tuning is above a linear probe on its own frozen tower (else it is no baseline)",
        _VANILLA,
        Side("linear_probe"),
    ),
    Claim("VITask with EP is at least the TSM", _EP, _TSM, above=False),
    Claim("VITask without EP is above vanilla", _PLAIN, _VANILLA),
    Claim("VITask without EP is above vanilla of as much compute", _PLAIN, Side("vanilla_compute")),
    Claim("RDA alone is above vanilla (without EP)", Side("rda"), _VANILLA),
    Claim("CRT alone is above vanilla (without EP)", Side("crt"), _VANILLA),
    Claim("Both are above RDA alone (without EP)", _PLAIN, Side("rda")),
    Claim("Both are above CRT alone (without EP)", _PLAIN, Side("crt")),
    Claim("VITask without EP is at least the TSM", _PLAIN, _TSM, above=False),
    Claim(
        "Incomplete instructions cost vanilla more than VITask", Side("vanilla", drop=True), Side("vitask", drop=True)
    ),
    Claim("EP is above a learned prefix", _EP, Side("learned", True)),
    Claim("EP is above the TSM's label as text", _EP, Side("label_as_text", True)),
    Claim("EP is above averaging with the TSM", _EP, Side("average")),
    Claim("RDA with the exemplar detached is above RDA*", _PLAIN, Side("rda_attached")),
    Claim("Out-of-fold exemplars are above the TSM's own, without EP", Side("vitask_folds"), _PLAIN),
    Claim("Out-of-fold exemplars are above the TSM's own, with EP", Side("vitask_folds", True), _EP),
    Claim("A trained projector is above a frozen one (vanilla)", _VANILLA, Side("vanilla_frozen_projector")),
    Claim("RDA is above soft-label distillation", _PLAIN, Side("soft_label_distillation")),
    Claim("Words are at least a class head", _PLAIN, Side("class_head"), above=False),
)
# What a row cannot say: each needs a measurement of its own.
UNMEASURED = (
    "CRT separates positive from negative pairs (overlap of p(response))",
    "Another TSM works after the closed-form alignment without tuning",
)

Rows = Mapping[tuple[str, str, int, bool, str], Mapping[str, Any]]


def by_key(rows: Sequence[Mapping[str, Any]]) -> Rows:
    """Rows by (set, arm, seed, with EP, instructions); of two that are the same run, the later one."""
    return {
        (row["data"], row["arm"], row["seed"], row["ep"], row["instructions"]): row for row in rows if "test" in row
    }


def answer(claim: Claim, rows: Rows, sets: Sequence[str]) -> Answer:
    """What the rows say of a claim. `sets`: that may be in one mean."""
    pairs = {data: _pairs(claim, rows, data) for data in sets}
    pairs = {data: found for data, found in pairs.items() if found}
    if not pairs:
        return Answer(claim, ABSENT)
    seeds = sorted(set.intersection(*(set(found) for found in pairs.values())))
    differences = {data: [_difference(*found[seed], "accuracy") for seed in found] for data, found in pairs.items()}
    mean = statistics.fmean(statistics.fmean(values) for values in differences.values())
    f1 = statistics.fmean(
        statistics.fmean(_difference(*pair, "macro_f1") for pair in found.values()) for found in pairs.values()
    )
    drops = claim.better.drop or claim.other.drop
    images = None if drops else interval_of_mean([_over_images(found) for found in pairs.values()])
    known = {data: sorted(found) for data, found in pairs.items()}
    if len(seeds) < FEWEST_SEEDS:
        return Answer(claim, UNCLEAR, mean, None, None, images, f1, known)
    means = [statistics.fmean(_difference(*found[seed], "accuracy") for found in pairs.values()) for seed in seeds]
    test = over_seeds(means)
    return Answer(claim, _verdict(claim, test.mean, test.interval), test.mean, test.interval, test.p, images, f1, known)


def answers(rows: Rows, sets: Sequence[str]) -> tuple[list[Answer], list[float | None]]:
    """All claims, and their p-values corrected for being so many (Holm)."""
    found = [answer(claim, rows, sets) for claim in CLAIMS]
    return found, holm([one.p for one in found])


def allowed_together(rows: Rows) -> list[str]:
    """Sets with rows, in the plan's order; of those that show the same pictures the first."""
    there, seen, found = {key[0] for key in rows}, set(), []
    for name, one in SETS.items():
        pictures = one.pictures or name
        if name in there and pictures not in seen:
            seen.add(pictures)
            found.append(name)
    return found


def _verdict(claim: Claim, mean: float, interval: Interval | None) -> str:
    low, high = interval or [mean, mean]
    least = 0.0 if claim.above else -MARGIN
    if low > least or (not claim.above and low >= least):
        return HOLDS
    return FAILS if high < least or (claim.above and high <= 0) else UNCLEAR


def _pairs(claim: Claim, rows: Rows, data: str) -> dict[int, tuple[Any, Any]]:
    """The two sides' test figures by seed; what is drawn for no seed is the same for all."""
    sides = [_of_side(side, rows, data) for side in (claim.better, claim.other)]
    seeds = {seed for side in sides for seed in side if seed is not None}
    found = {seed: [side.get(seed, side.get(None)) for side in sides] for seed in seeds}
    return {seed: tuple(pair) for seed, pair in sorted(found.items()) if None not in pair}


def _of_side(side: Side, rows: Rows, data: str) -> dict[int | None, Any]:
    found: dict[int | None, Any] = {}
    for (own, arm, seed, ep, instructions), row in rows.items():
        if (own, arm, ep, instructions) != (data, side.arm, side.ep, "complete"):
            continue
        figures = row["test"]
        if side.drop:
            other = rows.get((own, arm, seed, ep, "incomplete"))
            if other is None:
                continue
            figures = {name: figures[name] - other["test"][name] for name in ("accuracy", "macro_f1")}
        found[None if arm in ONCE else seed] = figures
    return found


def _difference(better: Mapping[str, Any], other: Mapping[str, Any], name: str) -> float:
    return better[name] - other[name]


def _over_images(found: Mapping[int, tuple[Any, Any]]) -> Interval:
    pairs = [(_outcomes(other), _outcomes(better)) for better, other in found.values()]
    return over_samples("accuracy", pairs)


def _outcomes(figures: Mapping[str, Any]) -> list[Outcome]:
    return [
        Outcome(int(label, 36), int(given, 36))
        for label, given in zip(figures["labels"], figures["answers"], strict=True)
    ]
