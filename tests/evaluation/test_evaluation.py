"""The model and the tasks inside the real lmms-eval: its command, its task manager, its requests."""

import copy
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from evaluating import VARIANTS, load_tasks, open_model
from medmnist.evaluator import getAUC
from pictures import png16, write_every_mode
from PIL import Image
from trained import Trained, make_trained, make_tsm

from vitask_plugin.cli import main
from vitask_plugin.data.drawn import draw_dataset
from vitask_plugin.data.images import decode
from vitask_plugin.data.instructions import DRAWN, instruction, sample
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import metrics
from vitask_plugin.evaluation.model_args import as_device
from vitask_plugin.evaluation.pictures import read_document
from vitask_plugin.files import sha256_file
from vitask_plugin.report import TaskResult, read_results
from vitask_plugin.tsm.features import extract

TASKS = Path(__file__).parents[2] / "eval_tasks"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Trained:
    return make_trained(tmp_path_factory.mktemp("trained"), tiny_checkpoint, "cls")


# The command ---------------------------------------------------------------------------------------------------


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


# The model inside this process ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prompted(trained: Trained, drawn_root: Path) -> SimpleNamespace:
    model = open_model(trained.checkpoint, tsm=trained.tsm)
    return SimpleNamespace(model=model, tasks=load_tasks(model, drawn_root, *VARIANTS))


@pytest.fixture(scope="module")
def everywhere(trained: Trained, prompted: SimpleNamespace) -> SimpleNamespace:
    """With exemplars for questions of any task."""
    return SimpleNamespace(model=open_model(trained.checkpoint, tsm=trained.tsm, ep="all"), tasks=prompted.tasks)


@pytest.fixture(scope="module")
def unprompted(trained: Trained, drawn_root: Path) -> SimpleNamespace:
    model = open_model(trained.checkpoint, tsm=trained.tsm, ep=False)
    return SimpleNamespace(model=model, tasks=load_tasks(model, drawn_root, *VARIANTS))


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


def ask(model: Any, questions: Sequence[tuple[list[Image.Image], str]], **settings: Any) -> list[str]:
    """Answers to (images, question) of a task of one's own, through the harness' requests."""
    from lmms_eval.api.instance import Instance

    model.task_dict["own"] = {"test": _Rows(SimpleNamespace(images=images) for images, _ in questions)}
    return model.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=(question, dict(settings), lambda row: row.images, number, "own", "test"),
                idx=0,
                metadata={"task": "own", "doc_id": number, "repeats": 1},
            )
            for number, (_, question) in enumerate(questions)
        ]
    )


class _Rows(list):
    """Documents of a task without a `vitask` block."""

    column_names = ()


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


def test_both_models_see_what_they_were_trained_on(
    trained: Trained, everywhere: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = []
    for name in write_every_mode(tmp_path):
        words = {"modality": DRAWN.modality, "task": DRAWN.task, "choices": list(DRAWN.choices), "label": 0}
        rows.append(sample(identifier=name, image=name, **words))
    (tmp_path / "data.json").write_text(json.dumps(rows))
    store = extract(trained.tsm, [tmp_path / "data.json"], tmp_path, tmp_path / "features")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    embed = everywhere.model.model.vitask_prompts

    def spy(ids: Any, mask: Any, pixels: torch.Tensor, **kwargs: Any) -> Any:
        seen.extend(zip(pixels, kwargs["tsm_features"], strict=True))
        return embed(ids, mask, pixels, **kwargs)

    monkeypatch.setattr(everywhere.model.model, "vitask_prompts", spy)
    for row in rows:
        ask(everywhere.model, [([Image.open(tmp_path / row["image"])], "Analyze.")], max_new_tokens=2)
    for row, (pixels, features) in zip(rows, seen, strict=True):
        path = tmp_path / row["image"]
        assert torch.allclose(features, store.get(row["image"], sha256_file(path)), atol=1e-5), path
        one = decode(path.read_bytes(), path)
        expected = everywhere.model.image_processor.preprocess(one, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(pixels, expected), path


def test_deep_pixels_of_any_task_are_refused(prompted: SimpleNamespace) -> None:
    deep = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64))
    with pytest.raises(SystemExit) as stopped:
        ask(prompted.model, [([deep], "Analyze.")], max_new_tokens=2)
    assert "task 'own', document 0, image: image 'in memory' holds uint16 values (0 to 4095" in stopped.value.code


