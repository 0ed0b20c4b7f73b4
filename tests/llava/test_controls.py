"""The controls for exemplar prompting and RDA: each against its own reference, in both engines, and unlike the default.

RDA without detachment (RDA*), a learned prefix in place of the exemplar, the TSM's prediction in words, and upstream's
own flags for the projector.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from runs import LORA, arguments, history, train, weights
from safetensors.torch import load_file
from test_step import ALPHA, BETA, assert_close, run

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.data.instructions import DRAWN
from vitask_plugin.errors import VITaskError
from vitask_plugin.method.connector import LEARNED, build_connector
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.tsm.features import FeatureStore

# Samples of the mixed data with an exemplar (several turns, drawn) and without (general, text-only).
INDICES = [0, 2, 4, 6, 7, 8, 9]
PROMPTED = (0, 6, 7, 8, 9)
KINDS = {
    "cls": {},
    "RDA*": {"vitask_rda_detach": False},
    "learned": {"vitask_ep": "learned"},
    "text": {"vitask_ep": "text"},
}


@pytest.fixture
def make_model(tiny_checkpoint):
    """The tiny LLaVA with weights large enough for attention and exemplar to matter, and a control's connector."""
    from vitask_plugin.llava.loading import load

    def make(vitask: VITaskArguments, width: int):
        torch.manual_seed(0)
        model = load(tiny_checkpoint).model
        model.config.tokenizer_padding_side = "right"
        connector = None
        if vitask.uses_connector:
            kind = LEARNED if vitask.vitask_ep == LEARNED else "mlp2x_gelu"
            connector = build_connector(kind, width, model.config.hidden_size)
        model.connect(vitask, connector)
        with torch.no_grad():
            for parameter in [*model.model.layers.parameters(), *model.lm_head.parameters()]:
                if parameter.ndim > 1:
                    parameter.mul_(8)
            for parameter in [] if model.vitask_connector is None else model.vitask_connector.parameters():
                parameter.mul_(4)
        return model

    return make


@pytest.fixture
def stepped(build, instances_of, make_model):
    """One step of a control: (model, batch, collator, output, gradients)."""

    def step(kind: str, engine: str = "packed", stage: int = 2):
        weighted = {"vitask_rda_weight": ALPHA, "vitask_crt_weight": BETA}
        dataset, collator = build(vitask_stage=stage, vitask_engine=engine, **weighted, **KINDS[kind])
        batch = collator(instances_of(dataset, INDICES))
        features = batch["vitask"]["features"]
        model = make_model(collator.vitask, 0 if kind == "text" else features.shape[-1])
        return model, batch, collator, *run(model, batch)

    return step


