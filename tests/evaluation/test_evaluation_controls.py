"""The controls and the fitted connector inside lmms-eval's own requests: the record says what an exemplar is."""

import copy
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluating import VARIANTS, load_tasks, open_model
from loguru import logger
from trained import make_tsm

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.cli import main
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.files import write_json
from vitask_plugin.method.connector import ExemplarConnector, LearnedPrefix
from vitask_plugin.tsm.model import TSM

WIDTH = 64  # of the tiny LLaVA
TASKS = {DRAWN.task: {"choices": list(DRAWN.choices), "multi_label": False}}


def write_record(directory: Path, ep: str, connector, tsm, fitted=None) -> None:
    from vitask_plugin.record import checkpoint, connector_file

    if connector is not None:
        with torch.no_grad():  # an exemplar that a random model cannot overlook
            for weight in connector.parameters():
                weight.mul_(20)
        connector_file.save_connector(connector, connector.state_dict(), directory)
    identity = None if tsm is None else {"hash": tsm.hash, "width": tsm.record["feature_width"]}
    flags = VITaskArguments(vitask=True, vitask_ep=ep, vitask_tsm="tsm")
    checkpoint.save_record(directory, flags, connector, identity, TASKS, "v1", fitted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_checkpoint):
    """A checkpoint of each kind, as training leaves it; the TSM, and one that is another and as wide."""
    root = tmp_path_factory.mktemp("controls")
    tsm, other = make_tsm(root / "tsm"), make_tsm(root / "other", seed=1)
    wider = make_tsm(root / "wider", name="test_resnet.r160_in1k")
    assert tsm.record["feature_width"] == other.record["feature_width"] != wider.record["feature_width"]
    found = SimpleNamespace(root=root, tsm=tsm, other=other, wider=wider)
    torch.manual_seed(1)
    connectors = {
        "cls": ExemplarConnector("linear", tsm.record["feature_width"], WIDTH),
        "learned": LearnedPrefix(WIDTH),
        "text": None,
    }
    for ep, connector in connectors.items():
        directory = shutil.copytree(tiny_checkpoint, root / f"llava-{ep}")
        write_record(directory, ep, connector, None if ep == "learned" else tsm)
        setattr(found, ep, directory)
    return found


def opened(checkpoint: Path, root: Path, **model_args):
    """The model, its tasks, and what it logged while it was opened."""
    lines: list[str] = []
    handler = logger.add(lines.append, format="{message}")
    try:
        model = open_model(checkpoint, **model_args)
    finally:
        logger.remove(handler)
    return SimpleNamespace(model=model, tasks=load_tasks(model, root, *VARIANTS), log="".join(lines))


def losses(loaded, count: int = 8) -> list[float]:
    return [loss for loss, _ in loaded.model.loglikelihood(loaded.tasks["vitask_drawn_score"].instances[:count])]


def last_prompt(loaded, number: int):
    """[n, D] embeddings between image and question for one request: what stands there as the exemplar."""
    task = loaded.tasks["vitask_drawn"]
    query = loaded.model._query(task.instances[number])
    ids = loaded.model.asker.prompt_ids(query)
    prompts = loaded.model._prompts([query], [ids])
    (document,) = prompts.documents
    after_image = len(ids) - 1 - max(place for place, token in enumerate(ids) if token < 0)
    tokens = document.continuations[0].tokens
    return prompts.pool[tokens[: len(tokens) - after_image]]


@pytest.mark.parametrize("kind", ["cls", "learned", "text"])
def test_the_record_says_what_stands_after_the_image(kind, trained, drawn_root):
    words = {"ep": True} if kind == "learned" else {"tsm": trained.root / "tsm"}
    prompted = opened(getattr(trained, kind), drawn_root, **words)
    plain = opened(getattr(trained, kind), drawn_root)
    task, model = prompted.tasks["vitask_drawn"], prompted.model
    seen = set()
    for number in range(4):
        assert len(last_prompt(plain, number)) == 0
        image = task.test_docs()[number]["image"]
        said = trained.tsm(trained.tsm.preprocess(image)[None])
        if kind == "cls":
            expected = model.model.vitask_connector(said.pooled)
        elif kind == "learned":
            expected = model.model.vitask_connector.token[None]
        else:
            answer = f"{DRAWN.choices[int(said.logits[0].argmax())]}."
            ids = model.tokenizer(answer, add_special_tokens=False).input_ids
            expected = model.model.get_model().embed_tokens(torch.tensor(ids))
        found = last_prompt(prompted, number)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        seen.add(tuple(found.flatten().tolist()))
    assert len(seen) == 1 if kind == "learned" else len(seen) > 1
    assert losses(prompted) != pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.parametrize("kind", ["learned", "text"])
