"""The model `vitask_hf` inside lmms-eval: every family against its own stock forward and `generate`."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import TASKS, load_tasks
from lmms_eval.api.instance import Instance
from loguru import logger
from PIL import Image
from trained import make_trained

from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.evaluation.lmms_hf import VITaskHF
from vitask_plugin.evaluation.lmms_llava import VITaskLlava
from vitask_plugin.hf.conversation import Encoded
from vitask_plugin.hf.reference import branch_logits
from vitask_plugin.hf.tiny import FAMILIES, make_tiny
from vitask_plugin.method.branches import IGNORE, Packed, Separate
from vitask_plugin.report import read_results
from vitask_plugin.training import selftest

LABELS = ("rising stripes.", "stripes.", "a word that is not in the vocabulary")
END = 0  # a special token that nothing ends with
NEW = 14  # tokens: more than the window of Gemma3's sliding layers
Asked = tuple[list[Image.Image], str]


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]


IMAGES = noise((28, 28), (56, 28), (28, 56))
LONG = "Analyze the given drawn texture image. " * 4
# Images of three sizes, two questions about one image.
QUESTIONS: list[Asked] = [
    ([IMAGES[0]], "What is it?"),
    ([IMAGES[1]], LONG),
    ([IMAGES[2]], "Which texture?"),
    ([IMAGES[0]], LONG),
]
OTHERS: list[Asked] = [([], "What is a texture?"), (IMAGES[:2], "Which of the two?")]


class Rows(list):
    """Documents of a task without a `vitask` block."""

    column_names = ()


def requests(model: Any, questions: Sequence[Asked], kind: str, *words: Any) -> list[Instance]:
    """Of a task of one's own: one for each question and each of `words`."""
    model.task_dict["own"] = {"test": Rows(SimpleNamespace(images=images) for images, _ in questions)}
    return [
        Instance(
            request_type=kind,
            arguments=(question, word, lambda row: row.images, number, "own", "test"),
            idx=index,
            metadata={"task": "own", "doc_id": number, "repeats": 1},
        )
        for number, (_, question) in enumerate(questions)
        for index, word in enumerate(words)
    ]


def answers(model: Any, questions: Sequence[Asked], **settings: Any) -> list[str]:
    return model.generate_until(requests(model, questions, "generate_until", {"max_new_tokens": NEW, **settings}))


def losses(model: Any, questions: Sequence[Asked], labels: Sequence[str] = LABELS) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests(model, questions, "loglikelihood", *labels))


@pytest.fixture(scope="module")
def untuned(tmp_path_factory: pytest.TempPathFactory, drawn_texts: list[str]) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("families"), {}

    def of(family: str) -> Path:
        if family not in made:
            made[family] = make_tiny(root / family, family=family, texts=drawn_texts, seed=0)
        return made[family]

    return of


@pytest.fixture(scope="module")
def opened(
    tmp_path_factory: pytest.TempPathFactory, untuned: Callable[[str], Path]
) -> Callable[[str, str | None], VITaskHF]:
    """A model of a family, without a checkpoint of VITask, or with exemplars of a kind."""
    made: dict[tuple[str, str | None], VITaskHF] = {}

    def of(family: str, ep: str | None = None) -> VITaskHF:
        if (family, ep) not in made:
            words: dict[str, Any] = {"pretrained": str(untuned(family))}
            if ep is not None:
                trained = make_trained(tmp_path_factory.mktemp("trained"), untuned(family), ep)
                words = {"pretrained": str(trained.checkpoint), "tsm": str(trained.tsm), "ep": "all"}
            made[family, ep] = with_own_head(VITaskHF(**words, batch_size=4, device="cpu"))
        return made[family, ep]

    return of


def with_own_head(model: VITaskHF) -> VITaskHF:
    """Random weights that are also the embeddings say each token again and again. No image token is said: the stock
    forward would look for its image."""
    head = model.model.lm_head
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(head.weight.shape, generator=generator) * 0.1
    weight[[token for token in model.tokenizer.added_tokens_decoder if token != END]] = 0
    head.weight = torch.nn.Parameter(weight)
    return model


@pytest.fixture
def endless() -> Iterator[Callable[[VITaskHF], VITaskHF]]:
    """Makes a model say as many tokens as it may: random weights end at once, or never."""
    changed = []

    def of(model: VITaskHF) -> VITaskHF:
        for settings in (model.model.generation_config, model._answering.generation_config):
            changed.append((settings, settings.eos_token_id))
            settings.eos_token_id = END
        return model

    yield of
    for settings, before in changed:
        settings.eos_token_id = before