@pytest.fixture
def predictions(tiny_llava, mixed_data, feature_store):
    """Token ids of what the TSM predicts for a sample of the mixed data, from the stored logits."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llava.base, use_fast=False)
    samples = json.loads((mixed_data / "train.json").read_text())
    store = FeatureStore.open(feature_store)

    def of(index: int) -> list[int]:
        logits = store.logits(samples[index]["image"]).tolist()
        return tokenizer(f"{DRAWN.choices[logits.index(max(logits))]}.", add_special_tokens=False).input_ids

    return of


def exemplar(kind: str, model, row: int, batch, words: list[int]) -> torch.Tensor:
    """The exemplar tokens [E, D] that a control stands for, by its definition."""
    if kind == "learned":
        return model.vitask_connector.token[None]
    if kind == "text":
        return torch.stack([model.get_model().embed_tokens.weight[token] for token in words])
    return model.vitask_connector(batch["vitask"]["features"][row])


def naive(kind: str, model, batch, negatives: list[int], stage: int, predictions):
    """The same step by `reference.step`, from single rows that upstream expands; a negative is a row, -1: none."""
    model.zero_grad()

    def expand(row: int, image: int):
        valid = batch["attention_mask"][row]
        ids, labels = batch["input_ids"][row, valid][None], batch["labels"][row, valid][None]
        _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, labels, batch["images"][image][None]
        )
        image_at = (ids[0] == -200).nonzero()
        cut = embeds.shape[1] - (ids.shape[1] - 1 - int(image_at[-1])) if len(image_at) else 0
        return embeds[0, :cut], embeds[0, cut:], labels[0, cut:]

    samples = []
    for row, (index, negative) in enumerate(zip(INDICES, negatives, strict=True)):
        sample = reference.Sample(*expand(row, row))
        if index in PROMPTED:
            sample.exemplar = exemplar(kind, model, row, batch, predictions(index) if kind == "text" else [])
        if negative >= 0:
            sample.negative_prefix = expand(row, negative)[0]
        samples.append(sample)
    detach = kind != "RDA*"
    step = reference.step(model, samples, stage=stage, alpha=ALPHA, beta=BETA, denominator=11, detach=detach)
    step.total.backward()
    return step, {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.compat
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("kind", ["RDA*", "learned", "text"])
def test_packed_equals_branches_equals_naive(kind, stage, stepped, instances_of, predictions):
    for engine in ("packed", "branches"):
        model, batch, collator, output, gradients = stepped(kind, engine, stage)
        negatives = [-1] * len(INDICES)
        if stage == 2:
            negatives = collator.negative_rows(instances_of(collator.dataset, INDICES))[0]
        step, expected = naive(kind, model, batch, negatives, stage, predictions)
        for term in ("vanilla", "ep", "rda", "crt"):
            assert_close(output.sums[term].double(), step.sums[term].detach(), (engine, term))
        assert_close(output.loss.double(), step.total.detach(), "loss")
        assert step.sums["ep"] > 0 and step.sums["rda"] > 0 and (step.sums["crt"] > 0) == (stage == 2)
        assert len(expected) > 15
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, (engine, name))


def test_each_control_is_unlike_the_default(stepped):
    _, _, _, default, _ = stepped("cls")
    for kind in ("learned", "text"):
        _, _, _, output, _ = stepped(kind)
        assert torch.equal(output.sums["vanilla"], default.sums["vanilla"])  # without an exemplar nothing differs
        for term in ("ep", "rda"):
            assert abs(output.sums[term] - default.sums[term]) > 1e-3 * default.sums[term], (kind, term)


def test_without_detachment_rda_pulls_the_exemplar_branch(stepped):
    """The same loss, another gradient: with RDA* the connector's own changes, and is what the reference says."""
    name = "vitask_connector.layers.0.weight"
    _, _, _, detached, expected = stepped("cls")
    _, _, _, attached, found = stepped("RDA*")
    assert float(attached.loss) == pytest.approx(float(detached.loss), rel=1e-6)
    assert (found[name] - expected[name]).abs().max() > 1e-2 * expected[name].abs().max()


def test_the_learned_prefix_knows_no_image(stepped, build):
    """One token for every image, a gradient for it, and no TSM: not even a feature store is opened."""
    model, batch, _, _, gradients = stepped("learned")
    assert batch["vitask"]["features"].shape == (len(INDICES), 1, 0)
    assert gradients["vitask_connector.token"].abs().max() > 0
    tokens = model.vitask_connector(batch["vitask"]["features"])
    assert torch.equal(tokens, model.vitask_connector.token.expand(len(INDICES), 1, -1))
    vitask = VITaskArguments(vitask=True, vitask_ep="learned")
    assert vitask.uses_connector and not vitask.uses_tsm
    assert build(vitask_ep="learned")[1].exemplars.features is None