def test_answers_do_not_depend_on_the_batch_size(kind, trained, drawn_root, monkeypatch):
    words = {"ep": True} if kind == "learned" else {"tsm": trained.root / "tsm"}
    loaded = opened(getattr(trained, kind), drawn_root, **words, contrast=0.5)
    instances, scored = loaded.tasks["vitask_drawn"].instances[:6], losses(loaded)
    answers = loaded.model.generate_until(instances)
    assert len(set(answers)) > 1
    for batch_size in (1, 5):
        monkeypatch.setattr(loaded.model, "batch_size", batch_size)
        assert loaded.model.generate_until(instances) == answers
        assert losses(loaded) == pytest.approx(scored, rel=1e-5)


def test_text_of_a_tsm_for_data_of_another_name(trained, drawn_root, monkeypatch):
    """An external set: the only task that the TSM has answers for it; with several tasks it is refused."""
    loaded = opened(trained.text, drawn_root, tsm=trained.root / "tsm")
    expected = losses(loaded)
    tasks = loaded.model.tsm.record["tasks"]
    monkeypatch.setitem(loaded.model.tsm.record, "tasks", {"elsewhere": tasks[DRAWN.task]})
    assert losses(loaded) == expected
    monkeypatch.setitem(loaded.model.tsm.record, "tasks", {"a": tasks[DRAWN.task], "b": tasks[DRAWN.task]})
    with pytest.raises(SystemExit, match="the TSM knows the tasks a, b"):
        losses(loaded)


# Which documents get an exemplar ------------------------------------------------------------------------------------

CHOICES = list(DRAWN.choices)
OTHERS = ["oak", "ash", "elm", "fir"]


@pytest.mark.parametrize(
    ("tasks", "block", "covered"),
    [
        ({"a": CHOICES, "b": OTHERS}, {"task": "a", "choices": CHOICES}, True),
        ({"a": CHOICES, "b": OTHERS}, {"task": "external", "choices": OTHERS}, True),
        ({"a": CHOICES}, {"task": "external", "choices": CHOICES[::-1]}, True),
        ({"a": CHOICES}, {"task": "external", "choices": [name.title() for name in CHOICES]}, True),
        ({"a": ["grade 1", "t-cell"]}, {"task": "external", "choices": ["T\u2011cell", "Grade 01"]}, True),
        ({"a": CHOICES}, {"task": "external", "choices": OTHERS}, False),
        ({"a": CHOICES}, {"task": "external", "choices": CHOICES[:-1]}, False),
        ({"a": CHOICES}, {"task": "external", "choices": [*CHOICES, "oak"]}, False),
        ({"a": CHOICES}, None, False),
        ({"a": CHOICES}, "a column of someone else's", False),
        ({}, None, True),
    ],
)
def test_an_exemplar_is_for_the_tasks_of_training_and_for_their_labels(tasks, block, covered):
    from vitask_plugin.evaluation.exemplars import Prompting

    assert Prompting(tasks).covers(block) is covered
    assert Prompting(tasks, everywhere=True).covers(block)
    line = Prompting(tasks).summary("x", [block, block])
    assert line.startswith(f"exemplars: {2 * covered} of 2 documents of 'x'")
    assert ("the checkpoint was trained on" in line) is not covered and ("does not tell" in line) is (not tasks)


