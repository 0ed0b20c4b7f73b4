"""The model and the tasks inside the real lmms-eval: its command, its task manager, its requests."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import VARIANTS, load_tasks, open_model
from medmnist.evaluator import getAUC
from PIL import Image
from trained import Trained, make_trained

from vitask_plugin.data.instructions import DRAWN, instruction
from vitask_plugin.evaluation import metrics
from vitask_plugin.report import TaskResult, read_results

TASKS = Path(__file__).parents[2] / "eval_tasks"


def lmms_eval(*words: Any, root: Path, error: int = subprocess.STDOUT) -> subprocess.CompletedProcess[str]:
    """The real command on our model and tasks, in a process of its own."""
    command = [
        *(Path(sys.executable).with_name("lmms-eval"), "--model", "vitask_llava", "--device", "cpu"),
        *("--include_path", TASKS, *words),
    ]
    return subprocess.run(
        [str(word) for word in command],
        env={**os.environ, "MEDMNIST_ROOT": str(root)},
        stdout=subprocess.PIPE,
        stderr=error,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, trained: Trained, drawn_root: Path) -> dict[str, TaskResult]:
    """What one run of the real command wrote, at batch size 8 with exemplars."""
    output = tmp_path_factory.mktemp("command")
    done = lmms_eval(
        *("--model_args", f"pretrained={trained.checkpoint},tsm={trained.tsm}", "--tasks", ",".join(VARIANTS)),
        *("--batch_size", 8, "--output_path", output, "--log_samples"),
        root=drawn_root,
    )
    assert done.returncode == 0, done.stdout
    assert set(VARIANTS) <= set(done.stdout.replace("|", " ").split()), done.stdout
    return read_results(output)


def test_the_command_runs_model_and_tasks(results: dict[str, TaskResult], drawn_root: Path) -> None:
    labels = np.load(drawn_root / "drawn.npz")["test_labels"][:, 0].tolist()
    assert set(results) == set(VARIANTS)
    for task, result in results.items():
        assert [outcome.target for outcome in result.outcomes] == labels
        assert result.metrics["accuracy"] == pytest.approx(metrics.accuracy(result.outcomes))
        assert result.metrics["macro_f1"] == pytest.approx(metrics.macro_f1(result.outcomes))
        if task.endswith("_score"):
            scores = np.array([answer.probabilities for answer in result.answers.values()])
            assert result.metrics["auc"] == pytest.approx(getAUC(np.array(labels), scores, DRAWN.kind))
            assert len(np.unique(scores)) > len(labels)  # the images make a difference
        else:
            assert result.metrics["unmapped"] == metrics.unmapped(result.outcomes)
            assert result.metrics["unmapped_strict"] >= result.metrics["unmapped"]
            assert len({answer.text for answer in result.answers.values()}) > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_answers_do_not_depend_on_the_batch_size(
    batch_size: int, results: dict[str, TaskResult], prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompted.model, "batch_size", batch_size)
    for task in ("vitask_drawn", "vitask_drawn_incomplete"):
        answers = prompted.model.generate_until(prompted.tasks[task].instances)
        assert answers == [answer.text for answer in results[task].answers.values()]
    scored = prompted.model.loglikelihood(prompted.tasks["vitask_drawn_score"].instances)
    losses = np.array([loss for loss, _ in scored]).reshape(-1, len(DRAWN.choices))
    for row, answer in zip(losses, results["vitask_drawn_score"].answers.values(), strict=True):
        assert answer.probabilities == pytest.approx(metrics.probabilities(row, DRAWN.kind), abs=1e-5)


def test_an_absent_data_file_offline_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's own entry: it retries loading, and turns every `Exception` into a traceback and status 0."""
    from lmms_eval.__main__ import cli_evaluate

    monkeypatch.setenv("MEDMNIST_ROOT", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):  # a proxy that is not there: the network cannot be reached
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    arguments = ["--model", "dummy", "--tasks", "medmnist_breast", "--include_path", TASKS, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lmms-eval", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli_evaluate()
    sentence = stopped.value.code
    assert sentence.startswith("vitask: error: ")
    assert str(tmp_path / "breastmnist.npz") in sentence
    assert "\n" not in sentence
    assert "Traceback" not in "".join(capsys.readouterr())
    assert list(tmp_path.iterdir()) == []


def test_bad_input_to_the_model_ends_the_command(trained: Trained, drawn_root: Path) -> None:
    model_args = f"pretrained={trained.checkpoint},ep=True"
    done = lmms_eval("--model_args", model_args, "--tasks", "vitask_drawn", root=drawn_root, error=subprocess.PIPE)
    assert done.returncode == 1, done.stderr
    sentences = [line for line in done.stderr.splitlines() if line.startswith("vitask: error: ")]
    assert len(sentences) == 1, done.stderr
    assert "ep=True needs the task-specific model" in sentences[0]
    assert "Traceback" not in done.stdout + done.stderr


def full_forward_loss(model: Any, image: Image.Image, question: str, answer: str) -> float:
    """The summed loss of an answer by upstream's own path: one forward of the whole conversation, labels from the
    training script. With a TSM the exemplar is put in by hand after the image tokens."""
    from llava import conversation
    from llava.constants import IGNORE_INDEX
    from llava.train.train import preprocess

    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.pad_token = tokenizer.unk_token  # as upstream's training script sets it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conversation, "default_conversation", conversation.conv_templates["vicuna_v1"])
        tokens = preprocess([turns], tokenizer, has_image=True)
    pixels = model.image_processor.preprocess(image, return_tensors="pt")["pixel_values"]
    _, _, _, _, embeds, labels = model.model.prepare_inputs_labels_for_multimodal(
        tokens["input_ids"], None, None, None, tokens["labels"], pixels
    )
    if model.tsm is not None:
        after_image = int((tokens["input_ids"][0] < 0).nonzero()[0]) + model.model.get_vision_tower().num_patches
        feature = model.tsm(model.tsm.preprocess(image)[None]).pooled
        exemplar = model.model.vitask_connector(feature)[None]
        embeds = torch.cat([embeds[:, :after_image], exemplar, embeds[:, after_image:]], dim=1)
        blank = torch.full((1, 1), IGNORE_INDEX)
        labels = torch.cat([labels[:, :after_image], blank, labels[:, after_image:]], dim=1)
    with torch.no_grad():
        logits = model.model(inputs_embeds=embeds).logits[0, :-1]
    kept = labels[0, 1:] != IGNORE_INDEX
    assert kept.sum() > 2
    return float(torch.nn.functional.cross_entropy(logits[kept], labels[0, 1:][kept], reduction="sum"))


@pytest.mark.parametrize("side", ["prompted", "unprompted"])
def test_label_scores_are_those_of_one_full_forward_per_label(side: str, request: pytest.FixtureRequest) -> None:
    loaded = request.getfixturevalue(side)
    task = loaded.tasks["vitask_drawn_score"]
    scored = loaded.model.loglikelihood(task.instances)
    documents = task.test_docs()
    assert len(scored) == len(documents) * len(DRAWN.choices)
    for (loss, greedy), instance in zip(scored[:24], task.instances[:24], strict=True):
        document = documents[instance.doc_id]
        answer = document["candidates"][instance.idx]
        expected = full_forward_loss(loaded.model, document["image"], document["question"], answer)
        assert loss == pytest.approx(expected, rel=2e-6)
        assert isinstance(greedy, bool)


def test_scores_keep_the_order_of_the_requests(prompted: SimpleNamespace) -> None:
    instances = prompted.tasks["vitask_drawn_score"].instances[:12]
    shuffled = [instances[index] for index in (7, 0, 11, 3, 5, 1, 2, 10, 4, 6, 9, 8, 0)]
    by_place = {
        (instance.doc_id, instance.idx): loss
        for instance, (loss, _) in zip(instances, prompted.model.loglikelihood(instances), strict=True)
    }
    for instance, (loss, _) in zip(shuffled, prompted.model.loglikelihood(shuffled), strict=True):
        assert loss == pytest.approx(by_place[instance.doc_id, instance.idx], rel=1e-5)


def test_the_exemplar_changes_scores_and_answers(prompted: SimpleNamespace, unprompted: SimpleNamespace) -> None:
    instances = prompted.tasks["vitask_drawn_score"].instances[:4]
    with_exemplar, without = (side.model.loglikelihood(instances) for side in (prompted, unprompted))
    # Far above what the comparison with full forwards lets pass.
    assert max(abs(a - b) for (a, _), (b, _) in zip(with_exemplar, without, strict=True)) > 1e-3
    instances = prompted.tasks["vitask_drawn"].instances
    assert prompted.model.generate_until(instances) != unprompted.model.generate_until(instances)


def test_without_the_exemplar_answers_are_upstreams(unprompted: SimpleNamespace) -> None:
    from llava.mm_utils import tokenizer_image_token

    model, task = unprompted.model, unprompted.tasks["vitask_drawn"]
    for instance in task.instances[:3]:
        document = task.test_docs()[instance.doc_id]
        conversation = model.template.copy()
        conversation.append_message("USER", f"<image>\n{document['question']}")
        conversation.append_message("ASSISTANT", None)
        ids = tokenizer_image_token(conversation.get_prompt(), model.tokenizer, return_tensors="pt")[None]
        pixels = model.image_processor.preprocess(document["image"], return_tensors="pt")["pixel_values"]
        limit = instance.args[1]["max_new_tokens"]
        tokens = model.model.generate(ids, images=pixels, do_sample=False, max_new_tokens=limit)
        expected = model.tokenizer.decode(tokens[0], skip_special_tokens=True).split("\n\n")[0].strip()
        assert model.generate_until([instance]) == [expected]


@pytest.mark.parametrize("ep", ["all", "replace"])
def test_the_other_exemplars(ep: str, tmp_path: Path, tiny_checkpoint: Path, drawn_root: Path) -> None:
    trained = make_trained(tmp_path, tiny_checkpoint, ep)
    model = open_model(trained.checkpoint, tsm=trained.tsm)
    task = load_tasks(model, drawn_root, "vitask_drawn_score")["vitask_drawn_score"]
    query = model._query(task.instances[0])
    (document,) = model._prompts([query], [model._prompt_ids(query)]).documents
    plain = model.tsm
    model.tsm = None
    (without,) = model._prompts([query], [model._prompt_ids(query)]).documents
    model.tsm = plain
    patches, image_tokens = model.tsm.record["patch_count"], model.model.get_vision_tower().num_patches
    if ep == "all":
        assert len(document.prefix) == len(without.prefix)
        assert len(document.continuations[0].tokens) == len(without.continuations[0].tokens) + patches
    else:
        assert len(document.prefix) == len(without.prefix) - image_tokens + patches
        assert len(document.continuations[0].tokens) == len(without.continuations[0].tokens)
    alone = [model.loglikelihood([instance])[0][0] for instance in task.instances[:8]]
    assert [loss for loss, _ in model.loglikelihood(task.instances[:8])] == pytest.approx(alone, rel=1e-5)


def test_documents_hold_the_words_of_training(drawn_data: Path, prompted: SimpleNamespace) -> None:
    trained_on = json.loads((drawn_data / "test.json").read_text())
    documents = prompted.tasks["vitask_drawn"].test_docs()
    incomplete = prompted.tasks["vitask_drawn_incomplete"]
    assert len(documents) == len(trained_on)
    for document, row in zip(documents, trained_on, strict=True):
        assert f"<image>\n{document['question']}" == row["conversations"][0]["value"]
        assert document["answer"] == row["conversations"][1]["value"]
        assert document["vitask"] == row["vitask"]
        with Image.open(drawn_data / "images" / row["image"]) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(document["image"]))
        assert incomplete.doc_to_text(document) == instruction(DRAWN.modality, None)
