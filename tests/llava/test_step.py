"""One VITask step of the real LLaVA model on a mixed batch: packed = branches = the naive reference, in gradients too.

The reference expands each (sample, image) pair alone through upstream, and runs each branch as one unpadded forward.
"""

import json

import pytest
import reference
import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.method.connector import ExemplarConnector

pytestmark = pytest.mark.compat
ALPHA, BETA = 0.7, 0.3
# float32 sums in another order: measured 2e-7 to 3e-6; the bound is the one the project promises.
TOLERANCE = 1e-5


@pytest.fixture
def batch_of(build, instances_of):
    """A collated batch of the mixed data by sample numbers, for a stage."""

    def make(indices, **flags):
        dataset, collator = build(**flags)
        return collator(instances_of(dataset, indices))

    return make


def negatives_of(collator, instances):
    """The rows of the negatives in the collator's batch."""
    return collator.negative_rows(instances)[0] if collator.vitask.uses_negatives else [-1] * len(instances)


@pytest.fixture
def make_model(tiny_checkpoint, feature_store):
    from vitask_plugin.llava.loading import load

    def make(width: int, **flags):
        torch.manual_seed(0)
        model = load(tiny_checkpoint).model
        model.config.tokenizer_padding_side = "right"  # as in training
        weights = {"vitask_rda_weight": ALPHA, "vitask_crt_weight": BETA}
        vitask = VITaskArguments(vitask=True, vitask_features=str(feature_store), **weights, **flags)
        model.connect(vitask, ExemplarConnector("mlp2x_gelu", width, model.config.hidden_size))
        # Random weights of the usual 0.02 leave attention nearly uniform and the exemplar without weight: a wrong
        # mask would hardly show, and RDA would be all rounding.
        with torch.no_grad():
            language_model = [*model.model.layers.parameters(), *model.lm_head.parameters()]
            for parameter in [*language_model, *model.get_model().mm_projector.parameters()]:
                if parameter.ndim > 1:
                    parameter.mul_(8)
            for parameter in model.vitask_connector.parameters():
                parameter.mul_(4)
        return model

    return make


def run(model, batch):
    model.zero_grad()
    output = model(**{**batch, "vitask": {**batch["vitask"], "denominator": torch.tensor(11.0)}})
    output.loss.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return output, gradients


def exemplar_length(collator, index):
    feature = collator.exemplars.of(index)
    return 0 if feature is None else len(feature)


def naive(model, batch, indices, collator, negatives, stage):
    """The same loss by `reference.step`, from single rows expanded by upstream.

    Args:
        indices: the samples. negatives: per sample, the row of `batch` that holds its negative image; -1: none.
    """
    model.zero_grad()

    def expand(row, image):
        ids = batch["input_ids"][row][batch["attention_mask"][row]][None]
        labels = batch["labels"][row][batch["attention_mask"][row]][None]
        _, _, _, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, labels, batch["images"][image][None]
        )
        images = (ids[0] == -200).nonzero()
        # Nothing is cut where no image is, and in general data that answers before the image.
        general = not len(images) or (labels[0, : embeds.shape[1] - (ids.shape[1] - 1 - int(images[-1]))] >= 0).any()
        cut = 0 if general else embeds.shape[1] - (ids.shape[1] - 1 - int(images[-1]))
        return embeds[0, :cut], embeds[0, cut:], labels[0, cut:]

    samples = []
    for row, (index, negative) in enumerate(zip(indices, negatives, strict=True)):
        prefix, text, labels = expand(row, row)
        sample = reference.Sample(prefix, text, labels)
        length = exemplar_length(collator, index)
        if length:
            sample.exemplar = model.vitask_connector(batch["vitask"]["features"][row, :length])
        if negative >= 0:
            sample.negative_prefix = expand(row, negative)[0]
        samples.append(sample)
    step = reference.step(model, samples, stage=stage, alpha=ALPHA, beta=BETA, denominator=11)
    step.total.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return step, gradients


def assert_close(found, expected, what):
    scale = expected.abs().max().clamp(min=1e-12)
    assert ((found - expected).abs().max() / scale) < TOLERANCE, what