@pytest.mark.parametrize("kind", ["cls", "learned", "text"])
def test_other_tasks_are_answered_as_without_exemplars(kind, trained, drawn_root, tmp_path):
    """In words and by label likelihoods, whatever the exemplar is; a set with the same labels gets it all the same."""
    checkpoint = shutil.copytree(getattr(trained, kind), tmp_path / f"llava-{kind}")
    words = {"ep": True} if kind == "learned" else {"tsm": trained.root / "tsm"}
    record = json.loads((checkpoint / "vitask.json").read_text())
    found = {}
    for name, tasks in {"other": {"trees": OTHERS}, "external": {"elsewhere": CHOICES[::-1]}}.items():
        write_json(checkpoint / "vitask.json", record | {"tasks": tasks})
        for ep in (words, words | {"ep": False}, words | {"ep": "all"}):
            loaded = opened(checkpoint, drawn_root, **ep)
            answers = loaded.model.generate_until(loaded.tasks["vitask_drawn_incomplete"].instances[:4])
            found.setdefault(name, []).append((answers, losses(loaded)))
    own, plain, everywhere = found["other"]
    assert own == plain and plain[1] != pytest.approx(everywhere[1], rel=1e-4)
    own, plain, everywhere = found["external"]
    assert own == everywhere and plain[1] != pytest.approx(own[1], rel=1e-4)


def test_a_checkpoint_that_does_not_tell_its_tasks(trained, drawn_root, tmp_path):
    """As one of an early version: every document with one image, and the log says why."""
    checkpoint = shutil.copytree(trained.cls, tmp_path / "llava-old")
    record = json.loads((checkpoint / "vitask.json").read_text())
    del record["tasks"]
    write_json(checkpoint / "vitask.json", record)
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    old, own = (opened(folder, drawn_root, tsm=trained.root / "tsm") for folder in (checkpoint, trained.cls))
    assert losses(old) == losses(own)
    logger.remove(sink)
    assert sum("does not tell which tasks it was trained on" in line for line in lines) == 1


def test_contrast_changes_answers_and_likelihoods_and_0_is_off(trained, drawn_root):
    words = {"tsm": trained.root / "tsm"}
    off, zero, on = (
        opened(trained.cls, drawn_root, **words, **extra) for extra in ({}, {"contrast": 0}, {"contrast": 2.0})
    )
    assert losses(zero) == losses(off)
    assert losses(on) != pytest.approx(losses(off), rel=1e-3)
    answers = [loaded.model.generate_until(loaded.tasks["vitask_drawn"].instances[:6]) for loaded in (off, zero, on)]
    assert answers[0] == answers[1] != answers[2]


def test_contrast_is_for_greedy_answers(trained, drawn_root):
    loaded = opened(trained.cls, drawn_root, contrast=1)
    instance = loaded.tasks["vitask_drawn"].instances[0]
    for settings in ({"num_beams": 2}, {"do_sample": True, "temperature": 0.7}):
        asked = (instance.args[0], settings, *instance.args[2:])
        changed = SimpleNamespace(args=asked, request_type=instance.request_type)
        with pytest.raises(SystemExit, match="goes with greedy answers only"):
            loaded.model.generate_until([changed])


# Plug-and-play ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(trained):
    """A folder as `vitask connector fit` writes it, for the wider TSM."""
    from vitask_plugin.record import checkpoint

    directory = trained.root / "fitted"
    directory.mkdir()
    about = {
        "checkpoint": str(trained.cls),
        "identity": checkpoint.identity(trained.cls),
        "tsm": trained.tsm.hash,
    }
    connector = ExemplarConnector("mlp2x_gelu", trained.wider.record["feature_width"], WIDTH)
    write_record(directory, "cls", connector, trained.wider, about)
    return directory


@pytest.fixture(scope="module")
def aligned(trained, drawn_data):
    """What `vitask connector align` writes, for the wider TSM."""
    words = ["connector", "align", "--checkpoint", trained.cls, "--device", "cpu", "--out", trained.root / "aligned"]
    words += ["--from-tsm", trained.root / "tsm", "--tsm", trained.root / "wider"]
    words += ["--data", drawn_data / "train.json", "--image-folder", drawn_data / "images"]
    assert main([str(word) for word in words]) == 0
    return trained.root / "aligned"


def test_the_log_says_swapped_or_refitted(trained, fitted, drawn_root):
    own = opened(trained.cls, drawn_root, tsm=trained.root / "tsm")
    swapped = opened(trained.cls, drawn_root, tsm=trained.root / "other", swap="force")
    refitted = opened(trained.cls, drawn_root, tsm=trained.root / "wider", connector=fitted)
    assert "plug-and-play" not in own.log
    assert f"TSM {trained.other.hash[:12]} in" in swapped.log and trained.tsm.hash[:12] in swapped.log
    assert "swap=force" in swapped.log
    assert f"TSM {trained.wider.hash[:12]} through a connector refitted" in refitted.log
    assert trained.tsm.hash[:12] in refitted.log
    assert refitted.model.model.vitask_connector.in_features == trained.wider.record["feature_width"]
    assert len({tuple(losses(loaded)) for loaded in (own, swapped, refitted)}) == 3