# The slow, obvious way -----------------------------------------------------------------------------------------------


def exemplar_of(model: VITaskHF, images: Sequence[Image.Image]) -> torch.Tensor | None:
    if model.tsm is None or len(images) != 1:
        return None
    seen = model.tsm(model.tsm.preprocess(images[0])[None])
    return model.model.exemplars(model.tsm.tokens(seen, model.model.vitask_arguments.exemplar_tokens))[0]


def encoded(model: VITaskHF, images: Sequence[Image.Image], question: str, answer: str) -> Encoded:
    """As in training."""
    turns = [{"from": "human", "value": "<image>\n" * len(images) + question}, {"from": "gpt", "value": answer}]
    return model.prompter.template.encode(turns, images)


@torch.no_grad()
def plain(model: VITaskHF, images: Sequence[Image.Image], question: str, answer: str) -> tuple[float, bool]:
    """(loss, greedy) of an answer by the stock forward of the whole conversation."""
    found = encoded(model, images, question, answer)
    item = {"input_ids": found.ids, "labels": found.labels, "end": found.end, "inputs": found.inputs}
    how = {"image_id": model.prompter.template.image_id, "replaces": model.asker.kind == "replace"}
    logits = branch_logits(model.model, item, exemplar_of(model, images), **how)
    wanted = found.labels[found.labels != IGNORE]
    loss = torch.nn.functional.cross_entropy(logits.double(), wanted, reduction="sum")
    return float(loss), bool((logits.argmax(-1) == wanted).all())