def test_words_are_the_tsms_prediction_and_not_the_label(stepped, predictions, mixed_data):
    _, batch, collator, _, _ = stepped("text")
    samples = json.loads((mixed_data / "train.json").read_text())
    wrong = 0
    for row, index in enumerate(INDICES):
        ids = batch["vitask"]["features"][row]
        if index in PROMPTED:
            words = predictions(index)
            assert ids[: len(words)].tolist() == words and not ids[len(words) :].any()
            answer = samples[index]["conversations"][1]["value"]
            wrong += words != collator.tokenizer(answer, add_special_tokens=False).input_ids
        else:
            assert not ids.any()
    assert wrong > 0  # an untrained TSM: what stands there is its word, right or wrong


def test_text_without_a_tsm_or_with_another_ones_labels_is_refused(build, feature_store):
    with pytest.raises(VITaskError, match="--vitask_ep text needs --vitask_tsm DIR"):
        VITaskArguments(vitask=True, vitask_ep="text", vitask_features=str(feature_store))
    dataset, collator = build(vitask_ep="text")
    contents = survey(dataset.image_folder, dataset.images(), dataset.task_images())
    other = {DRAWN.task: {"choices": list(reversed(DRAWN.choices)), "multi_label": False}}
    for tasks in (other, {"scans": other[DRAWN.task]}):
        with pytest.raises(VITaskError, match=f"task '{DRAWN.task}' has the labels .* needs a TSM that was trained"):
            Exemplars(collator.vitask, dataset, contents, FeatureStore.open(feature_store), tasks)


# Upstream's own train() ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_llava, tiny_checkpoint, mixed_data, tsm_directory, feature_store):
    """Both stages of the two controls, from a whole checkpoint, and a run that trains the projector alone."""
    root = tmp_path_factory.mktemp("controls")
    start = ["--vitask", "True", "--model_name_or_path", str(tiny_checkpoint)]
    frozen = ["--freeze_mm_mlp_adapter", "True"]
    tsm = ["--vitask_tsm", str(tsm_directory), "--vitask_features", str(feature_store)]

    def learned() -> None:
        flags = [*start, "--vitask_ep", "learned"]
        first = train(tiny_llava, mixed_data, root / "llava-learned-1", *flags)
        flags += ["--model_name_or_path", str(first), "--vitask_stage", "2", *frozen]
        train(tiny_llava, mixed_data, root / "llava-learned-2", *flags)

    def text() -> None:
        flags = [*start, *tsm, *LORA, "--vitask_ep", "text", *frozen]
        first = train(tiny_llava, mixed_data, root / "llava-text-1", *flags)
        flags += ["--vitask_stage", "2", "--vitask_connector_path", str(first)]
        train(tiny_llava, mixed_data, root / "llava-text-2", *flags)

    def projector() -> None:
        flags = [*start, *tsm, *LORA, "--tune_mm_mlp_adapter", "True"]
        train(tiny_llava, mixed_data, root / "llava-projector-1", *flags)

    with ThreadPoolExecutor(2) as pool:
        for job in [pool.submit(run) for run in (learned, text, projector)]:
            job.result()
    return root