# Mixed data: 0, 1 several turns; 2 a general image, 3 one after an answer; 4, 5 text-only; 6 and on drawn samples.
BATCHES = {
    "everything": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
    "negatives from the data set": [6, 2, 4],
    "one sample": [7],
    "no exemplar at all": [2, 4],
}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("tokens", ["cls", "all"])
@pytest.mark.parametrize("name", BATCHES)
def test_packed_equals_branches_equals_naive(name, tokens, stage, build, instances_of, make_model):
    indices, results = BATCHES[name], {}
    for engine in ("packed", "branches"):
        dataset, collator = build(vitask_stage=stage, vitask_ep=tokens, vitask_engine=engine)
        instances = instances_of(dataset, indices)
        batch = collator(instances)
        model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=stage, vitask_ep=tokens)
        results[engine] = run(model, batch)
    (packed, packed_gradients), (branches, branches_gradients) = results["packed"], results["branches"]
    negatives = negatives_of(collator, instances)
    step, naive_gradients = naive(model, batch, indices, collator, negatives, stage)
    for term in ("vanilla", "ep", "rda", "crt"):
        assert_close(packed.sums[term].double(), step.sums[term].detach(), term)
        assert_close(branches.sums[term].double(), step.sums[term].detach(), term)
    assert_close(packed.loss.double(), step.total.detach(), "loss")
    compared = 0
    for parameter, expected in naive_gradients.items():
        assert_close(packed_gradients[parameter], expected, f"packed gradient of {parameter}")
        assert_close(branches_gradients[parameter], expected, f"branches gradient of {parameter}")
        compared += 1
    names = " ".join(naive_gradients)
    assert compared > 15 and "mm_projector" in names and "lm_head" in names and "embed_tokens" in names
    if name != "no exemplar at all":
        assert "vitask_connector" in names
        assert step.sums["ep"] > 0 and step.sums["rda"] > 0
        assert (step.sums["crt"] > 0) == (stage == 2)
    # The connector has a gradient (perhaps zero) in every batch: ranks must agree on who has one.
    assert any("vitask_connector" in parameter for parameter in packed_gradients)


@pytest.mark.parametrize("indices", [[0, 6, 7, 9], [6, 2]], ids=["in the batch", "from the data set"])
def test_a_negative_that_is_asked_another_question(indices, build, instances_of, make_model, mixed_data, tmp_path):
    """Samples 0, 6 and 7 ask what nobody asks: packed = branch by branch = naive, with an image of another question."""
    samples = json.loads((mixed_data / "train.json").read_text())
    for index in (0, 6, 7):
        samples[index]["conversations"][0]["value"] = f"<image>\nThe patient is {50 + index}."
    path = tmp_path / "own.json"
    path.write_text(json.dumps(samples))
    found = {}
    for engine in ("packed", "branches"):
        dataset, collator = build(path, vitask_stage=2, vitask_engine=engine)
        instances = instances_of(dataset, indices)
        batch = collator(instances)
        model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=2)
        found[engine] = run(model, batch)
    rows = negatives_of(collator, instances)
    assert batch["vitask"]["branches"].counts["relaxed_negatives"] == sum(index < 8 and index != 2 for index in indices)
    step, expected = naive(model, batch, indices, collator, rows, 2)
    for output, gradients in found.values():
        assert_close(output.sums["crt"].double(), step.sums["crt"].detach(), "crt")
        assert_close(output.loss.double(), step.total.detach(), "loss")
        for name, gradient in expected.items():
            assert_close(gradients[name], gradient, name)
    assert step.sums["crt"] > 0


def test_embeddings_are_asked_for_once_whatever_the_rows(build, instances_of, make_model):
    """ZeRO-3 gathers them in each call, and ranks whose calls differ in number end with a collective mismatch."""
    rows = set()
    for indices in ([6], [4, 2], [6, 7, 8, 9]):
        dataset, collator = build(vitask_stage=2)
        batch = collator(instances_of(dataset, indices))
        model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=2)
        calls = []
        model.get_model().embed_tokens.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        run(model, batch)
        assert len(calls) == 1
        rows.add(len(batch["input_ids"]))
    assert len(rows) > 1