def processed(model: VITaskHF, images: Sequence[Image.Image], question: str) -> dict[str, torch.Tensor]:
    """A question as the processor and the template put it, without any code of ours."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.strip()}]
    processor = model.prompter.template.processor
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    bos = processor.tokenizer.bos_token
    words = {"images": [list(images)]} if images else {}
    if bos and text.startswith(bos):
        words["add_special_tokens"] = False
    return dict(processor(text=[text], return_tensors="pt", **words))


@torch.no_grad()
def stock(model: VITaskHF, images: Sequence[Image.Image], question: str, **settings: Any) -> str:
    """The answer of the stock class's own `generate`."""
    inputs = processed(model, images, question)
    found = model.model.generate(**inputs, **{"max_new_tokens": NEW, "do_sample": False, **settings})
    return model.tokenizer.decode(found[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def greedily(model: VITaskHF, images: Sequence[Image.Image], question: str) -> str:
    """The answer by one stock forward a token, its exemplar put in by hand."""
    inputs = processed(model, images, question)
    ids = inputs.pop("input_ids")[0]
    inputs.pop("attention_mask")
    end, start = encoded(model, images, question, "A word.").end, len(ids)
    for _ in range(NEW):
        ids = torch.cat([ids, ids.new_zeros(1)])  # to be predicted
        labels = torch.full_like(ids, IGNORE)
        labels[-1] = 0
        own = {
            name: torch.nn.functional.pad(value, (0, len(ids) - value.shape[1])) if "type_ids" in name else value
            for name, value in inputs.items()
        }
        item = {"input_ids": ids, "labels": labels, "end": end, "inputs": own}
        how = {"image_id": model.prompter.template.image_id, "replaces": model.asker.kind == "replace"}
        ids[-1] = branch_logits(model.model, item, exemplar_of(model, images), **how)[0].argmax()
        if ids[-1] == END:
            break
    return model.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


# Every family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ep", [None, "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_one_stock_forward_per_label(
    family: str, ep: str | None, opened: Callable[..., VITaskHF], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, questions = opened(family, ep), QUESTIONS if ep else [*QUESTIONS, *OTHERS]
    found = losses(model, questions)
    expected = [plain(model, *asked, label) for asked in questions for label in LABELS]
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert all(layout is Packed for layout in model._layouts.values())
    monkeypatch.setattr(model, "batch_size", 1)
    assert [loss for loss, _ in losses(model, questions)] == pytest.approx([loss for loss, _ in found], rel=1e-5)
    if ep:
        without = losses(opened(family), questions)
        assert max(abs(one - other) for (one, _), (other, _) in zip(found, without, strict=True)) > 1e-2


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_exemplars_answers_are_those_of_stock_generate(
    family: str, beams: int, opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF]
) -> None:
    model, questions = endless(opened(family)), [*QUESTIONS, *OTHERS]
    found = answers(model, questions, num_beams=beams)
    assert found == [stock(model, *asked, num_beams=beams) for asked in questions]
    assert len(set(found)) > 2
    assert max(len(model.prompter.template.words(answer)) for answer in found) > 8


@pytest.mark.parametrize("family", FAMILIES)
def test_with_exemplars_answers_are_those_of_one_stock_forward_a_token(
    family: str, opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = endless(opened(family, "cls"))
    found = answers(model, QUESTIONS)
    assert found == [greedily(model, *asked) for asked in QUESTIONS]
    assert found != answers(endless(opened(family)), QUESTIONS)
    monkeypatch.setattr(model, "batch_size", 1)
    assert answers(model, QUESTIONS) == found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_and_its_answers_are_the_tokens_of_training(family: str, opened: Callable[..., VITaskHF]) -> None:
    model = opened(family)
    for images, text in [*QUESTIONS, *OTHERS]:
        question = model.prompter.ask(text, images)
        asked = [*question.prefix.tolist(), *question.text]
        assert asked == processed(model, images, text)["input_ids"][0].tolist()
        for label in LABELS:
            whole = encoded(model, images, text, label)
            learnt = (whole.labels != IGNORE).nonzero().flatten()
            ids = [*question.prefix.tolist(), *model.prompter.answered(question, label)]
            assert ids == whole.ids[: int(learnt[-1]) + 1].tolist()
            # What is scored starts where the ids part.
            assert [*ids[: int(learnt[0])]] == asked[: int(learnt[0])] and ids[learnt[0]] not in asked[learnt[0] :][:1]


@pytest.mark.parametrize("ep", ["all", "replace"])
def test_the_other_exemplars(ep: str, opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF]) -> None:
    model = endless(opened("internvl", ep))
    expected = [plain(model, *asked, label)[0] for asked in QUESTIONS for label in LABELS]
    assert [loss for loss, _ in losses(model, QUESTIONS)] == pytest.approx(expected, rel=1e-5)
    assert answers(model, QUESTIONS) == [greedily(model, *asked) for asked in QUESTIONS]


def test_sampling_and_penalties_are_those_of_stock_generate(
    opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Qwen's own settings, as it is published: a penalty looks at the prompt too."""
    model = endless(opened("qwen2_5_vl"))
    for settings in (model.model.generation_config, model._answering.generation_config):
        monkeypatch.setattr(settings, "repetition_penalty", 1.3)
    penalized = answers(model, QUESTIONS)
    assert penalized == [stock(model, *asked) for asked in QUESTIONS]
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 20}
    torch.manual_seed(3)
    found = answers(model, QUESTIONS[:1], **drawn)
    torch.manual_seed(3)
    assert found == [stock(model, *QUESTIONS[0], **drawn)]
    assert found != penalized[:1]


def test_settings_of_published_models_do_not_change_greedy_answers(
    opened: Callable[..., VITaskHF], untuned: Callable[[str], Path], tmp_path: Path
) -> None:
    """Some come with a kind of cache, and with sampling."""
    changed = shutil.copytree(untuned("gemma3"), tmp_path / "gemma3")
    path = changed / "generation_config.json"
    own = {"cache_implementation": "static", "do_sample": True, "top_k": 64, "top_p": 0.95, "temperature": 0.5}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    model = with_own_head(VITaskHF(str(changed), batch_size=4, device="cpu"))
    assert model.model.generation_config.cache_implementation == "static"
    assert answers(model, QUESTIONS) == answers(opened("gemma3"), QUESTIONS)


def test_until_ends_an_answer_and_not_a_prompt(
    opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF]
) -> None:
    model = endless(opened("internvl"))
    (whole,) = answers(model, QUESTIONS[:1])
    stop = whole[6:10]
    assert answers(model, QUESTIONS[:1], until=["texture", stop]) == [whole[: whole.index(stop)].strip()]
    assert answers(model, [(IMAGES[:1], "What is it? " + stop)], until=stop)[0] != ""


