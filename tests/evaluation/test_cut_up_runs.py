"""However a run of the real lmms-eval is cut up, by processes or by a kill, the answers are the same, one by one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from trained import Trained, make_trained

from vitask_plugin.data.drawn import draw_dataset

TASKS = Path(__file__).parents[2] / "eval_tasks"
NAMES = ("vitask_drawn", "vitask_drawn_incomplete", "vitask_drawn_score")
IMAGES = 160  # more than the response cache writes at one time
LMMS_EVAL = ("-m", "lmms_eval")
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *LMMS_EVAL)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), tiny_checkpoint, "cls")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("medmnist")
    draw_dataset(folder / "drawn.npz", seed=0, sizes={"train": 4, "val": 4, "test": IMAGES})
    return folder


def start(trained: Trained, root: Path, output: Path, *flags: Any, program: tuple[str, ...] = LMMS_EVAL) -> Any:
    command = [
        *(sys.executable, *program, "--model", "vitask_llava", "--device", "cpu", "--include_path", TASKS),
        *("--model_args", f"pretrained={trained.checkpoint},tsm={trained.tsm}", "--tasks", ",".join(NAMES)),
        *("--output_path", output, "--log_samples", *flags),
    ]
    environment = {**os.environ, "MEDMNIST_ROOT": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [str(word) for word in command],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: Any) -> str:
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 0, printed[-4000:]
    return printed


def answers(output: Path) -> dict[tuple[str, int], tuple[Any, Any]]:
    """(task, image) -> what was answered, and the label likelihoods of a `_score` task."""
    found = {}
    for task in NAMES:
        (path,) = output.rglob(f"*_samples_{task}.jsonl")
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(lines) == len({line["doc_id"] for line in lines}) == IMAGES
        for line in lines:
            score = line["n"].get("log_likelihoods")
            found[task, line["doc_id"]] = (line["n"]["prediction"] if score else line["filtered_resps"], score)
    return found


def figures(output: Path) -> dict[str, dict[str, Any]]:
    (path,) = output.rglob("*_results.json")
    return {
        task: {k: v for k, v in values.items() if "stderr" not in k}
        for task, values in json.loads(path.read_text())["results"].items()
    }


def check_same(output: Path, expected: Path) -> None:
    ours, theirs = answers(output), answers(expected)
    assert ours.keys() == theirs.keys() and len(theirs) == len(NAMES) * IMAGES
    for key, (answer, score) in theirs.items():
        assert ours[key][0] == answer, key
        assert ours[key][1] == (None if score is None else pytest.approx(score, abs=1e-4)), key
    assert len({str(answer) for answer, _ in theirs.values()}) > 10  # the images make a difference
    ours_by_task, theirs_by_task = figures(output), figures(expected)
    for task in NAMES:
        assert ours_by_task[task].keys() == theirs_by_task[task].keys()
        for name, value in theirs_by_task[task].items():
            assert ours_by_task[task][name] == pytest.approx(value, abs=1e-3), (task, name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, trained: Trained, root: Path) -> Path:
    """One process, batches of 8, nothing cached."""
    output = tmp_path_factory.mktemp("whole")
    finish(start(trained, root, output, "--batch_size", 8))
    return output


def test_two_processes_give_what_one_gives(whole: Path, trained: Trained, root: Path, tmp_path: Path) -> None:
    finish(start(trained, root, tmp_path, "--batch_size", 8, program=TWO_PROCESSES))
    check_same(tmp_path, whole)


def test_killed_in_the_middle_and_started_again(whole: Path, trained: Trained, root: Path, tmp_path: Path) -> None:
    """What was answered before the kill is not asked for again, and the result is that of one run."""
    cache = tmp_path / "cache"
    flags = ("--batch_size", 2, "--use_cache", cache)
    process = start(trained, root, tmp_path / "killed", *flags)
    limit = time.monotonic() + 300
    while len(logged(cache)) < 50 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = logged(cache)
    total = IMAGES * (2 + 4)  # two questions, and four labels to score
    assert 0 < len(before) < total
    assert not list((tmp_path / "killed").rglob("*_results.json"))
    printed = finish(start(trained, root, tmp_path / "resumed", *flags))
    hits, misses = map(int, re.search(r"ResponseCache stats: (\d+) hits.*?, (\d+) misses", printed).groups())
    # What was answered is not asked for again; the last answer may have been logged, and not yet stored.
    assert hits >= len(set(before)) - 1 > 0 and hits + misses == total
    check_same(tmp_path / "resumed", whole)


def logged(cache: Path) -> list[tuple]:
    """The requests whose answers the cache's log of answers holds; a half-written last line is left out."""
    found = []
    for path in cache.rglob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                record = json.loads(line)
                found.append(tuple(str(record[key]) for key in ("request_type", "task_name", "doc_id", "idx")))
    return found
