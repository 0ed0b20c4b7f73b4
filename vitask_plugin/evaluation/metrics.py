"""From an answer in words to a label, and from labels and probabilities to figures. Knows no model and no harness.

Figures are plain functions over all samples of a task. An answer that names no label (None) is a wrong answer.
K classes, N samples.
"""

import logging
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

logger = logging.getLogger(__name__)

_NEGATIONS = frozenset(["not", "no", "non", "nor", "neither", "never", "none", "without", "cannot", "unlikely"])
_CLAUSE_END = re.compile(r"[.,;:!?\n]+|\b(?:but|however|although|though|while|yet)\b")


class Outcome(NamedTuple):
    """One sample: its label and the label that the answer was read as, None if it names none."""

    target: int
    prediction: int | None


class Probabilities(NamedTuple):
    """One sample: its label (multi-label: K zeros and ones), K probabilities, and `medmnist`'s word for the kind."""

    target: int | Sequence[int]
    probabilities: Sequence[float]
    kind: str


def parse_exact(text: str, choices: Sequence[str]) -> int | None:
    """The index of the choice that `text` is, letter for letter, after trimming and one final full stop."""
    text = text.strip()
    for index, choice in enumerate(choices):
        if choice in (text, text.removesuffix(".")):
            return index
    return None


def parse_answer(text: str, choices: Sequence[str]) -> int | None:
    """The index of the one choice that a free-form answer names, or None.

    Exact answers first. Else choices are looked for word by word, in any case and with any punctuation. Of choices
    inside each other the longest counts. A choice in a clause with a negation of its own does not count ("not
    malignant" is not "malignant"). An answer that names two different choices names none.
    """
    exact = parse_exact(text, choices)
    if exact is not None:
        return exact
    words, clauses = _words(text)
    spans = [
        (start, start + len(label), index)
        for index, choice in enumerate(choices)
        if (label := _words(choice)[0])
        for start in range(len(words) - len(label) + 1)
        if words[start : start + len(label)] == label
    ]
    found = {
        index
        for start, end, index in spans
        if not any(a <= start and end <= b and b - a > end - start for a, b, _ in spans)
        and not any(
            word in _NEGATIONS and not start <= place < end and clauses[place] in clauses[start:end]
            for place, word in enumerate(words)
        )
    }
    return found.pop() if len(found) == 1 else None


def _words(text: str) -> tuple[list[str], list[int]]:
    """The words of `text` without case and punctuation, and the number of the clause that each stands in."""
    text = re.sub(r"n['\u2019]t\b", " not", text.casefold())
    words, clauses = [], []
    for number, clause in enumerate(_CLAUSE_END.split(text)):
        found = re.findall(r"\w+", clause)
        words += found
        clauses += [number] * len(found)
    return words, clauses


def accuracy(outcomes: Sequence[Outcome]) -> float:
    """Share of samples whose answer names their label."""
    return sum(target == prediction for target, prediction in outcomes) / len(outcomes)


def macro_f1(outcomes: Sequence[Outcome]) -> float:
    """Unweighted mean of the F1 of each class that is some sample's label or answer (scikit-learn's definition)."""
    from sklearn.metrics import f1_score

    targets = [target for target, _ in outcomes]
    # -1 is no class of its own: it costs its target's recall and nobody's precision.
    predictions = [-1 if prediction is None else prediction for _, prediction in outcomes]
    classes = sorted({*targets, *predictions} - {-1})
    return float(f1_score(targets, predictions, labels=classes, average="macro", zero_division=0))


def unmapped(outcomes: Sequence[Outcome]) -> int:
    """How many answers name no label."""
    return sum(prediction is None for _, prediction in outcomes)


def auc(items: Sequence[Probabilities]) -> float:
    """`medmnist.evaluator.getAUC`: for two classes the ROC AUC of class 1, else the mean over classes one against rest.

    NaN, with a warning, if a class has no sample or every sample (say, under `--limit`): it then has no ROC curve.
    """
    from medmnist.evaluator import getAUC

    targets = np.array([item.target for item in items])
    scores = np.array([item.probabilities for item in items], dtype=float)
    members = np.eye(scores.shape[1])[targets] if targets.ndim == 1 else targets
    constant = np.flatnonzero(members.min(axis=0) == members.max(axis=0))
    if len(constant):
        logger.warning("no AUC: of %d samples none or all belong to class %s", len(items), constant.tolist())
        return float("nan")
    return float(getAUC(targets, scores, items[0].kind))


def probabilities(losses: Sequence[float]) -> list[float]:
    """Class probabilities from each class's summed negative log-likelihood (nats): softmax(-losses)."""
    scores = -np.asarray(losses, dtype=float)
    scores = np.exp(scores - scores.max())
    return (scores / scores.sum()).tolist()


def confusion(outcomes: Sequence[Outcome], classes: int) -> list[list[int]]:
    """Counts [K][K + 1]: row = label, column = answer, the last column = no label named."""
    counts = np.zeros((classes, classes + 1), dtype=int)
    for target, prediction in outcomes:
        counts[target, classes if prediction is None else prediction] += 1
    return counts.tolist()
