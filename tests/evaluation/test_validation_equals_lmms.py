"""Validation figures of a training run are those of lmms-eval's `_score` task on the same split, on both hosts.

The first round counts as the best one here, so that what lmms-eval judges afterwards is the best checkpoint and not the
last step: weights, adapter and connector.
"""

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_runs
import mixture as llava_runs
import numpy as np
import pytest
import torch
from evaluating import TASKS
from ranks import launch
from safetensors.torch import load_file

from vitask_plugin import Specialist
from vitask_plugin.data.instructions import DRAWN, instruction
from vitask_plugin.model_folder import CONNECTOR_FILE
from vitask_plugin.report.results import on_split, read_results

SCORES, WORDS = "vitask_drawn_score", "vitask_drawn"
# 8 steps of 4 samples; a round before the first one, and after 4 and 8.
WATCHED = (
    *("--vitask_eval_data", "val.json", "--eval_strategy", "steps", "--eval_steps", "4", "--eval_on_start", "True"),
    *("--save_strategy", "steps", "--save_steps", "4", "--save_total_limit", "2", "--load_best_model_at_end", "True"),
    *("--metric_for_best_model", "ep_loss", "--greater_is_better", "True", "--per_device_train_batch_size", "4"),
    *("--vitask_connector_lr", "0.03", "--per_device_eval_batch_size", "3"),
)


@pytest.fixture(scope="module")
def commands(tiny_llava: Any, tiny_hf: Callable, mixture: Path, mixture_features: Path) -> Callable[..., list[str]]:
    """(host, tuning, output) to a command line."""
    watched = [str(mixture / word) if word == "val.json" else word for word in WATCHED]
    watched += ["--vitask_tsm", str(mixture_features.parent / "tsm")]

    def of(host: str, tuning: str, output: Path) -> list[str]:
        lora = hf_runs.LORA if tuning == "lora" else ()
        if host == "llava":
            return llava_runs.flags(tiny_llava, mixture, mixture_features, output, *watched, *lora)
        return hf_runs.vitask(tiny_hf("llava").folder, mixture, mixture_features, output, *watched, *lora)

    return of


def log(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


def rounds(output: Path) -> dict[int, dict[str, float]]:
    return {entry["step"]: entry for entry in log(output) if "eval_loss" in entry}


def judged(host: str, root: Path, output: Path, **model_args: Any) -> tuple[Any, Any]:
    """What lmms-eval's command says of the val split: the labels' scores, and the model's own answers."""
    from lmms_eval.__main__ import cli_evaluate

    given = ",".join(f"{name}={value}" for name, value in model_args.items())
    words = ["--model", f"vitask_{host}", "--model_args", given, "--include_path", str(TASKS)]
    words += ["--tasks", f"{SCORES},{WORDS}"]
    words += ["--device", "cpu", "--batch_size", "4", "--log_samples", "--output_path", str(output)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDMNIST_ROOT", str(root))
        patch.setenv("MEDMNIST_SPLIT", "val")
        patch.setattr(sys, "argv", ["lmms-eval", *words])
        cli_evaluate()
    found = read_results(output)
    return found[on_split(SCORES, "val")], found[on_split(WORDS, "val")]


# At the second rate all answers are labels after 8 steps, at the first one none is.
@pytest.mark.parametrize(
    ("host", "tuning", "rate", "learnt"), [("llava", "lora", "1e-3", 0.0), ("hf", "full", "5e-3", 1.0)]
)
def test_figures_are_those_of_lmms_eval_on_the_best_checkpoint(
    host: str,
    tuning: str,
    rate: str,
    learnt: float,
    commands: Callable,
    mixture_features: Path,
    drawn_root: Path,
    drawn_data: Path,
    tiny_llava: Any,
    tmp_path: Path,
) -> None:
    output = tmp_path / f"{host}-{tuning}"
    ended = launch(1, [*commands(host, tuning, output), "--learning_rate", rate], tmp_path / "log", host=host)
    assert ended.statuses == [0], ended.text
    found = rounds(output)
    assert list(found) == [0, 4, 8]
    record = json.loads((output / "vitask.json").read_text())
    text = instruction(DRAWN.modality, DRAWN.choices)
    assert record["questions"][DRAWN.task] == {"text": text, "multi_label": False}
    # What lies in the output is the round at 4 and neither the first weights nor the last ones.
    assert found[4]["eval_ep_loss"] > found[8]["eval_ep_loss"] + 0.01
    assert f"the weights are those of {output}/checkpoint-4" in ended.text
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-8"]
    base = {"model_base": tiny_llava.base} if host == "llava" else {}
    specialist = Specialist.load(output, tsm=mixture_features.parent / "tsm", device="cpu", **base)
    files = [drawn_data / "images" / sample["image"] for sample in json.loads((drawn_data / "val.json").read_text())]
    for branch, more in {"": {}, "ep_": {"tsm": mixture_features.parent / "tsm"}}.items():
        theirs, words = judged(host, drawn_root, tmp_path / f"judged-{branch}", pretrained=output, **base, **more)
        # So does `vitask predict`, of an adapter too.
        said = specialist.predict(files, ep=bool(more), batch_size=3)
        expected = np.array([answer.probabilities for _, answer in sorted(theirs.answers.items())])
        assert np.abs(np.array([[*one.probabilities.values()] for one in said]) - expected).max() < 1e-6
        ours = {name: found[4][f"eval_{branch}{name}"] for name in ("accuracy", "macro_f1", "auc", "loss")}
        for name in ("accuracy", "macro_f1", "auc"):
            assert ours[name] == pytest.approx(theirs.metrics[name], abs=1e-6)
        # Of the labels' likelihoods, by the number of tokens of all labels.
        losses = [-answer.log_likelihoods[answer.label] for answer in theirs.answers.values()]
        tokens = sum(losses) / ours["loss"]
        assert tokens == pytest.approx(round(tokens), rel=1e-6) and tokens >= 2 * len(losses)
        # Without an end token, or with words behind it, an answer is none that the model was taught.
        labels = [answer.text in (f"{name}." for name in words.data.choices) for answer in words.answers.values()]
        assert found[4][f"eval_{branch}on_label"] == statistics.fmean(labels)
        assert found[0][f"eval_{branch}on_label"] == 0 and found[8][f"eval_{branch}on_label"] == learnt
    # Said once, of what has been trained, in each branch.
    warned = sum(found[4][f"eval_{branch}on_label"] < 0.95 for branch in ("", "ep_"))
    assert ended.logs[0].read_text().count("validation images are no labels") == warned
    assert abs(found[4]["eval_ep_loss"] - found[4]["eval_loss"]) > 1e-3  # the exemplar says something
    # The connector alone, which no stock code would have loaded.
    best, last = (load_file(output / f"checkpoint-{step}" / CONNECTOR_FILE) for step in (4, 8))
    kept = load_file(output / CONNECTOR_FILE)
    assert all(torch.equal(kept[name], best[name]) for name in best)
    assert any(not torch.equal(last[name], best[name]) for name in best)