@pytest.mark.parametrize("kind", ["grey", "colour"])
@pytest.mark.parametrize("stored", ["bytes", "path"])
def test_deep_pixels_that_a_task_has_converted_are_refused(kind: str, stored: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, 3), dtype=np.uint16)
    path = tmp_path / "deep.png"
    if kind == "grey":
        Image.fromarray(values[..., 0]).save(path)
    else:
        path.write_bytes(png16(values))
    plain = tmp_path / "plain.png"
    Image.new("RGB", (8, 8), "red").save(plain)
    named = [str(one) for one in (plain, path)]
    rows = named if stored == "path" else [{"bytes": Path(one).read_bytes(), "path": None} for one in named]
    data = datasets.Dataset.from_dict({"image": rows}).cast_column("image", datasets.Image())

    def see(document: dict[str, Any]) -> list[Image.Image]:
        return [document["image"].convert("RGB")]

    assert read_document(data, 0, see, "own")[1][0].getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(VITaskError, match=r"task 'own', document 1: image .* holds uint16 values"):
        read_document(data, 1, see, "own")


def two_columns(deep: str = "depth") -> datasets.Dataset:
    values = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    files = {}
    for name in ("image", "depth"):
        file = io.BytesIO()
        Image.fromarray(values if name == deep else values.astype(np.uint8)).save(file, "PNG")
        files[name] = [{"bytes": file.getvalue(), "path": None}]
    data = datasets.Dataset.from_dict(files)
    return data.cast_column("image", datasets.Image()).cast_column("depth", datasets.Image())


def test_deep_pixels_that_nobody_looks_at_are_not_refused() -> None:
    looks = [lambda row: [row["image"].convert("RGB")], lambda row: [row.get("image")], lambda row: []]
    for see in looks:
        document, pictures = read_document(two_columns(), 0, see, "own")
        assert len(pictures) == len(see(document)) and document["depth"].mode == "I;16"


@pytest.mark.parametrize(
    "see",
    [
        lambda row: [row["depth"].convert("RGB")],
        lambda row: [row.get("depth").convert("RGB")],
        lambda row: [dict(row)["image"]],
        lambda row: [{**row}["image"]],
        lambda row: [row.copy()["image"]],
        lambda row: [picture.convert("RGB") for picture in row.values()],
        lambda row: [picture.convert("RGB") for _, picture in row.items()],
        lambda row: [row[name].convert("RGB") for name in row],
    ],
)
def test_deep_pixels_that_a_task_may_have_looked_at_are_refused(see: Any) -> None:
    with pytest.raises(VITaskError, match=r"task 'own', document 0: image .* holds uint16 values"):
        read_document(two_columns(), 0, see, "own")


def test_the_images_of_a_data_set_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = two_columns(), []
    cast = datasets.Dataset.cast_column
    monkeypatch.setattr(datasets.Dataset, "cast_column", lambda *args: calls.append(args[1]) or cast(*args))
    for _ in range(3):
        read_document(data, 0, lambda row: [row["image"]], "own")
    assert calls == ["image", "depth"]


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


# Bad input, and what is no bad input ---------------------------------------------------------------------------


