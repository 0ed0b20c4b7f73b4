"""The benchmarks of answering and of data, run whole at a tiny size: the form of their JSON, and what must hold."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--hidden", 64, "--layers", 2, "--image-tokens", 16, "--vocabulary", 1200, "--batch", 2, "--repeats", 1]
# Each script as `python SCRIPT FLAGS` runs it, one after the other with the imports done.
IN_TURN = """
import json, runpy, sys
for sys.argv in json.loads(sys.stdin.read()):
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, ended
"""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each benchmark appends to its file."""
    folder = tmp_path_factory.mktemp("measured")
    own = {
        "score_cost": ["--labels", 2, 8],
        "eval_cost": ["--labels", 8],
        "generate_cost": ["--questions", 1, 3, "--new-tokens", 3],
        "data_cost": ["--arch", "test_vit", "--images", 70],
    }
    commands = [
        [str(word) for word in (BENCHMARKS / f"{name}.py", *TINY, "--threads", 1, *flags, "--json", folder / name)]
        for name, flags in own.items()
    ]
    process = [sys.executable, "-c", IN_TURN]
    done = subprocess.run(
        process, cwd=BENCHMARKS, input=json.dumps(commands), capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return {name: json.loads((folder / name).read_text()) for name in own}


def test_scores_equal_a_forward_per_label(measured: dict[str, Any]) -> None:
    rows = measured["score_cost"]["rows"]
    assert [row["labels"] for row in rows] == [2, 8]
    for row in rows:
        assert row["max_probability_diff"] < 1e-5
        assert 0 < row["max_rel_log_likelihood_diff"] < 1e-5
        assert len(row["label_tokens"]) == row["labels"]
        assert row["instruction_tokens"] >= 75
        assert 1 < row["predicted_score_over_prefill"] < 2
        assert {"score", "prefill", "per_label", "generate"} == set(row["seconds_per_image"])
        assert row["per_label_over_score"] > 0  # how fast is for the benchmark to say


def test_a_validation_round_is_measured_beside_its_prefill(measured: dict[str, Any]) -> None:
    (row,) = measured["eval_cost"]["rows"]
    assert {"both", "plain", "prefill"} == set(row["seconds_per_image"])
    assert len(row["label_tokens"]) == row["labels"] == 8
    # 16 image tokens leave little to share.
    assert row["plain_over_prefill"] > 0 and 1 < row["predicted_both_over_prefill"] < 3


def test_shared_questions_get_the_answers_they_get_apart(measured: dict[str, Any]) -> None:
    rows = measured["generate_cost"]["rows"]
    assert [(row["questions"], row["same_answers"]) for row in rows] == [(1, True), (3, True)]
    assert all(seconds["p50"] > 0 for row in rows for seconds in row["seconds_per_answer"].values())


def test_every_rate_of_the_data_is_there(measured: dict[str, Any]) -> None:
    extraction, loader = measured["data_cost"]["extraction"], measured["data_cost"]["loader"]
    assert extraction["images_per_second"].keys() == {"extract", "bare"}
    assert extraction["extraction_over_bare"] > 0
    assert loader["reading_share_of_step"] > 0
    assert loader["loader_over_step"] > 0


def test_the_start_of_a_run_is_measured_in_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import start_cost

    found = start_cost.measure(tmp_path, 50)
    assert list(found["seconds"]) == ["read", "find", "hash", "again"] and found["samples"] == 50
    assert start_cost.start_table(found).row_count == 5


@pytest.mark.parametrize("name", ["score_cost", "generate_cost", "data_cost"])
def test_a_line_says_what_it_was_measured_on(name: str, measured: dict[str, Any]) -> None:
    line = measured[name]
    assert line["config"]["hidden"] == 64
    assert line["config"]["repeats"] == 1
    assert {"processor", "threads", "versions"} <= line["machine"].keys()
