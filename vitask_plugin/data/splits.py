"""Which image is in which split: at random class by class, or so that what belongs together stays together.

Images of one patient, lesion or slide look alike. Where some of them are trained on and others tested on, a model is
rewarded for knowing the patient, and no figure of that test can be believed.

Shapes: G = groups, S = splits, C = classes.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vitask_plugin.data.dataset import SPLITS
from vitask_plugin.data.rows import Row, group_key
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
_ORDERS = 8  # of the groups, that are tried
_PASSES = 10  # over all groups, at most, to better a split


def check_not_test(data: str | Path, called: str = "data file") -> None:
    """Refuses a test split by its file's name.

    Args:
        called: what the file is in the sentence, such as the flag that names it.

    Raises:
        VITaskError: it is called so.
    """
    if Path(data).stem == "test":
        raise VITaskError(
            f"{called} {str(data)!r} is a test split by its name, and what is fitted or chosen on it cannot be judged "
            "by it; give the val split"
        )


def assign_splits(rows: Sequence[Row], val: float, test: float, seed: int) -> list[Row]:
    """Rows that all have a split.

    Rows without one are split at random, class by class, so that the shares are right in each class; where rows have
    groups, whole groups are split, as close to those shares as the groups allow. Given splits are kept; only where val
    is missing, it is taken out of train.

    Args:
        val, test: shares of all images; 0 = none. `val` 0 and `test` 1: a set for evaluation alone.

    Raises:
        VITaskError: if a class has too few images or groups to be in every split.
    """
    test_only = (val, test) == (0, 1)
    if not test_only and not (0 <= val < 1 and 0 <= test < 1 and val + test < 1):
        raise VITaskError(
            f"--val {val} and --test {test} leave nothing to train on; their sum must be below 1, or for a set to "
            "evaluate on alone --val 0 --test 1"
        )
    given = {row.split for row in rows} - {None}
    if test_only and not given:
        return [replace(row, split="test") for row in rows]
    if "val" in given or (given and not val):
        return list(rows)
    shares = {"val": val} if given else {"val": val, "test": test}
    shares = {split: share for split, share in shares.items() if share}
    members = [index for index, row in enumerate(rows) if row.split in (None, "train")]
    result = [replace(row, split=row.split or "train") for row in rows]
    if not shares:
        return result
    choose = _by_group if any(row.group is not None for row in rows) else _by_class
    for index, split in choose([rows[index] for index in members], shares, seed).items():
        result[members[index]] = replace(result[members[index]], split=split)
    return result


def _by_class(rows: Sequence[Row], shares: Mapping[str, float], seed: int) -> dict[int, str]:
    """`{row: split}` of those that leave train: of each class, the share of its images."""
    classes: dict[tuple[str, ...], list[int]] = {}
    for index, row in enumerate(rows):
        classes.setdefault(row.labels, []).append(index)
    if any(len(labels) != 1 for labels in classes):
        # Combinations of several labels are mostly unique, so there is nothing to stratify by.
        classes = {(): [index for own in classes.values() for index in own]}
    generator = np.random.default_rng(seed)
    chosen = {}
    for labels, members in classes.items():
        if len(members) <= len(shares):
            what = f"class {labels[0]!r}" if labels else "the data set"
            raise VITaskError(
                f"{what} has {len(members)} image(s), too few for {len(shares) + 1} splits; "
                "add images, or use --val 0 and --test 0"
            )
        order = generator.permutation(members)
        start = 0
        for split, share in shares.items():
            count = max(1, round(share * len(members)))
            chosen.update({int(index): split for index in order[start : start + count]})
            start += count
    return chosen


def _by_group(rows: Sequence[Row], shares: Mapping[str, float], seed: int) -> dict[int, str]:
    """`{row: split}` of those that leave train: whole groups."""
    groups: dict[str | tuple[int], list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault((index,) if row.group is None else row.group, []).append(index)
    names = sorted({label for row in rows for label in row.labels})
    single = all(len(row.labels) == 1 for row in rows)
    counts = np.zeros((len(groups), len(names) + 1), np.int64)  # last: images, of whatever class
    numbers = {name: number for number, name in enumerate(names)}
    for group, members in enumerate(groups.values()):
        counts[group, -1] = len(members)
        for index in members:
            counts[group, [numbers[label] for label in rows[index].labels]] += 1
    _check_groups(counts, names if single else [], len(shares) + 1)
    splits = ["train", *shares]
    wanted = np.array([1 - sum(shares.values()), *shares.values()])
    chosen = split_groups(counts, wanted, np.random.default_rng(seed))
    _check_filled(counts, chosen, names if single else [], splits)
    return {
        index: splits[split]
        for members, split in zip(groups.values(), chosen.tolist(), strict=True)
        for index in members
        if split
    }


def split_groups(counts: np.ndarray, shares: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The split of each group, [G] int64: each split's images of each class as near its share as whole groups allow.

    Greedy, the largest group first, into the split that gains most; then single groups are moved while that betters it.
    Of a few hundred groups several orders are tried and the best is kept. Measured is the squared distance to the
    wanted number of images, over that number, summed over splits and columns; a class that a split lacks altogether
    counts more than any distance. Groups that are alike are dealt in an order that the generator shuffles.

    Args:
        counts: [G, C + 1] images of each class in each group, and of all classes together.
        shares: [S] summing to 1.
    """
    total = counts.sum(0)
    target = np.maximum(np.outer(shares, total), 1e-9)
    lack = 1000.0 * total[-1] * (total > 0)

    def distance(held: np.ndarray) -> np.ndarray:  # [..., S, C + 1] -> [..., S]
        return ((held - target) ** 2 / target).sum(-1)

    def cost(held: np.ndarray) -> np.ndarray:
        return distance(held) + ((held == 0) * lack).sum(-1)

    found = []
    for _ in range(_ORDERS if len(counts) <= 500 else 1):
        order = generator.permutation(len(counts))
        order = order[np.argsort(-counts[order, -1], kind="stable")]
        chosen, held = np.zeros(len(counts), np.int64), np.zeros(target.shape)
        for group in order:
            chosen[group] = np.argmin(distance(held + counts[group]) - distance(held))
            held[chosen[group]] += counts[group]
        _move(counts, chosen, held, order, cost)
        found.append((float(cost(held).sum()), chosen))
    return min(found, key=lambda pair: pair[0])[1]