def test_an_image_is_encoded_once_for_all_questions_of_a_batch(opened: Callable[..., VITaskHF]) -> None:
    model, seen = opened("llava"), []
    hook = model.model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs.get("pixel_values", args[0] if args else None))),
        with_kwargs=True,
    )
    losses(model, QUESTIONS[:1])  # the self-test has been
    del seen[:]
    losses(model, QUESTIONS)
    hook.remove()
    assert seen == [3]


# Where one prefix for all is not right -------------------------------------------------------------------------------


def logged(run: Callable[[], Any]) -> tuple[Any, str]:
    lines: list[str] = []
    sink = logger.add(lines.append, format="{message}")
    try:
        return run(), "".join(lines)
    finally:
        logger.remove(sink)


def test_a_model_that_leaks_between_answers_gets_a_forward_for_each(
    opened: Callable[..., VITaskHF], endless: Callable[..., VITaskHF]
) -> None:
    pytest.importorskip("transformers.models.qwen3_5")
    for ep in (None, "cls"):
        model = endless(opened("qwen3_5", ep))
        found, lines = logged(lambda model=model: losses(model, QUESTIONS))
        expected = [plain(model, *asked, label)[0] for asked in QUESTIONS for label in LABELS]
        assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)
        assert set(model._layouts.values()) == {Separate}
        assert lines.count("a forward of its own for each answer of Qwen3_5ForConditionalGeneration") == 1
        said = answers(model, QUESTIONS)
        assert said == [greedily(model, *asked) for asked in QUESTIONS]
    for beams in (1, 3):
        model = endless(opened("qwen3_5"))
        found = answers(model, [*QUESTIONS, *OTHERS], num_beams=beams)
        assert found == [stock(model, *asked, num_beams=beams) for asked in [*QUESTIONS, *OTHERS]]


def test_a_model_whose_processor_writes_behind_the_answer_is_refused(opened: Callable[..., VITaskHF]) -> None:
    with pytest.raises(SystemExit, match="changes the text behind an image, so VITask cannot tell where an answer"):
        losses(opened("paligemma"), QUESTIONS[:1])