def test_another_label_set_is_refused_before_any_answer(
    trained: Trained, drawn_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = shutil.copytree(trained.checkpoint, tmp_path / "llava-other")
    record = json.loads((other / "vitask.json").read_text())
    record["tasks"][DRAWN.task] = ["oak", "ash"]
    (other / "vitask.json").write_text(json.dumps(record))
    model = open_model(other)
    tasks = load_tasks(model, drawn_root, "vitask_drawn", "vitask_drawn_score")
    monkeypatch.setattr(model, "_prompts", lambda *_: pytest.fail("the model was asked"))
    for ask_for in (
        lambda: model.generate_until(tasks["vitask_drawn"].instances),
        lambda: model.loglikelihood(tasks["vitask_drawn_score"].instances),
    ):
        with pytest.raises(SystemExit) as stopped:
            ask_for()
        assert "['oak', 'ash']" in stopped.value.code
        assert repr(list(DRAWN.choices)) in stopped.value.code


@pytest.fixture
def breast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for BreastMNIST's file of 28 pixels, in the folder that is returned."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = generator.integers(0, 256, (4, 28, 28), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.array([[0], [1], [0], [1]], dtype=np.uint8)
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    monkeypatch.setenv("MEDMNIST_ALLOW_MODIFIED", "1")
    return tmp_path


def recorded_sizes(width: list[int], height: list[int]) -> dict[str, Any]:
    return {"images": {"medmnist_breast": {"width": width, "height": height, "images": 4}}}


@pytest.mark.parametrize("side", ["checkpoint", "TSM"])
def test_images_of_another_size_than_in_training_are_refused(
    side: str, prompted: SimpleNamespace, breast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MEDMNIST_SIZE forgotten: 28-pixel images on a model of 224-pixel ones."""
    model = prompted.model
    tasks = load_tasks(model, breast, "medmnist_breast")
    of_224, of_28 = recorded_sizes([224, 224], [224, 224]), recorded_sizes([28, 28], [28, 28])
    monkeypatch.setattr(model, "record", model.record | (of_224 if side == "checkpoint" else of_28))
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | (of_224 if side == "TSM" else of_28))
    monkeypatch.setattr(model, "_announced", {})
    requests = tasks["medmnist_breast"].instances
    with pytest.raises(SystemExit) as stopped:
        model.generate_until(requests)
    assert f"error: {side} " in stopped.value.code
    assert "was trained on 224x224 images of task 'medmnist_breast'" in stopped.value.code
    assert "those of task 'medmnist_breast' are 28x28; set MEDMNIST_SIZE=224, or add image_size=any" in (
        stopped.value.code
    )
    monkeypatch.setattr(model, "any_size", True)
    assert len(model.generate_until(requests)) == 4


def test_images_of_training_of_several_sizes_or_none_known_are_not_compared(
    prompted: SimpleNamespace, breast: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = prompted.model
    tasks = load_tasks(model, breast, "medmnist_breast")
    for record in ({}, recorded_sizes([28, 28], [28, 28]), recorded_sizes([200, 224], [224, 224])):
        monkeypatch.setattr(model, "record", {k: v for k, v in model.record.items() if k != "images"} | record)
        monkeypatch.setattr(model, "_announced", {})
        assert len(model.generate_until(tasks["medmnist_breast"].instances[:1])) == 1


@pytest.fixture
def deep_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Writes deep images as an external set that is only judged, with the labels of training and a name of its own."""
    for number, name in enumerate(DRAWN.choices):
        path = tmp_path / "source" / name / "image.png"
        path.parent.mkdir(parents=True)
        values = np.random.default_rng(number).integers(0, 4096, (28, 28))
        Image.fromarray(values.astype(np.uint16)).save(path)

    def write(*flags: str) -> None:
        words = ["--modality", DRAWN.modality, "--labels", ",".join(DRAWN.choices), "--val", "0", "--test", "1"]
        output = tmp_path / "external"
        assert main(["data", "folder", str(tmp_path / "source"), "--out", str(output), *words, *flags]) == 0
        monkeypatch.setenv("VITASK_FOLDER", str(output))

    return write


@pytest.mark.parametrize("side", ["checkpoint", "TSM"])
def test_images_through_another_window_than_in_training_are_refused(
    side: str, prompted: SimpleNamespace, drawn_root: Path, deep_folder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else tells: size and depth are the same."""
    model = prompted.model
    of_4095 = {"width": [28, 28], "height": [28, 28], "images": 4, "pixels": {"window": [0, 4095]}}
    record = {"images": {DRAWN.task: of_4095}}
    monkeypatch.setattr(model, "record", model.record | (record if side == "checkpoint" else {}))
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | (record if side == "TSM" else {}))

    def answers() -> list[str]:
        monkeypatch.setattr(model, "_announced", {})
        return model.generate_until(load_tasks(model, drawn_root, "vitask_folder")["vitask_folder"].instances)

    deep_folder("--window", "0", "4095")
    assert len(answers()) == 4
    deep_folder("--window", "0", "65535")
    with pytest.raises(SystemExit) as stopped:
        answers()
    assert f"error: {side} " in stopped.value.code
    assert "was trained on images through the window 0 to 4095 of task 'vitask_drawn'" in stopped.value.code
    assert "those of task 'vitask_folder' are through the window 0 to 65535; write them with" in stopped.value.code
    assert "--window 0 4095`, or add image_size=any to --model_args" in stopped.value.code
    monkeypatch.setattr(model, "any_size", True)
    assert len(answers()) == 4


def test_a_tsm_of_another_window_than_the_checkpoints_is_refused(
    prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On documents that no record tells anything of."""
    model = prompted.model
    of_4095, of_8_bits = (
        {"images": {DRAWN.task: {"width": [28, 28], "height": [28, 28], "images": 4, "pixels": pixels}}}
        for pixels in ({"window": [0, 4095]}, {})
    )
    monkeypatch.setattr(model, "record", model.record | of_4095)
    monkeypatch.setattr(model.tsm, "record", model.tsm.record | of_8_bits)
    monkeypatch.setattr(model, "_announced", {})
    with pytest.raises(SystemExit, match=r"error: TSM .* through no window .*, and checkpoint .* 0 to 4095; train"):
        model.generate_until(prompted.tasks["vitask_drawn"].instances[:1])


def test_a_broken_image_names_its_document_and_file(prompted: SimpleNamespace, tmp_path: Path) -> None:
    """Of any task: the harness lets PIL fill up what is missing, and a model would answer about grey."""
    import datasets
    from lmms_eval.api.instance import Instance

    whole, cut = (Image.effect_noise((64, 64), 90) for _ in range(2))
    whole.save(tmp_path / "whole.png")
    cut.save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    paths = [str(tmp_path / name) for name in ("whole.png", "cut.png")]
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image())
    prompted.model.task_dict["other"] = {"test": rows}
    words = ("Analyze.", {"max_new_tokens": 2}, lambda row: [row["image"].convert("RGB")])
    metadata = {"task": "other", "doc_id": 0, "repeats": 1}
    requests = [
        Instance(request_type="generate_until", arguments=(*words, n, "other", "test"), idx=0, metadata=metadata)
        for n in range(2)
    ]
    with pytest.raises(SystemExit) as stopped:
        prompted.model.generate_until(requests)
    assert stopped.value.code.startswith(f"vitask: error: task 'other', document 1: its image {paths[1]!r} cannot be")
    assert "truncated" in stopped.value.code and "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("model_args", "sentence"),
    [
        ({"image_size": 224}, "image_size=224 is unknown; leave it out, or give image_size=any"),
        ({"ep": True}, "ep=True needs the task-specific model"),
        ({"ep": "maybe"}, "neither True nor False nor all"),
        ({"ep": "all"}, "ep=True needs the task-specific model"),
        ({"dtype": "int4"}, "dtype='int4' is unknown"),
        ({"conv_template": "v9"}, "conv_template='v9' is unknown"),
        ({"tms": "x"}, "'tms' unknown"),
        ({"swap": "maybe"}, "swap='maybe' is unknown; leave it out, or give swap=force"),
        ({"trust_tsm_code": "perhaps"}, "trust_tsm_code='perhaps' is neither True nor False"),
        ({"connector": "."}, "connector='.' is of use with its tsm=DIR only"),
        ({"connector": ".", "tsm": ".", "ep": False}, "add tsm=DIR to --model_args and leave ep=False out"),
        ({"tsm": "nowhere"}, "tsm= in --model_args 'nowhere' does not exist; give a folder"),
        ({"tsm": 5}, "tsm=5 in --model_args is taken for a int, not for a folder; write tsm=./5"),
        ({"tsm": "1e3"}, "tsm=1000.0 in --model_args is taken for a float"),
        ({"connector": 5, "tsm": "."}, "connector=5 in --model_args"),
        ({"model_base": 5}, "model_base=5 in --model_args"),
        ({"checkpoint": True}, "pretrained=True in --model_args is taken for a bool"),
        ({"max_new_tokens": "x"}, "max_new_tokens='x' is not a positive whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 is"),
        ({"max_new_tokens": 1.5}, "max_new_tokens=1.5 is"),
        ({"max_new_tokens": True}, "max_new_tokens=True is"),
        ({"contrast": "nan"}, "contrast=nan is no weight"),
        ({"pretrained": "nowhere"}, "pretrained='nowhere' in --model_args is no local folder"),
        ({"model_base": "owner/name"}, "model_base='owner/name' in --model_args is no local folder"),
    ],
)
def test_bad_model_arguments_are_one_sentence(trained: Trained, model_args: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        open_model(**{"checkpoint": trained.checkpoint, **model_args})
    assert stopped.value.code.startswith("vitask: error: ")
    assert sentence in stopped.value.code
    assert "\n" not in stopped.value.code


def test_exemplars_need_a_connector(trained: Trained, tiny_checkpoint: Path) -> None:
    with pytest.raises(SystemExit, match="cannot be prompted with exemplars"):
        open_model(tiny_checkpoint, tsm=trained.tsm)


@pytest.mark.parametrize("name", ["meta", "gpu", 5])
def test_a_device_that_is_none_is_one_sentence(name: Any) -> None:
    with pytest.raises(VITaskError, match=f"device='{name}' is unknown; give cpu, cuda or cuda:N"):
        as_device(name, 0)


def test_another_tsm_is_refused_with_the_command_that_aligns_it(trained: Trained, tmp_path: Path) -> None:
    """Of another width or of the same: to the connector both are noise."""
    own = json.loads((trained.tsm / "tsm.json").read_text())["sha256"][:12]
    for name in ("test_resnet", "test_vit"):
        tsm = make_tsm(tmp_path / name, seed=5, name=name)
        with pytest.raises(SystemExit) as stopped:
            open_model(trained.checkpoint, tsm=tmp_path / name)
        said = str(stopped.value)
        assert tsm.hash[:12] in said and own in said and "\n" not in said
        assert (
            f"vitask connector align --checkpoint {trained.checkpoint} --from-tsm tsm --tsm {tmp_path / name}" in said
        )
        assert ("swap=force" in said) == (name == "test_vit"), "another width cannot be forced"
    with pytest.raises(SystemExit, match="connector takes"):
        open_model(trained.checkpoint, tsm=tmp_path / "test_resnet", swap="force")


def test_a_forced_swap_is_another_model_and_logged(
    trained: Trained, prompted: SimpleNamespace, drawn_root: Path, tmp_path: Path
) -> None:
    from loguru import logger

    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING")
    make_tsm(tmp_path, seed=5)
    model = open_model(trained.checkpoint, tsm=tmp_path, swap="force")
    logger.remove(sink)
    assert any("plug-and-play" in line and "expect wrong answers" in line for line in lines)
    instances = prompted.tasks["vitask_drawn_score"].instances[:4]
    model.task_dict = prompted.model.task_dict
    assert model.loglikelihood(instances) != prompted.model.loglikelihood(instances)


@pytest.mark.parametrize(
    ("version", "given", "used", "warned"),
    [
        (None, None, "vicuna_v1", False),
        (None, "mpt", "mpt", False),
        ("v1", None, "v1", False),
        ("mpt", None, "mpt", False),
        ("v0", None, "vicuna_v1", False),  # upstream's default --version trains on the default template
        ("v1", "vicuna_v1", "v1", False),
        ("v1", "mpt", "mpt", True),
        ("mpt", "v1", "v1", True),
    ],
)
def test_the_template_is_that_of_training(
    version: str | None, given: str | None, used: str, warned: bool, trained: Trained, tmp_path: Path
) -> None:
    from llava.conversation import conv_templates
    from loguru import logger

    checkpoint = tmp_path / "llava-version"
    shutil.copytree(trained.checkpoint, checkpoint, copy_function=os.link)
    record = json.loads((checkpoint / "vitask.json").read_text())
    record["version"] = version
    if version is None:
        del record["version"]
    (checkpoint / "vitask.json").unlink()
    (checkpoint / "vitask.json").write_text(json.dumps(record))
    lines: list[str] = []
    sink = logger.add(lines.append, level="WARNING", format="{message}")
    model = open_model(checkpoint, **({"conv_template": given} if given else {}))
    logger.remove(sink)
    assert model.template is conv_templates[used]
    warnings = [line for line in lines if "is not the template of training" in line]
    assert len(warnings) == warned
    assert all(repr(given) in line and repr(version) in line for line in warnings)


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


def test_a_batch_that_does_not_fit_is_one_sentence(prompted: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own error, in answering and in scoring."""
    for name in ("vitask_generate", "vitask_states"):
        monkeypatch.setattr(prompted.model.model, name, lambda *_, **__: torch.empty(2**50))
    sentence = "vitask: error: out of memory on cpu with 2 prompts in a batch; give a --batch_size below"
    with pytest.raises(SystemExit, match=sentence):
        prompted.model.generate_until(prompted.tasks["vitask_drawn"].instances[:2])
    with pytest.raises(SystemExit, match=sentence):
        prompted.model.loglikelihood(prompted.tasks["vitask_drawn_score"].instances[: 2 * len(DRAWN.choices)])


def test_the_response_cache_keeps_no_model(trained: Trained) -> None:
    model = weakref.ref(open_model(trained.checkpoint))
    gc.collect()
    assert model() is None


# Data ----------------------------------------------------------------------------------------------------------


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