def _move(
    counts: np.ndarray,
    chosen: np.ndarray,
    held: np.ndarray,
    order: np.ndarray,
    cost: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Moves single groups to other splits while that lowers the cost; changes `chosen` [G] and `held` [S, C + 1]."""
    for _ in range(_PASSES):
        moved = False
        for group in order:
            own = chosen[group]
            held[own] -= counts[group]
            gain = cost(held + counts[group]) - cost(held)
            best = int(np.argmin(gain))
            if gain[best] < gain[own] - 1e-9:
                chosen[group], moved = best, True
            held[chosen[group]] += counts[group]
        if not moved:
            break


def _check_groups(counts: np.ndarray, classes: Sequence[str], splits: int) -> None:
    """Refuses a set, or a class of single labels, whose groups are fewer than the splits."""
    if len(counts) < splits:
        raise VITaskError(
            f"the data set has {len(counts)} group(s), too few for {splits} splits; add some, or use --val 0 "
            "and --test 0"
        )
    for number, name in enumerate(classes):
        having = int((counts[:, number] > 0).sum())
        if having < splits:
            raise VITaskError(
                f"class {name!r} has {having} group(s) of images, too few for {splits} splits, since no group may be "
                "in two; add groups of it, or use --val 0 or --test 0"
            )


def _check_filled(counts: np.ndarray, chosen: np.ndarray, classes: Sequence[str], splits: Sequence[str]) -> None:
    for position, split in enumerate(splits):
        held = counts[chosen == position].sum(0)
        lacking = [name for number, name in enumerate(classes) if not held[number]]
        if lacking or not held[-1]:
            what = f"class {lacking[0]!r}" if lacking else "the data set"
            raise VITaskError(
                f"no way was found to split the groups so that {split} has images of {what}; try another --seed, or "
                "use --val 0 or --test 0"
            )


def check_grouped(rows: Sequence[Row], source: str, allow_ungrouped: bool) -> None:
    """Refuses images without a group beside images with one: nothing says what they belong to.

    Raises:
        VITaskError: naming the first of them, unless `allow_ungrouped`.
    """
    without = [row for row in rows if row.group is None]
    if not without:
        if len({group_key(row.group) for row in rows}) == len(rows):
            logger.warning(
                "%s: each of the %d images is a group of its own, such as %r, so nothing is kept together; check the "
                "group you named",
                *(source, len(rows), rows[0].group),
            )
        return
    if len(without) == len(rows):
        raise VITaskError(
            f"{source}: no image has a group, the first being {without[0].name}; check the group you named"
        )
    found = f"{len(without)} of {len(rows)} images of {source} have no group, the first being {without[0].name}"
    if not allow_ungrouped:
        raise VITaskError(f"{found}; name their groups, or take each as one of its own with --allow-ungrouped")
    logger.warning("%s; each is a group of its own", found)


def check_apart(rows: Sequence[Row], allow_shared: bool) -> None:
    """Refuses splits that share a group.

    Raises:
        VITaskError: naming the groups, unless `allow_shared`.
    """
    found: dict[str, Counter[str]] = {}
    for row in rows:
        if row.group is not None:
            found.setdefault(row.group, Counter())[row.split] += 1
    shared = {group: splits for group, splits in found.items() if len(splits) > 1}
    if not shared:
        return
    named = [
        f"{group!r} ({', '.join(f'{count} {split}' for split, count in splits.items())})"
        for group, splits in list(shared.items())[:5]
    ]
    more = f" and {len(shared) - 5} more" if len(shared) > 5 else ""
    sentence = (
        f"{len(shared)} of {len(found)} groups are in more than one of the given splits: {', '.join(named)}{more}"
    )
    if not allow_shared:
        raise VITaskError(
            f"{sentence}; leave the given splits out to have whole groups split, or go on with --allow-shared-groups"
        )
    logger.warning("%s", sentence)


def group_counts(rows: Sequence[Row]) -> dict[str, int]:
    """`{split: number of groups}`; an image without a group counts as one. Empty if there are no groups at all."""
    if all(row.group is None for row in rows):
        return {}
    found: dict[str, set[str | int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row.split, set()).add(index if row.group is None else row.group)
    return {split: len(found[split]) for split in SPLITS if split in found}


def quality(rows: Sequence[Row], shares: Mapping[str, float]) -> str:
    """How near a split of groups came to what was asked for: each split's share of the images, and how far any class's
    share of a split is from its share of the whole set, in percentage points.

    Args:
        shares: what was asked for, by split; empty if the splits were given.
    """
    whole = Counter(label for row in rows for label in row.labels)
    parts, farthest = [], 0.0
    for split in sorted({row.split for row in rows}, key=SPLITS.index):
        own = [row for row in rows if row.split == split]
        asked = f" ({shares[split]:.1%} asked for)" if split in shares else ""
        parts.append(f"{split} {len(own) / len(rows):.1%}{asked}")
        held = Counter(label for row in own for label in row.labels)
        farthest = max([farthest, *(abs(held[name] / len(own) - count / len(rows)) for name, count in whole.items())])
    return f"{', '.join(parts)} of the images; class shares within {100 * farthest:.1f} points of the whole set's"