def test_an_aligned_connector_stands_in_for_the_old_tsm(trained, aligned, drawn_root, drawn_data):
    """What stands after the image is as the old TSM's, up to what 24 images tell: nearer than the mean exemplar."""
    own = opened(trained.cls, drawn_root, tsm=trained.root / "tsm")
    found = opened(trained.cls, drawn_root, tsm=trained.root / "wider", connector=aligned)
    assert f"TSM {trained.wider.hash[:12]} through a connector aligned to it" in found.log
    assert trained.tsm.hash[:12] in found.log and "swap=force" not in found.log
    pairs = [(last_prompt(own, number), last_prompt(found, number)) for number in range(16)]
    old, new = (torch.cat(side) for side in zip(*pairs, strict=True))
    (step,) = found.model.record["fitted"]["aligned"]
    assert step["images"] == 24
    missed = (new - old).square().sum() / (old - old.mean(0)).square().sum()
    assert missed < 1 and step["r2"] > 0
    forced = opened(trained.cls, drawn_root, tsm=trained.root / "other", swap="force")
    wrong = torch.cat([last_prompt(forced, number) for number in range(16)])
    assert (new - old).square().sum() < 0.5 * (wrong - old).square().sum()


def test_a_tsm_trained_from_the_old_one_is_taken_with_a_warning(trained, drawn_root, tmp_path):
    own = trained.tsm
    for lineage in ([own.hash], ["1" * 64, own.hash]):
        directory = tmp_path / str(len(lineage))
        TSM(copy.deepcopy(trained.other.backbone.network), {**own.record, "init": lineage}).save(directory)
        found = opened(trained.cls, drawn_root, tsm=directory)
        assert "vitask tsm train --init" in found.log and "an aligned connector" in found.log
    TSM(copy.deepcopy(trained.other.backbone.network), {**own.record, "init": ["1" * 64]}).save(tmp_path / "stranger")
    with pytest.raises(SystemExit, match="swap=force"):
        opened(trained.cls, drawn_root, tsm=tmp_path / "stranger")


def test_words_of_any_tsm_will_do(trained, drawn_root):
    for name, tsm in (("other", trained.other), ("wider", trained.wider)):
        found = opened(trained.text, drawn_root, tsm=trained.root / name)
        assert f"words of TSM {tsm.hash[:12]} in place of TSM {trained.tsm.hash[:12]}" in found.log


# Bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_sentence(trained, fitted, tmp_path):
    broken = shutil.copytree(fitted, tmp_path / "broken")
    record = json.loads((broken / "vitask.json").read_text())
    write_json(broken / "vitask.json", record | {"fitted": record["fitted"] | {"identity": "0" * 64}})
    tsm = trained.root / "tsm"
    cases = {
        "trained with a learned prefix, which no TSM has a part in": (trained.learned, {"tsm": tsm}),
        "ep=True needs the task-specific model": (trained.text, {"ep": True}),
        "where the connector takes": (trained.cls, {"tsm": trained.root / "wider"}),
        "features of another TSM mean nothing to it": (trained.cls, {"tsm": trained.root / "other"}),
        f"vitask connector align --checkpoint {trained.cls} --connector {fitted} --from-tsm tsm --tsm {tsm} ": (
            trained.cls,
            {"tsm": tsm, "connector": fitted},
        ),
        "holds no connector that `vitask connector align` or `fit`": (
            trained.cls,
            {"tsm": tsm, "connector": trained.text},
        ),
        "belongs to checkpoint": (trained.cls, {"tsm": trained.root / "wider", "connector": broken}),
        "contrast=-1.0 is no weight": (trained.cls, {"contrast": -1}),
        "contrast='much' is no weight": (trained.cls, {"contrast": "much"}),
        "contrast=True is no weight": (trained.cls, {"contrast": True}),
    }
    for sentence, (checkpoint, words) in cases.items():
        with pytest.raises(SystemExit) as stopped:
            open_model(checkpoint, **words)
        assert sentence in str(stopped.value) and "\n" not in str(stopped.value), sentence