def named(part: str, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights whose names hold `part`, by what follows it."""
    return {name.partition(part)[2]: weight for name, weight in found.items() if part in name}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    assert found.keys() == expected.keys() and expected
    return all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_learned_prefix_is_trained_in_stage_1_and_kept_in_stage_2(runs):
    first, second = (load_file(runs / f"llava-learned-{stage}" / "vitask_connector.safetensors") for stage in (1, 2))
    assert list(first) == ["token"] and same(second, first)
    torch.manual_seed(42)  # --seed of the run
    untrained = build_connector(LEARNED, 0, len(first["token"])).token
    moved = (first["token"] - untrained).abs()
    assert 1e-4 < moved.max() < 1e-2  # four steps of AdamW at 1e-3, from this very start
    for stage in (1, 2):
        record = json.loads((runs / f"llava-learned-{stage}" / "vitask.json").read_text())
        assert record["ep"] == "learned" and record["tsm"] is None
        shape = {"kind": "learned", "in": 0, "out": len(first["token"])}
        assert record["connector"] == shape | {"sha256": record["connector"]["sha256"]}
        assert all(entry["loss_ep"] > 0 and entry["loss_rda"] > 0 for entry in history(runs / f"llava-learned-{stage}"))


def test_text_leaves_no_connector_and_the_record_names_the_tsm(runs, tsm_directory):
    from vitask_plugin.tsm.model import TSM

    for stage in (1, 2):
        directory = runs / f"llava-text-{stage}"
        assert not (directory / "vitask_connector.safetensors").exists()
        record = json.loads((directory / "vitask.json").read_text())
        assert record["ep"] == "text" and record["connector"] is None
        assert record["tsm"]["hash"] == TSM.load(tsm_directory).hash
        assert all(entry["loss_ep"] > 0 for entry in history(directory))
    first, second = weights(runs / "llava-text-1"), weights(runs / "llava-text-2")
    assert first.keys() == second.keys() and not same(second, first)


def test_the_projector_is_trained_unless_upstreams_flag_freezes_it(runs, tiny_checkpoint):
    """As upstream has it: trained with full tuning and with LoRA, frozen by --freeze_mm_mlp_adapter in any stage."""
    start = named("mm_projector.", weights(tiny_checkpoint))
    first, second = (weights(runs / f"llava-learned-{stage}") for stage in (1, 2))
    assert not same(named("mm_projector.", first), start)
    assert same(named("mm_projector.", second), named("mm_projector.", first))
    assert not same(named("layers.0.mlp.", second), named("layers.0.mlp.", first))  # the LLM went on
    for stage in (1, 2):
        # Upstream's LoRA checkpoint holds what was trained: without the projector, the base's stays.
        found = weights(runs / f"llava-text-{stage}")
        assert found and not named("mm_projector.", found)


def test_tuning_the_projector_alone_is_upstreams_flag_with_lora(runs, tiny_checkpoint):
    """The adapter stays what it was, which adds nothing: the LLM is the base's; projector and connector are trained."""
    directory = runs / "llava-projector-1"
    found = weights(directory)
    lora_b = {name: weight for name, weight in found.items() if "lora_B" in name}
    assert lora_b and not any(weight.any() for weight in lora_b.values())
    assert not same(named("mm_projector.", found), named("mm_projector.", weights(tiny_checkpoint)))
    log = history(directory)
    assert log[-1]["loss_ep"] < log[0]["loss_ep"]


@pytest.fixture
def refused(tiny_llava, tiny_checkpoint, mixed_data, feature_store, tmp_path, monkeypatch):
    """Runs the training command in this process; returns the sentence it ended with."""
    from vitask_plugin.llava import compat
    from vitask_plugin.llava.install import wrap

    compat.prepare()
    from llava.train.train import train

    def run(*flags: str) -> str:
        start = ["--vitask", "True", "--model_name_or_path", str(tiny_checkpoint)]
        features = ["--vitask_features", str(feature_store)]
        command = arguments(tiny_llava, mixed_data, tmp_path / "output", *start, *features, *flags)
        monkeypatch.setattr(sys, "argv", ["train.py", *command])
        with pytest.raises(SystemExit) as stopped:
            wrap(train)()
        return str(stopped.value)

    return run


def test_what_would_lose_the_projector_is_refused(runs, refused):
    assert "add --lora_enable True" in refused("--tune_mm_mlp_adapter", "True")
    earlier = ["--vitask_connector_path", str(runs / "llava-projector-1"), "--vitask_stage", "2", *LORA]
    sentence = refused(*earlier, "--freeze_mm_mlp_adapter", "True")
    assert "mm_projector" in sentence and "give it in both stages" in sentence and "\n" not in sentence


def test_stage_2_with_another_exemplar_is_refused(runs, refused):
    flags = ["--model_name_or_path", str(runs / "llava-learned-1"), "--vitask_stage", "2"]
    sentence = refused(*flags)
    assert "--vitask_ep learned" in sentence and "--vitask_ep cls" in sentence
