"""Watching a run on validation data: what it leaves alone, what several processes see, the best checkpoint."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_runs
import mixture as llava_runs
import pytest
import torch
from curves import assert_identical, weights
from PIL import Image
from ranks import launch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.errors import VITaskError
from vitask_plugin.training import disk, saving, validation
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.training.validation_metrics import Scored, ValidationMetrics
from vitask_plugin.training.validation_round import _batches
from vitask_plugin.training.validation_samples import ValidationSamples, chosen
from vitask_plugin.tsm.features import FeatureStore

CLASSES = ["mild", "moderate", "severe"]


def rounds(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in log if "eval_loss" in entry]


def figures_of(entry: dict[str, float]) -> dict[str, float]:
    """Without how long it took."""
    return {name: value for name, value in entry.items() if not name.endswith(("runtime", "per_second", "epoch"))}


@pytest.fixture
def command(tiny_llava: Any, mixture: Path, mixture_features: Path) -> Callable[..., list[str]]:
    """(output, flags...) to a command line of 8 steps of 4 samples, watched with the TSM's exemplars."""

    def of(output: Path, *more: str) -> list[str]:
        watched = [
            "--vitask_tsm",
            str(mixture_features.parent / "tsm"),
            "--vitask_eval_data",
            str(mixture / "val.json"),
        ]
        words = [*watched, "--per_device_train_batch_size", "4", *more]
        return llava_runs.flags(tiny_llava, mixture, mixture_features, output, *words)

    return of


def run(arguments: list[str], processes: int = 1, host: str = "llava") -> str:
    output = Path(arguments[arguments.index("--output_dir") + 1])
    ended = launch(processes, arguments, output.parent / f"log-{output.name}", host=host)
    assert ended.statuses == [0] * processes, ended.text
    return ended.logs[0].read_text()


# A run ---------------------------------------------------------------------------------------------------------------


def test_a_watched_run_is_the_unwatched_one_bit_for_bit(
    command: Callable, tiny_llava: Any, mixture: Path, mixture_features: Path, tmp_path: Path
) -> None:
    lora = ("--lora_enable", "True", "--lora_r", "8", "--lora_dropout", "0.3")  # which draws random numbers
    steps = ("--eval_strategy", "steps", "--eval_steps", "3", "--eval_on_start", "True", "--vitask_eval_samples", "6")
    run(command(tmp_path / "watched", *lora, *steps))
    alone = ("--per_device_train_batch_size", "4", *lora)
    run(llava_runs.flags(tiny_llava, mixture, mixture_features, tmp_path / "alone", *alone))
    # And after the last step.
    assert [entry["step"] for entry in rounds(tmp_path / "watched")][:3] == [0, 3, 6]
    assert_identical(tmp_path / "watched", tmp_path / "alone")


@pytest.mark.parametrize("parallel", ["ddp", "zero2", "zero3"])
def test_two_processes_see_what_one_sees(parallel: str, command: Callable, zero: Callable, tmp_path: Path) -> None:
    """7 samples in batches of 2: the second process has one less in the last batches, and as many forwards."""
    first = ("--eval_strategy", "steps", "--eval_steps", "1", "--eval_on_start", "True", "--max_steps", "2")
    first += ("--vitask_eval_samples", "7", "--per_device_eval_batch_size", "2", "--save_strategy", "steps")
    first += ("--save_steps", "1", "--load_best_model_at_end", "True", "--greater_is_better", "True")
    deepspeed = ("--deepspeed", zero(parallel)) if parallel != "ddp" else ()
    run(command(tmp_path / "one", *first))
    run(command(tmp_path / "two", *first, *deepspeed, "--per_device_train_batch_size", "2"), processes=2)
    ours, theirs = rounds(tmp_path / "two"), rounds(tmp_path / "one")
    assert [entry["step"] for entry in ours] == [entry["step"] for entry in theirs] == [0, 1, 2]
    for found, expected, bound in zip(ours, theirs, (1e-6, 1e-3, 1e-3), strict=True):
        assert figures_of(found) == pytest.approx(figures_of(expected), rel=bound, abs=bound)
    assert len(figures_of(theirs[0])) == 2 * 10 + 1
    # By the loss, of which the largest is looked for, the first round of the two is the best.
    assert theirs[1]["eval_loss"] > theirs[2]["eval_loss"]
    for output in (tmp_path / "one", tmp_path / "two"):
        kept, best, last = (weights(output / name) for name in (".", "checkpoint-1", "checkpoint-2"))
        assert all(torch.equal(kept[name], best[name]) for name in kept) and "layers.0.weight" in kept
        assert any(not torch.equal(last[name], best[name]) for name in kept)