def test_a_model_that_no_layout_is_right_for_is_refused(
    untuned: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = VITaskHF(str(untuned("internvl")), device="cpu")
    monkeypatch.setattr(selftest, "bound", lambda dtype: -1.0)
    with pytest.raises(SystemExit, match=r"differ from the stock forward of InternVLForCon.* by packed .*, branches "):
        answers(model, QUESTIONS[:1])


def test_a_model_that_gives_no_numbers_is_refused(untuned: Callable[[str], Path]) -> None:
    model = VITaskHF(str(untuned("llava")), device="cpu")
    model.model.lm_head.weight.data.fill_(float("nan"))
    for ask in (answers, losses):
        with pytest.raises(SystemExit, match="gives NaN in place of scores"):
            ask(model, QUESTIONS[:1])


# The command ---------------------------------------------------------------------------------------------------------


def words_of(output: Path, **model_args: Any) -> list[str]:
    given = ",".join(f"{name}={value}" for name, value in model_args.items())
    words = ["--model", "vitask_hf", "--device", "cpu", "--include_path", TASKS, "--batch_size", 4, "--log_samples"]
    words += ["--tasks", "vitask_drawn,vitask_drawn_score", "--model_args", given, "--output_path", output]
    return [str(word) for word in words]


def test_the_command_runs_with_exemplars_and_without_and_takes_answers_up(
    untuned: Callable[[str], Path], drawn_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.__main__ import cli_evaluate

    trained = make_trained(tmp_path, untuned("internvl"), "cls")  # an empty answer is none for lmms-eval's cache
    model_args = {"pretrained": trained.checkpoint, "tsm": trained.tsm}
    cached = ["--use_cache", str(tmp_path / "cache")]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lmms-eval")), *words_of(tmp_path / "ep", **model_args), *cached],
        env={**os.environ, "MEDMNIST_ROOT": str(drawn_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "exemplars: 16 of 16 documents of 'vitask_drawn_score'" in done.stdout
    assert "questions with an image and an exemplar: one forward for all answers" in done.stdout
    monkeypatch.setenv("MEDMNIST_ROOT", str(drawn_root))

    def here(output: Path, *more: str, **model_args: Any) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["lmms-eval", *words_of(output, **model_args), *more])
        cli_evaluate()
        return read_results(output)

    prompted = read_results(tmp_path / "ep")
    with monkeypatch.context() as patch:
        for name in ("answer", "score"):
            patch.setattr(VITaskHF, name, lambda *_: pytest.fail("the model was asked again"))
        again = here(tmp_path / "again", *cached, **model_args)
    unprompted = here(tmp_path / "plain", *cached, pretrained=trained.checkpoint)
    labels = np.load(drawn_root / "drawn.npz")["test_labels"][:, 0].tolist()
    for task, result in prompted.items():
        assert [outcome.target for outcome in result.outcomes] == labels
        assert result.metrics == again[task].metrics
        assert result.metrics.keys() == unprompted[task].metrics.keys()
    assert set(prompted) == {"vitask_drawn", "vitask_drawn_score"}
    scores, others = (
        np.array([answer.probabilities for answer in results["vitask_drawn_score"].answers.values()])
        for results in (prompted, unprompted)
    )
    assert np.abs(scores - others).max() > 1e-3
    assert len(np.unique(scores)) > len(labels)  # the images make a difference


def test_an_exemplar_is_for_the_tasks_of_training(
    opened: Callable[..., VITaskHF], drawn_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = opened("qwen3_vl", "cls")
    monkeypatch.setattr(model, "prompting", type(model.prompting)(model.prompting.label_sets))  # ep=True
    task = load_tasks(model, drawn_root, "vitask_drawn_score")["vitask_drawn_score"]
    document = task.test_docs()[0]
    prompted = model.loglikelihood(task.instances[: len(DRAWN.choices)])
    other = losses(model, [([document["image"]], document["question"])], document["candidates"])
    asked = [document["image"]], document["question"]
    expected = [plain(model, *asked, label)[0] for label in document["candidates"]]
    assert [loss for loss, _ in prompted] == pytest.approx(expected, rel=1e-5)
    monkeypatch.setattr(model, "tsm", None)
    expected = [plain(model, *asked, label)[0] for label in document["candidates"]]
    assert [loss for loss, _ in other] == pytest.approx(expected, rel=1e-5)


# Bad input -----------------------------------------------------------------------------------------------------------


def refused(model: type, **words: Any) -> str:
    with pytest.raises(SystemExit) as stopped:
        model(**words, device="cpu")
    said = str(stopped.value)
    assert said.startswith("vitask: error: ") and "\n" not in said
    return said


def test_a_checkpoint_of_the_other_host_is_one_sentence(
    untuned: Callable[[str], Path], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    llava, hf = str(tiny_checkpoint), str(untuned("llava"))
    said = refused(VITaskHF, pretrained=llava)
    assert f"{llava!r} is a checkpoint of LLaVA 1.2.2, which vitask_hf does not read; give --model vitask_llava" in said
    said = refused(VITaskLlava, pretrained=hf)
    assert f"{hf!r} is a model in HF format, which vitask_llava does not read; give --model vitask_hf" in said
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": hf}))
    assert "give --model vitask_hf" in refused(VITaskLlava, pretrained=str(tmp_path))


def test_bad_arguments_are_one_sentence(untuned: Callable[[str], Path]) -> None:
    good = str(untuned("internvl"))
    assert "vitask_hf needs a checkpoint; give --model_args pretrained=DIR" in refused(VITaskHF)
    said = refused(VITaskHF, pretrained="nowhere")
    assert "pretrained='nowhere' in --model_args is no local folder, and vitask_hf downloads nothing" in said
    assert "contrast=0.5 is of vitask_llava only" in refused(VITaskHF, pretrained=good, contrast=0.5)
    said = refused(VITaskHF, pretrained=good, conv_template="v1")
    assert "'conv_template' unknown; vitask_hf takes batch_size, calibrated, connector," in said
    assert "cannot be prompted with exemplars, for it has no vitask.json" in refused(
        VITaskHF, pretrained=good, tsm=str(Path(good).parent)
    )


def test_a_prompt_that_does_not_fit_is_refused(opened: Callable[..., VITaskHF]) -> None:
    with pytest.raises(SystemExit, match="are longer than the model's 2048 tokens; shorten the question"):
        answers(opened("internvl"), [(IMAGES[:1], "stripes " * 2100)])


def test_importing_our_models_changes_nothing() -> None:
    code = """
import sys
from lmms_eval.caching.response_cache import ResponseCache
before = ResponseCache.execute
import vitask_plugin.evaluation.lmms_hf, vitask_plugin.evaluation.lmms_llava
assert ResponseCache.execute is before
assert "llava" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
