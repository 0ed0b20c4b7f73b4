"""The study's page: what made rows say of its claims, and that a page says what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
N = 200


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def row(data: str, arm: str, seed: int, accuracy: float, *, ep: bool = False, instructions: str = "complete") -> dict:
    """A row of a model that is right in this share of the images."""
    labels = np.arange(N) % 3
    order = np.random.default_rng([seed, len(arm)]).permutation(N)
    answers = np.where(order < round(accuracy * N), labels, (labels + 1) % 3)
    figures: dict[str, Any] = {
        "n": N,
        "accuracy": float((answers == labels).mean()),
        "macro_f1": accuracy,
        "auc": accuracy,
        "loss": 1 - accuracy,
        "answers": "".join(map(str, answers)),
        "labels": "".join(map(str, labels)),
    }
    if arm not in ("tsm", "linear_probe"):
        figures |= {"agrees_with_tsm": 0.9, "where_they_differ": {"model_right": 3, "tsm_right": 5, "neither": 12}}
    return {
        **{"data": data, "arm": arm, "seed": seed, "ep": ep, "instructions": instructions},
        **{"val": figures, "test": figures, "seconds": 60.0, "cpu_seconds": 30.0},
        "config": {"settings": {"steps": 150, "learning_rate": 1e-3}},
        **{"digest": "d", "processor": "a processor", "threads": 1, "versions": {"torch": "2"}},
    }


def of_arm(arm: str, values: dict[str, list[float]], **more: Any) -> list[dict]:
    """`values`: accuracies by seed of each set."""
    return [row(data, arm, seed, one, **more) for data, own in values.items() for seed, one in enumerate(own)]


def claim(text: str) -> Any:
    from study_claims import CLAIMS

    (found,) = (one for one in CLAIMS if one.text == text)
    return found


def judged(text: str, rows: list[dict]) -> Any:
    from study_claims import allowed_together, answer, by_key

    known = by_key(rows)
    return answer(claim(text), known, allowed_together(known))


ABOVE, LEAST = "VITask without EP is above vanilla", "VITask without EP is at least the TSM"
LOW = {"busi": [0.5, 0.52, 0.48], "malaria": [0.6, 0.61, 0.63]}
HIGH = {"busi": [0.6, 0.61, 0.6], "malaria": [0.7, 0.72, 0.72]}


def test_a_claim_holds_or_not_by_the_interval_over_seeds() -> None:
    from study_claims import FAILS, HOLDS, UNCLEAR

    found = judged(ABOVE, of_arm("vitask", HIGH) + of_arm("vanilla", LOW))
    means = [(0.1 + 0.1) / 2, (0.09 + 0.11) / 2, (0.12 + 0.09) / 2]
    assert found.verdict == HOLDS and found.mean == pytest.approx(np.mean(means), abs=1e-9)
    half = 4.3027 * np.std(means, ddof=1) / 3**0.5  # Student's t of two degrees of freedom
    assert found.seeds_interval == pytest.approx([np.mean(means) - half, np.mean(means) + half], abs=2e-4)
    assert found.sets == {"busi": [0, 1, 2], "malaria": [0, 1, 2]}
    low, high = found.images_interval
    assert low < found.mean < high and high - low > 0.05  # 200 images of a set are few
    assert judged(ABOVE, of_arm("vitask", LOW) + of_arm("vanilla", HIGH)).verdict == FAILS
    mixed = {"busi": [0.5, 0.6, 0.55]}
    assert judged(ABOVE, of_arm("vitask", mixed) + of_arm("vanilla", {"busi": [0.55, 0.55, 0.55]})).verdict == UNCLEAR


def test_at_least_allows_a_little_below() -> None:
    from study_claims import FAILS, HOLDS, UNCLEAR

    tsm = of_arm("tsm", {"busi": [0.8, 0.805, 0.795]})
    assert judged(LEAST, tsm + of_arm("vitask", {"busi": [0.795, 0.8, 0.79]})).verdict == HOLDS
    assert judged(LEAST, tsm + of_arm("vitask", {"busi": [0.75, 0.755, 0.75]})).verdict == FAILS
    assert judged(LEAST, tsm + of_arm("vitask", {"busi": [0.75, 0.85, 0.8]})).verdict == UNCLEAR


def test_two_seeds_are_unclear_and_no_pair_is_not_run_yet() -> None:
    from study_claims import ABSENT, UNCLEAR

    few = {data: own[:2] for data, own in HIGH.items()}
    found = judged(ABOVE, of_arm("vitask", few) + of_arm("vanilla", LOW))
    assert (found.verdict, found.seeds_interval, found.p) == (UNCLEAR, None, None)
    assert found.sets == {"busi": [0, 1], "malaria": [0, 1]} and found.mean > 0.09
    apart = of_arm("vitask", {"busi": HIGH["busi"]}) + of_arm("vanilla", {"malaria": LOW["malaria"]})
    assert judged(ABOVE, apart).verdict == ABSENT and judged(ABOVE, apart).mean is None


def test_what_is_drawn_for_no_seed_is_held_against_all_of_them() -> None:
    rows = of_arm("vanilla", {"busi": [0.6, 0.62, 0.61]}) + of_arm("linear_probe", {"busi": [0.7]})
    text = "Vanilla tuning is above a linear probe on its own frozen tower (else it is no baseline)"
    assert judged(text, rows).mean == pytest.approx(-0.09)
    assert judged(text, rows).sets == {"busi": [0, 1, 2]}


def test_incomplete_instructions_are_compared_by_what_they_cost() -> None:
    rows = []
    for arm, whole, without in (("vanilla", 0.7, 0.5), ("vitask", 0.75, 0.7)):
        rows += of_arm(arm, {"busi": [whole] * 3}) + of_arm(arm, {"busi": [without] * 3}, instructions="incomplete")
    assert judged("Incomplete instructions cost vanilla more than VITask", rows).mean == pytest.approx(0.15)


def test_the_same_pictures_are_never_in_one_mean() -> None:
    from study_claims import allowed_together, by_key

    rows = of_arm("tsm", {"breast": [0.9], "busi": [0.8], "retina": [0.5]})
    assert allowed_together(by_key(rows)) == ["busi", "retina"]
    assert allowed_together(by_key([one for one in rows if one["data"] != "busi"])) == ["retina", "breast"]


def test_the_page_says_what_there_is_and_what_is_missing() -> None:
    from study_claims import CLAIMS, UNMEASURED, by_key
    from study_report import page

    rows = of_arm("vitask", HIGH) + of_arm("vanilla", LOW) + of_arm("linear_probe", {"busi": [0.7]})
    text = page(by_key(rows), [])
    lines = text.splitlines()
    own = next(line for line in lines if line.startswith(f"| {ABOVE} |"))
    assert "| **holds** | +.102 | +.095 to +.109 |" in own and "busi (3), malaria (3)" in own
    assert all(any(line.startswith(f"| {one.text} |") for line in lines) for one in CLAIMS)
    assert all(f"| {words} | **not run yet** |" in text for words in UNMEASURED)
    assert "vanilla 6/30" in text and "rda 0/6" in text  # of the plan
    assert "no baseline there, on busi (.500 against .700)" in text
    assert "| vanilla | .500 ± .050 | .613 ± .038 |" in lines
    assert ".900: 9 / 15 / 36" in text
    assert "incomplete instructions\n" not in text  # no table without a row
    assert "There are no rows yet." in page({}, []) and "**holds**" not in page({}, [])