@pytest.mark.parametrize("engine", ["packed", "branches"])
def test_replace_puts_the_features_where_the_image_was(engine, batch_of, make_model):
    batch = batch_of([6, 7, 8], vitask_ep="replace", vitask_stage=2, vitask_engine=engine)
    model = make_model(batch["vitask"]["features"].shape[-1], vitask_ep="replace", vitask_stage=2)
    output, gradients = run(model, batch)
    total = torch.zeros((), dtype=torch.float64)
    embed = model.get_model().embed_tokens
    for sample in range(3):
        valid = batch["attention_mask"][sample]
        ids, labels = batch["input_ids"][sample, valid], batch["labels"][sample, valid]
        image = int((ids == -200).nonzero())
        exemplar = model.vitask_connector(batch["vitask"]["features"][sample])
        parts = [embed(ids[:image]), exemplar, embed(ids[image + 1 :])]
        logits, answers = reference.branch_logits(model, parts, labels[image + 1 :])
        total = total + sum(reference.negative_log_likelihood(logits, torch.tensor(answers)))
    assert_close(output.sums["ep"].double(), total.detach(), "ep")
    assert output.sums["ep_tokens"] > 0 and any("vitask_connector" in name for name in gradients)


def test_rda_teaches_the_plain_branch_only(batch_of, make_model):
    """With RDA alone, the connector gets no gradient: the exemplar branch is detached."""
    batch = batch_of([6, 7, 8], vitask_stage=1)
    model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=1)
    with_rda = run(model, batch)[1]["vitask_connector.layers.0.weight"]
    model.vitask_arguments.vitask_rda_weight = 0.0
    without = run(model, batch)[1]["vitask_connector.layers.0.weight"]
    assert without.abs().max() > 0
    assert_close(with_rda, without, "connector gradient")


def test_exemplar_changes_the_answer_and_its_absence_is_upstream(batch_of, make_model):
    batch = batch_of([6, 7], vitask_stage=1)
    model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=1)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "images")}
    plain = model.vitask_prompts(**inputs)
    prompted = model.vitask_prompts(
        **inputs, tsm_features=batch["vitask"]["features"], tsm_lengths=torch.tensor([1, 1])
    )
    lengths = [len(prompts.documents[0].continuations[0].tokens) for prompts in (plain, prompted)]
    assert lengths[1] == lengths[0] + 1
    upstream = super(type(model), model).forward(**inputs).logits

    def sequence(prompts, number):
        document = prompts.documents[number]
        return prompts.pool[torch.cat([document.prefix, document.continuations[0].tokens])][None]

    for number in range(2):
        own = model(inputs_embeds=sequence(plain, number)).logits[0]
        assert_close(own.detach(), upstream[number, : len(own)].detach(), "plain logits")
        assert (model(inputs_embeds=sequence(prompted, number)).logits[0, -1] - own[-1]).abs().max() > 1e-3


# Both engines round in their own order: measured 2e-7 to 3e-6 in float32, 0.02 in bfloat16, 0.003 in float16, each
# relative to the largest element of the tensor.
KINDS = {
    "gradient checkpointing": 1e-5,
    "lora": 1e-5,
    "lora and gradient checkpointing": 1e-5,
    "bfloat16": 0.05,
    "float16": 0.01,
}


@pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_packed_equals_branches_in_every_kind_of_run(kind, build, instances_of, make_model):
    results = {}
    for engine in ("packed", "branches"):
        dataset, collator = build(vitask_stage=2, vitask_engine=engine)
        batch = collator(instances_of(dataset, range(11)))
        model = make_model(batch["vitask"]["features"].shape[-1], vitask_stage=2)
        model, batch = changed(kind, model, batch)
        output, gradients = run(model, batch)
        results[engine] = (output.loss.detach().double().cpu(), gradients)
    (packed, ours), (branches, theirs) = results["packed"], results["branches"]
    assert distance(packed, branches) <= KINDS[kind]
    assert ours.keys() == theirs.keys() and len(theirs) > 10
    assert any("lora" in name for name in theirs) == ("lora" in kind)
    distances = {name: distance(ours[name].double(), theirs[name].double()) for name in theirs}
    assert max(distances.values()) <= KINDS[kind], max(distances, key=distances.get)


def changed(kind, model, batch):
    """The model and the batch as this kind of run has them."""
    if "gradient checkpointing" in kind:
        model.train()
        model.config.use_cache = False
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if kind in ("bfloat16", "float16"):
        dtype = getattr(torch, kind)
        batch = {**batch, "images": batch["images"].to(dtype)}
        batch["vitask"] = {**batch["vitask"], "features": batch["vitask"]["features"].to(dtype)}
        model = model.to(dtype)
    if "lora" in kind:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        # As upstream's, but with weights in B, so that A has a gradient too.
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return model, batch


def distance(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