def test_the_best_is_kept_resumed_with_and_stopped_by(command: Callable, tmp_path: Path) -> None:
    """By a figure that falls, of which the largest is looked for: the first round stays the best."""
    best = ("--load_best_model_at_end", "True", "--metric_for_best_model", "eval_vitask_drawn_loss")
    best += ("--greater_is_better", "True", "--vitask_early_stopping_patience", "3", "--save_total_limit", "2")
    often = ("--eval_strategy", "steps", "--save_strategy", "steps", "--eval_steps", "2", "--save_steps", "2")
    output = tmp_path / "run"
    said = run(command(output, *best, *often, "--max_steps", "4"))
    state = json.loads((output / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(output / "checkpoint-2")
    assert state["best_metric"] == rounds(output)[0]["eval_vitask_drawn_loss"] > rounds(output)[1]["eval_loss"]
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    assert f"the weights are those of {output}/checkpoint-2" in said
    kept, saved = weights(output), weights(output / "checkpoint-2")
    assert kept.keys() <= saved.keys() and "layers.0.weight" in kept
    assert all(torch.equal(kept[name], saved[name]) for name in kept)
    # Resumed: one round without a better figure is behind it, and two more end it.
    said = run(command(output, *best, *often, "--max_steps", "16"))
    assert f"resuming from {output}/checkpoint-4" in said
    assert [entry["step"] for entry in rounds(output)] == [2, 4, 6, 8]
    assert f"the weights are those of {output}/checkpoint-2" in said
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-8"]


@pytest.mark.parametrize(("limit", "best", "left"), [(1, 2, [2, 8]), (2, 4, [4, 8]), (1, 8, [8]), (2, None, [6, 8])])
def test_the_best_checkpoint_outlives_later_ones(limit: int, best: int | None, left: list[int], tmp_path: Path) -> None:
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / saving.STAGING).mkdir()
    saving._rotate(tmp_path, 8, limit, best)
    assert sorted(disk.checkpoints(tmp_path)) == left


@pytest.mark.parametrize("host", ["llava", "hf"])
def test_engines_and_16_bits_give_the_same_figures(
    host: str, command: Callable, tiny_hf: Callable, mixture: Path, mixture_features: Path, tmp_path: Path
) -> None:
    found = {}
    for name, more in {"packed": (), "branches": (), "bf16": ("--bf16", "True")}.items():
        engine = ("--vitask_engine", "branches" if name == "branches" else "packed")
        words = ["--eval_strategy", "epoch", "--eval_on_start", "True", "--max_steps", "1", *engine, *more]
        if host == "llava":
            run(command(tmp_path / name, *words))
        else:
            words += ["--vitask_tsm", str(mixture_features.parent / "tsm")]
            words += ["--vitask_eval_data", str(mixture / "val.json")]
            model = tiny_hf("llava").folder
            run(hf_runs.vitask(model, mixture, mixture_features, tmp_path / name, *words), host="hf")
        found[name] = figures_of(rounds(tmp_path / name)[0])
    assert found["packed"] == pytest.approx(found["branches"], rel=1e-5)
    for name in ("eval_loss", "eval_ep_loss"):
        assert found["bf16"][name] == pytest.approx(found["packed"][name], rel=1e-2)
        assert found["bf16"][name] != pytest.approx(found["packed"][name], rel=1e-5)  # it did compute in 16 bits


def test_answers_become_labels_and_what_is_none_is_warned_of(command: Callable, tmp_path: Path) -> None:
    often = ("--eval_strategy", "steps", "--eval_steps", "4", "--eval_on_start", "True", "--learning_rate", "5e-3")
    said = run(command(tmp_path / "run", *often))
    shares = [(entry["eval_on_label"], entry["eval_ep_on_label"]) for entry in rounds(tmp_path / "run")]
    assert shares[0] == (0, 0) and shares[-1] == (1, 1)
    bad = [step * 4 for step, share in enumerate(shares) if share[0] < 0.95]
    warned = re.findall(r"step (\d+): .+without exemplars the model's own answers to \d of 8 .+ no labels", said)
    assert warned == [str(step) for step in bad[1:2]]  # once, and not of the untuned model


def test_a_relapse_is_warned_of_with_its_cause(caplog: pytest.LogCaptureFixture) -> None:
    watched = validation.Validated()
    watched.vitask = VITaskArguments(vitask=True, vitask_stage=2, vitask_ep="none", vitask_crt_weight=1.0)
    for step, found in enumerate([{}, {"a": "lost"}, {"a": "lost"}, {}, {"a": "lost again"}], start=1):
        watched.state = SimpleNamespace(global_step=step)
        watched._say_off_label({(task, False): sentence for task, sentence in found.items()})
    cause = "; the likely cause is --vitask_crt_weight 1, under which words fall apart: train stage 2 again with 0.1"
    assert [record.getMessage() for record in caplog.records] == [f"step 2: lost{cause}", f"step 5: lost again{cause}"]


# Which samples -------------------------------------------------------------------------------------------------------


def test_samples_are_chosen_by_task_and_class() -> None:
    def of(task: str, labels: list[int]) -> list[dict]:
        return [{"vitask": {"task": task, "label": label}} for label in labels]

    samples = of("large", [0] * 60 + [1] * 30 + [2] * 10) + of("small", [0, 1, 1])
    found = chosen(samples, 23, seed=0)
    assert found == sorted(set(found)) == chosen(samples, 23, seed=0) != chosen(samples, 23, seed=1)
    blocks = [samples[index]["vitask"] for index in found]
    assert [sum(block == {"task": "large", "label": label} for block in blocks) for label in range(3)] == [12, 6, 2]
    assert sum(block["task"] == "small" for block in blocks) == 3  # all that it has
    few = [samples[index]["vitask"]["label"] for index in chosen(samples[:100], 3, seed=0)]
    assert few == [0, 1, 2]  # one of each class, as far as there is room
    assert chosen(samples, 1000, seed=0) == list(range(103))


@pytest.mark.parametrize(("count", "size", "processes"), [(7, 2, 2), (1, 4, 3), (9, 2, 2), (8, 8, 1)])
def test_every_process_has_as_many_batches_and_every_sample_a_place(count: int, size: int, processes: int) -> None:
    batches = _batches(count, size, processes)
    assert all(len(batch) == processes and all(1 <= len(own) <= size for own in batch) for batch in batches)
    assert {number for batch in batches for own in batch for number in own} == set(range(count))


# What is made of the scores ------------------------------------------------------------------------------------------


def labelled(task: str, labels: list[Any], choices: list[str] = CLASSES) -> list[dict]:
    return [{"vitask": {"task": task, "label": label, "choices": choices}} for label in labels]


def answered(label: int, classes: int = 3, loss: float = 1.0, tokens: int = 2, on: bool = True) -> dict[bool, Scored]:
    losses = [0.5 if number == label else 4.0 + number for number in range(classes)]
    return {False: Scored(losses, loss, tokens, on), True: Scored(losses, loss / 2, tokens, True)}


def figures(*samples: dict, exemplars: bool = True) -> ValidationMetrics:
    tasks = {
        one["vitask"]["task"]: {
            "choices": one["vitask"]["choices"],
            "multi_label": isinstance(one["vitask"]["label"], list),
        }
        for one in samples
    }
    return ValidationMetrics(samples, tasks, exemplars=exemplars)


def test_figures_per_set_and_their_mean() -> None:
    samples = labelled("scans", [0, 1, 2, 2]) + labelled("eyes", [0, 1], ["yes", "no"])
    scored = [answered(0), answered(1), answered(1, loss=3.0, tokens=6), answered(2), answered(0, 2), answered(0, 2)]
    found = figures(*samples).of(scored)
    assert found["eval_scans_accuracy"] == 0.75 and found["eval_eyes_accuracy"] == 0.5
    assert found["eval_accuracy"] == found["eval_ep_accuracy"] == 0.625  # of sets, not of samples
    assert found["eval_on_label"] == found["eval_ep_on_label"] == 1.0
    assert found["eval_scans_loss"] == 6 / 12 and found["eval_eyes_loss"] == 2 / 4
    assert found["eval_ep_loss"] == 0.25
    assert found["eval_scans_macro_f1"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert list(found)[:5] == ["eval_loss", "eval_accuracy", "eval_macro_f1", "eval_auc", "eval_on_label"]
    assert list(found) == figures(*samples).names


def test_a_set_that_lacks_a_class_has_no_auc_and_neither_has_the_mean() -> None:
    names = figures(*labelled("scans", [0, 1]), *labelled("eyes", [0, 1], ["yes", "no"]), exemplars=False).names
    assert "eval_eyes_auc" in names and "eval_scans_auc" not in names and "eval_auc" not in names


def test_several_labels_are_each_scored_against_none() -> None:
    samples = labelled("chest", [[0], [1, 2], []])
    losses = [[1.0, 5.0, 5.0, 4.0], [5.0, 1.0, 1.0, 4.0], [5.0, 5.0, 5.0, 1.0]]  # of each label, and of none
    found = figures(*samples, exemplars=False).of([{False: Scored(one, 1.0, 1, False)} for one in losses])
    assert found["eval_accuracy"] == found["eval_auc"] == 1.0
    assert "eval_on_label" not in found  # an answer of two labels is not scored


@pytest.mark.parametrize(
    ("labels", "answers", "warned"),
    [
        ([0] * 10 + [1] * 11, [2] * 21, "21 of 21 validation images are answered 'severe', which 0 of them are"),
        ([0] * 10 + [1] * 11, [1] * 20 + [0], "20 of 21 validation images are answered 'moderate', which 11"),
        ([0] * 10 + [1] * 10, [1] * 19 + [0], None),  # 95 %, and not more
        ([0] * 20 + [1], [0] * 21, None),  # as the samples are themselves
    ],
)
def test_collapse_is_one_class_for_nearly_all(labels: list[int], answers: list[int], warned: str | None) -> None:
    found = figures(*labelled("scans", labels)).collapsed([answered(answer) for answer in answers])
    assert (warned in found["scans"]) if warned else not found


def test_answers_that_are_no_labels_are_counted_by_set_and_branch() -> None:
    samples = labelled("scans", [0, 1, 2] * 7) + labelled("eyes", [0, 1], ["yes", "no"])
    scored = [answered(0, on=number > 1) for number in range(21)] + [answered(0, 2)] * 2
    made = figures(*samples)
    assert made.of(scored)["eval_scans_on_label"] == 19 / 21 and made.of(scored)["eval_scans_ep_on_label"] == 1
    sentences = made.off_label(scored)
    assert list(sentences) == [("scans", False)]
    assert "'scans': without exemplars the model's own answers to 2 of 21 validation" in sentences["scans", False]
    one_less = [answered(0, on=number > 0) for number in range(21)] + [answered(0, 2)] * 2
    assert made.off_label(one_less) == {}  # below one in twenty


def test_a_task_may_not_take_anothers_name() -> None:
    with pytest.raises(VITaskError, match=r"'eval_ep_\w+' would be the name of two validation metrics"):
        figures(*labelled("ep", [0, 1, 2]))


# Bad input -----------------------------------------------------------------------------------------------------------


Change = Callable[[list[dict], list[dict], Path], tuple[list[dict], list[dict]]]


def overlapping(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    return train, [*val, {**train[-1], "id": "again"}]


def copied(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    shutil.copyfile(images / train[-1]["image"], images / val[0]["image"])
    return train, val


def grouped(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    def of(sample: dict) -> dict:
        return {**sample, "vitask": {**sample["vitask"], "group": "patient 7"}} if "vitask" in sample else sample

    return [*train[:-1], of(train[-1])], [of(val[0]), *val[1:]]


def renamed(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    return train, [{**one, "vitask": {**one["vitask"], "task": "fundus"}} for one in val]


def reordered(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    def of(block: dict) -> dict:
        return {**block, "choices": block["choices"][::-1], "label": len(block["choices"]) - 1 - block["label"]}

    return train, [{**one, "vitask": of(one["vitask"])} for one in val]


def bare(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    return train, [{name: value for name, value in one.items() if name != "vitask"} for one in val]


def larger(train: list[dict], val: list[dict], images: Path) -> tuple[list[dict], list[dict]]:
    for one in val:
        with Image.open(images / one["image"]) as picture:
            wide = picture.resize((60, 60))
        wide.save(images / one["image"])
    return train, val


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (overlapping, r"share 1 of 9 validation images, the first being '.+train.+'; split the images"),
        (copied, r"share 1 of 8 validation images, the first being '.+val.+', which holds what '.+train.+' of"),
        (grouped, r"1 of 1 groups of the validation data are in the training data too, .+'patient 7'.+; split whole"),
        (renamed, r"has the task 'fundus', and --data_path '.+' has 'vitask_drawn' alone"),
        (reordered, r"has the labels \['.+'\] for task 'vitask_drawn', and --data_path '.+' has \['.+'\]; give both"),
        (bare, r"no sample with a 'vitask' block, so there is nothing to validate on; .+ leave --vitask_eval_data out"),
        (larger, r"this run is trained on .+28.+60.+; .+"),
    ],
)
def test_data_that_would_mislead_is_one_sentence(change: Change, sentence: str, mixture: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(mixture, tmp_path / "data")
    data = (json.loads((folder / name).read_text()) for name in ("train.json", "val.json"))
    for name, samples in zip(("train.json", "val.json"), change(*data, folder / "images"), strict=True):
        (folder / name).write_text(json.dumps(samples))
    vitask = VITaskArguments(vitask=True, vitask_ep="none", vitask_eval_data=str(folder / "val.json"))
    train = TaskSamples(str(folder / "train.json"), str(folder / "images"), None, vitask, ())
    with pytest.raises(VITaskError, match=sentence) as refused:
        ValidationSamples(vitask, train, seed=0)
    assert "\n" not in str(refused.value) and str(folder / "val.json") in str(refused.value)


def test_a_test_split_is_no_validation_data(mixture: Path, tmp_path: Path) -> None:
    vitask = VITaskArguments(vitask=True, vitask_ep="none", vitask_eval_data=str(tmp_path / "test.json"))
    shutil.copy(mixture / "val.json", tmp_path / "test.json")
    train = TaskSamples(str(mixture / "train.json"), str(mixture / "images"), None, vitask, ())
    with pytest.raises(VITaskError, match=r"^--vitask_eval_data '.+test.json' is a test split .+; give the val split$"):
        ValidationSamples(vitask, train, seed=0)


@pytest.mark.parametrize(("wanted", "refused"), [(1, True), (2, False), (0, False)])
def test_fewer_samples_than_sets_leave_none_out(wanted: int, refused: bool, mixture: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        samples = [one for one in json.loads((mixture / f"{split}.json").read_text()) if "vitask" in one]
        other = [{**one, "vitask": {**one["vitask"], "task": "another"}} for one in samples]
        (tmp_path / f"{split}.json").write_text(json.dumps(samples + other))
    given = {"vitask_eval_data": str(tmp_path / "val.json"), "vitask_eval_samples": wanted}
    vitask = VITaskArguments(vitask=True, vitask_ep="none", **given)
    train = TaskSamples(str(tmp_path / "train.json"), str(mixture / "images"), None, vitask, ())
    if refused:
        with pytest.raises(VITaskError, match=r"--vitask_eval_samples 1 is fewer than the 2 sets .+; give at least 2"):
            ValidationSamples(vitask, train, seed=0)
    else:
        found = ValidationSamples(vitask, train, seed=0)
        assert {one["vitask"]["task"] for one in found.list_data_dict} == {"vitask_drawn", "another"}


def test_an_unknown_figure_is_told_the_known_ones(mixture: Path, tmp_path: Path) -> None:
    vitask = VITaskArguments(vitask=True, vitask_ep="none", vitask_eval_data=str(mixture / "val.json"))
    train = TaskSamples(str(mixture / "train.json"), str(mixture / "images"), None, vitask, ())
    args = SimpleNamespace(seed=0, metric_for_best_model="eval_ep_accuracy", output_dir=str(tmp_path))
    known = "loss, accuracy, macro_f1, auc, on_label, vitask_drawn_loss, .+ or vitask_drawn_on_label"
    with pytest.raises(VITaskError, match=rf"--metric_for_best_model eval_ep_accuracy is none .+; choose {known}"):
        validation.read(vitask, train, args)
    args.metric_for_best_model = "vitask_drawn_auc"
    samples, _ = validation.read(vitask, train, args)
    assert len(samples) == 8


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--eval_strategy steps", "--eval_strategy steps: there is no data to validate on .+ give --vitask_eval_data"),
        ("--load_best_model_at_end True", "--load_best_model_at_end True: there is no data"),
        ("--vitask_eval_samples 4", "--vitask_eval_samples 4: there is no data"),
        ("--vitask_eval_data val.json", "val.json is never looked at with --eval_strategy no"),
        (
            "--vitask_eval_data val.json --eval_strategy epoch --vitask_early_stopping_patience 2",
            "--vitask_early_stopping_patience 2 does not say with which figure; give --metric_for_best_model",
        ),
        ("--vitask_eval_data val.json --eval_strategy epoch --save_strategy best", "does not say by what"),
        (
            "--vitask_eval_data val.json --eval_strategy epoch --load_best_model_at_end True --save_only_model True "
            "--deepspeed zero2.json",
            "--save_only_model True leaves out",
        ),
        ("--vitask_eval_data val.json --eval_strategy epoch --bf16_full_eval True", "computes in what a step computes"),
    ],
)
def test_flags_that_do_not_go_together_are_one_sentence(words: str, sentence: str) -> None:
    from transformers import HfArgumentParser

    from vitask_plugin.hf.arguments import REFUSED, DataArguments, ModelArguments, TrainingArguments
    from vitask_plugin.training import flags

    parser = HfArgumentParser((ModelArguments, DataArguments, TrainingArguments))
    parsed, left = parser.parse_known_args([*words.split(), "--output_dir", "out"])
    assert left == []
    with pytest.raises(VITaskError, match=sentence):
        flags.check(parsed, REFUSED)


def test_features_that_lack_the_images_need_the_tsm(mixture: Path, mixture_features: Path, tmp_path: Path) -> None:
    vitask = VITaskArguments(
        vitask=True, vitask_features=str(mixture_features), vitask_eval_data=str(mixture / "val.json")
    )
    train = TaskSamples(str(mixture / "train.json"), str(mixture / "images"), None, vitask, ())
    args = SimpleNamespace(seed=0, metric_for_best_model=None, output_dir=str(tmp_path))
    with pytest.raises(VITaskError, match=r"lacks images of --vitask_eval_data .+; give --vitask_tsm DIR"):
        validation.read(vitask, train, args)


def test_features_of_an_earlier_start_must_hold_the_images(
    mixture: Path, mixture_features: Path, tmp_path: Path
) -> None:
    shutil.copytree(mixture_features, tmp_path / validation.FEATURES_FOLDER)
    words = {"vitask_features": str(mixture_features), "vitask_tsm": str(mixture_features.parent / "tsm")}
    vitask = VITaskArguments(vitask=True, vitask_eval_data=str(mixture / "val.json"), **words)
    train = TaskSamples(str(mixture / "train.json"), str(mixture / "images"), None, vitask, ())
    contents = survey(train.image_folder, train.images(), frozenset(train.task_images()))
    exemplars = Exemplars(vitask, train, contents, FeatureStore.open(mixture_features))
    args = SimpleNamespace(seed=0, metric_for_best_model=None, output_dir=str(tmp_path), dataloader_num_workers=0)
    with pytest.raises(VITaskError, match=r"of an earlier start hold nothing for .+'val/00000.png'; delete the folder"):
        validation.prepare(*validation.read(vitask, train, args), vitask, exemplars, args)
