"""Requests of any task to the model of the harness: images, prompts, stops, batches, and the response cache."""

import gc
import os
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluating import ask, load_tasks, open_model
from trained import Trained

from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.instructions import DRAWN, instruction


def test_several_images_and_none_in_one_batch(everywhere: SimpleNamespace) -> None:
    pictures = [row["image"] for row in everywhere.tasks["vitask_drawn"].test_docs()]
    questions = [
        ([], "What is a texture?"),
        (pictures[:1], instruction(DRAWN.modality, None)),
        (pictures[:2], "Which of the two?"),
        (pictures[1:2], "Analyze."),
    ]
    together = ask(everywhere.model, questions, max_new_tokens=12)
    assert together == [ask(everywhere.model, [question], max_new_tokens=12)[0] for question in questions]
    assert len(set(together)) > 1


@pytest.mark.parametrize("marked", [False, True])
def test_an_image_token_in_the_prompt_is_the_only_one(
    marked: bool, prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vitask_plugin.evaluation.lmms_exemplars import Query

    monkeypatch.setattr(prompted.model.model.config, "mm_use_im_start_end", marked)
    pictures = [row["image"] for row in prompted.tasks["vitask_drawn"].test_docs()][:2]
    for count in (1, 2):
        ids = prompted.model._prompt_ids(Query("<image>\n" * count + "Analyze.", pictures[:count]))
        assert ids == prompted.model._prompt_ids(Query("Analyze.", pictures[:count]))
        assert sum(token < 0 for token in ids) == count
    within = prompted.model._prompt_ids(Query("Analyze <image> now.", pictures[:1]))
    assert sum(token < 0 for token in within) == 1


@pytest.mark.parametrize(("count", "question"), [(0, "<image>\nAnalyze."), (2, "<image>\nAnalyze.")])
def test_image_tokens_without_their_image_are_refused(count: int, question: str, prompted: SimpleNamespace) -> None:
    pictures = [row["image"] for row in prompted.tasks["vitask_drawn"].test_docs()][:count]
    with pytest.raises(SystemExit, match=f"document 0: the prompt names <image> 1 times for {count} images"):
        ask(prompted.model, [(pictures, question)])


def test_until_and_max_new_tokens(prompted: SimpleNamespace) -> None:
    question = (prompted.tasks["vitask_drawn"].test_docs()[0]["image"], instruction(DRAWN.modality, DRAWN.choices))
    questions = [([question[0]], question[1])]
    (whole,) = ask(prompted.model, questions, max_new_tokens=40)
    (short,) = ask(prompted.model, questions, max_new_tokens=5)
    assert len(short) < len(whole)
    stop = whole[8:12]
    (cut,) = ask(prompted.model, questions, max_new_tokens=40, until=[stop, "\n\n"])
    assert cut == whole[: whole.index(stop)].strip()


def test_a_model_that_gives_no_numbers_is_refused(prompted: SimpleNamespace) -> None:
    """Greedy decoding takes token 0 of NaN, whose text is empty: all answers would be wrong ones."""
    picture = prompted.tasks["vitask_drawn"].test_docs()[0]["image"]
    weight = prompted.model.model.lm_head.weight.data
    before = weight.clone()
    try:
        weight.fill_(float("nan"))
        with pytest.raises(SystemExit, match="gives NaN in place of scores"):
            ask(prompted.model, [([picture], "no grain")])
    finally:
        weight.copy_(before)


def test_a_prompt_that_does_not_fit_is_refused(prompted: SimpleNamespace) -> None:
    picture = prompted.tasks["vitask_drawn"].test_docs()[0]["image"]
    with pytest.raises(SystemExit, match="shorten the question"):
        ask(prompted.model, [([picture], "no grain " * 3000)])


def test_a_batch_that_does_not_fit_is_one_sentence(prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own error, in answering and in scoring."""
    for name in ("vitask_generate", "vitask_states"):
        monkeypatch.setattr(prompted.model.model, name, lambda *_, **__: torch.empty(2**50))
    sentence = "vitask: error: out of memory on cpu with 2 prompts in a batch; give a --batch_size below"
    with pytest.raises(SystemExit, match=sentence):
        prompted.model.generate_until(prompted.tasks["vitask_drawn"].instances[:2])
    with pytest.raises(SystemExit, match=sentence):
        prompted.model.loglikelihood(prompted.tasks["vitask_drawn_score"].instances[: 2 * len(DRAWN.choices)])


def test_the_response_cache_sees_retrained_weights_and_other_data(
    trained: Trained, drawn_root: Path, tmp_path: Path
) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    cache = ResponseCache.create(str(tmp_path / "cache"), model="vitask_llava", model_args="pretrained=x")
    misses = 0

    def new_answers(model: Any, task: Any) -> int:
        """How many of two requests the cache had to ask the model for."""
        nonlocal misses
        cache.execute(model, "generate_until", task.instances[:2])
        new, misses = cache.get_stats()["misses"] - misses, cache.get_stats()["misses"]
        return new

    copy = shutil.copytree(trained.checkpoint, tmp_path / "llava-copy")
    model = open_model(copy)
    task = load_tasks(model, drawn_root, "vitask_drawn")["vitask_drawn"]
    assert new_answers(model, task) == 2
    for words in ({}, {"tsm": trained.tsm}, {"tsm": trained.tsm, "ep": "all"}):
        another = open_model(trained.checkpoint, **words)  # beside the first
        another.task_dict = model.task_dict
        assert new_answers(another, task) == 2
    assert new_answers(model, task) == 0
    os.utime(copy / "model.safetensors", ns=(1, 1))
    assert new_answers(model, task) == 2
    assert new_answers(model, task) == 0
    draw_dataset(tmp_path / "drawn.npz", seed=9, sizes={"train": 4, "val": 4, "test": 4})
    task = load_tasks(model, tmp_path, "vitask_drawn")["vitask_drawn"]
    assert new_answers(model, task) == 2


def test_the_response_cache_leaves_out_what_a_killed_run_left_half_made(trained: Trained, tmp_path: Path) -> None:
    from lmms_eval.caching.response_cache import ResponseCache

    from vitask_plugin.evaluation import lmms_cache

    for name, content in {"empty": b"", "cut": b"SQLite format 3"}.items():
        (tmp_path / "cache/runs" / name).mkdir(parents=True)
        (tmp_path / "cache/runs" / name / "rank_0.db").write_bytes(content)
    cache = ResponseCache.create(str(tmp_path / "cache"), model="vitask_llava", model_args="pretrained=x")
    lmms_cache._take_over(cache)
    assert cache.get_stats()["total_cached_entries"] == 0


def test_the_response_cache_keeps_no_model(trained: Trained) -> None:
    model = weakref.ref(open_model(trained.checkpoint))
    gc.collect()
    assert model() is None
