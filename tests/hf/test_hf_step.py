"""One VITask step of each family on a mixed batch: packed = branch by branch = stock forwards, in gradients too.

The reference runs each branch of each sample alone through the stock forward of the model.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hf_models import INSTALLED, Tiny

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.hf import model as vitask_model
from vitask_plugin.hf.batch import VITaskCollator, VITaskDataset
from vitask_plugin.hf.loading import add_lora
from vitask_plugin.hf.model import Expanded
from vitask_plugin.hf.reference import branch_logits
from vitask_plugin.hf.tiny import FAMILIES
from vitask_plugin.method import attention
from vitask_plugin.method.branches import IGNORE
from vitask_plugin.method.connector import ExemplarConnector, LearnedPrefix
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training.exemplars import Exemplars

pytestmark = pytest.mark.compat

ALPHA, BETA, DENOMINATOR = 0.7, 0.3, 11.0
# float32 sums in another order, relative to the largest logit, and to the largest gradient of the model: some have a
# gradient that is zero but for rounding, such as biases of keys. Measured: up to 2e-6 and 4e-6.
TOLERANCE = 1e-5
FEATURES = 5
PACKED = (*FAMILIES, "mistral_window")
# Of `sized_data`: 0-3 task samples, 4 text alone, 5 a general image of several turns, 6 an image behind an answer.
# Samples 2 and 3 take each other's image and that of 0; 1 is given one that no row of the batch holds.
EVERYTHING = {0: 1, 1: 3, 2: 0, 4: -1, 5: -1, 6: -1}


class Store:
    """Features of no TSM; what they mean does not matter here, only where they go."""

    tsm_hash, width = "0" * 64, FEATURES

    def __init__(self, tokens: int) -> None:
        self.of = torch.randn(8, tokens, FEATURES, generator=torch.Generator().manual_seed(1))

    def check_image(self, image: str, content: str) -> None:
        pass


class Drawn(Exemplars):
    """Exemplars of such features, or of words that no TSM predicted."""

    def of(self, index: int) -> torch.Tensor | None:
        if self.features is None or "vitask" not in self._samples[index]:
            return super().of(index)
        if self.kind == "text":
            return torch.tensor(self._tokenizer("rising stripes" if index % 2 else "no").input_ids)
        return self.features.of[index]


class Step:
    """A model, a data set and a collator of one kind of run."""

    def __init__(self, tiny: Tiny, data, *, dtype=torch.float32, **flags) -> None:
        self.tiny = tiny
        paths = {"vitask_features": "x", "vitask_tsm": "x"}
        weights = {"vitask_rda_weight": ALPHA, "vitask_crt_weight": BETA}
        self.vitask = VITaskArguments(vitask=True, **paths, **weights, **flags)
        self.dataset = VITaskDataset(str(data / "train.json"), str(data / "images"), tiny.template, 512, self.vitask)
        kind = self.vitask.vitask_ep
        store = Store(3 if kind in ("all", "replace") else 1) if self.vitask.uses_tsm else None
        images = self.dataset.images()
        contents = survey(self.dataset.image_folder, images, images)
        self.exemplars = Drawn(self.vitask, self.dataset, contents, store, self.dataset.tasks)
        self.model, own = tiny.model().to(dtype), None
        torch.manual_seed(0)
        width = tiny.config.get_text_config().hidden_size
        if self.vitask.uses_connector:
            own = LearnedPrefix(width) if kind == "learned" else ExemplarConnector("mlp2x_gelu", FEATURES, width)
            with torch.no_grad():
                for weight in own.parameters():
                    weight.mul_(3)  # so that the exemplar has a part in the answer
            own = own.to(dtype)
        self.model.connect(self.vitask, own)

    def batch(self, negatives: dict[int, int], engine: str):
        self.vitask.vitask_engine = engine
        contrasted = self.vitask.uses_negatives
        items = [self.dataset[Contrasted(*pair) if contrasted else pair[0]] for pair in negatives.items()]
        pad = self.tiny.template.tokenizer.pad_token_id or 0
        return VITaskCollator(self.dataset, self.exemplars, self.vitask, pad=pad)(items)

    def run(self, negatives: dict[int, int], engine: str):
        """Its sums and loss, the logits, and the gradients."""
        batch = self.batch(negatives, engine)
        vitask = batch["vitask"]
        inputs = {name: value for name, value in batch.items() if name != "vitask"}
        self.model.zero_grad()
        output = self.model(**inputs, vitask={**vitask, "denominator": torch.tensor(DENOMINATOR)})
        output.loss.backward()
        with torch.no_grad():
            logits = self.model.vitask_logits(vitask["branches"].layout, inputs, vitask.get("features"))
        branches = vitask["branches"]
        places = {"plain": branches.plain, "prompted": branches.prompted, "negative": branches.negative}
        return output, {kind: logits[place] for kind, place in places.items()}, gradients(self.model), branches

    def stock(self, negatives: dict[int, int], stage: int):
        """The same by stock forwards of one branch each and the equations written out; float64 above the logits."""
        self.model.zero_grad()
        logits = {"plain": [], "prompted": [], "negative": []}
        sums = dict.fromkeys(("vanilla", "ep", "rda", "crt"), torch.zeros((), dtype=torch.float64))
        own = {"image_id": self.tiny.config.image_token_id}
        for index, negative in negatives.items():
            item = self.dataset.encoded(index, index)
            labels = item["labels"][1:]
            answers = labels[labels != IGNORE]
            plain = branch_logits(self.model, item, **own)
            logits["plain"].append(plain)
            sums["vanilla"] = sums["vanilla"] + unlikelihood(plain, answers)
            exemplar = self.exemplars.of(index) if self.vitask.uses_exemplar else None
            if exemplar is not None:
                tokens = self.model.exemplars(exemplar[None])[0]
                replaces = self.vitask.vitask_ep == "replace"
                prompted = branch_logits(self.model, item, tokens, replaces=replaces, **own)
                logits["prompted"].append(prompted)
                sums["ep"] = sums["ep"] + unlikelihood(prompted, answers)
                sums["rda"] = sums["rda"] + divergence(plain, prompted.detach())
            if negative >= 0 and stage == 2:
                other = branch_logits(self.model, self.dataset.encoded(index, negative), **own)
                logits["negative"].append(other)
                sums["crt"] = sums["crt"] + unlikelihood(plain.double() - other.double(), answers)
        # Equations 1 to 4, and the losses of both stages.
        loss = (sums["vanilla"] + sums["ep"] + ALPHA * sums["rda"] + BETA * sums["crt"]) / DENOMINATOR
        loss.backward()
        nothing = torch.zeros(0, len(plain[0]))
        logits = {kind: torch.cat([nothing.to(plain.dtype), *found]).detach() for kind, found in logits.items()}
        return sums | {"loss": loss}, logits, gradients(self.model)


def unlikelihood(logits: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    return -logits.double().log_softmax(-1)[torch.arange(len(answers)), answers].sum()


def divergence(plain: torch.Tensor, prompted: torch.Tensor) -> torch.Tensor:
    """KL(plain || prompted), summed over positions."""
    log_p, log_q = plain.double().log_softmax(-1), prompted.double().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def apart(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of any value, relative to the largest value of all; infinite for another set of names."""
    if found.keys() < expected.keys() or any(found[name].shape != value.shape for name, value in expected.items()):
        return float("inf")
    largest = max(float(value.abs().max()) for value in expected.values() if value.numel())
    differences = [(found[name] - value).double().abs().max() for name, value in expected.items() if value.numel()]
    return float(max(differences)) / largest


def distances(found, expected) -> dict[str, float]:
    """Of what `Step.run` gives from what `Step.stock` gives."""
    output, logits, own_gradients, _ = found
    sums, expected_logits, expected_gradients = expected
    own = {name: value.double().detach() for name, value in (output.sums | {"loss": output.loss}).items()}
    return {
        "losses": apart(own, {name: value.detach() for name, value in sums.items()}),
        "logits": apart(logits, expected_logits),
        "gradients": apart(own_gradients, expected_gradients),
    }


# PaliGemma is refused: an answer sees itself.
TRAINED = [family for family in INSTALLED if family != "paligemma"]
RUNS = [(family, stage, "cls") for family in TRAINED for stage in (1, 2)]
KINDS = [(family, 2, kind) for family in TRAINED for kind in ("all", "replace", "learned", "text", "none")]


@pytest.mark.parametrize(("family", "stage", "kind"), [*RUNS, *KINDS], ids=str)
def test_packed_equals_branches_equals_stock_forwards(family, stage, kind, tiny_hf, sized_data):
    step = Step(tiny_hf(family), sized_data, vitask_stage=stage, vitask_ep=kind)
    expected = step.stock(EVERYTHING, stage)
    for engine in ("packed", "branches") if family in PACKED else ("branches",):
        found = step.run(EVERYTHING, engine)
        measured = distances(found, expected)
        assert max(measured.values()) <= TOLERANCE, (engine, measured)
    # Not vacuous.
    _, logits, own_gradients, branches = found
    assert len(branches.unanswered) == 0
    assert len(logits["prompted"]) > 5 or kind == "none"
    assert (len(logits["negative"]) > 5) == (stage == 2)
    names = " ".join(own_gradients)
    assert "vision_tower" in names or "visual" in names
    assert "language_model.layers.0" in names and "embed_tokens" in names
    assert ("vitask_connector" in names) == (kind not in ("text", "none"))
    if stage == 2:
        assert (branches.counts["negatives"], branches.counts["in_batch_negatives"]) == (3, 2)
    if stage == 2 and family != "mistral_window":  # whose window is shorter than the question
        assert apart({"": logits["negative"]}, {"": logits["plain"][: len(logits["negative"])]}) > 1e-3


# Each plausible mistake must make the comparison fail


def positions_run_on(patch) -> None:
    """One position per place in the row, as without M-RoPE: what stands behind an image is too far away."""
    patch.setattr(Expanded, "positions_of", lambda self, rows: rows.position_ids)


def no_moved_positions(patch) -> None:
    right = Expanded.of.__func__

    def of(cls, given, sees_itself=None):
        found = right(cls, given, sees_itself)
        return replace(found, moved=torch.zeros_like(found.moved))

    patch.setattr(Expanded, "of", classmethod(of))


def images_do_not_see_themselves(patch) -> None:
    patch.setattr(vitask_model.VITaskStep, "_image_blocks", lambda self, ids: None)


def window_by_index(patch) -> None:
    """A window that counts places of the row, not positions of the sequence."""
    right = attention.Rule.sees

    def sees(self, row, query, key):
        index = torch.arange(self.until.shape[1]).expand_as(self.until)
        return right(replace(self, positions=index), row, query, key)

    patch.setattr(attention.Rule, "sees", sees)


def no_window(patch) -> None:
    right = attention.Rule.sees
    patch.setattr(attention.Rule, "sees", lambda self, *where: right(replace(self, window=None), *where))


def no_deep_features(patch) -> None:
    patch.setattr(Expanded, "deep_of", lambda self, rows: {})


def deep_features_in_the_order_of_the_batch(patch) -> None:
    """The rows of a packed layout are not those of the batch."""

    def deep_of(self, rows):
        visual = self.deep_row[rows.source] >= 0
        count = int(visual.sum())
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": [one[:count] for one in self.deep]}

    patch.setattr(Expanded, "deep_of", deep_of)


def everything_is_seen(patch) -> None:
    patch.setattr(attention, "visible", lambda query, key, until: (key <= query) & (until > 0))


def exemplar_before_the_closing_text(patch) -> None:
    """The prefix ends at the last image token."""
    from vitask_plugin.hf import batch
    from vitask_plugin.method.layout import cut_row

    patch.setattr(batch, "cut_row", lambda start, ids, is_image, labels, end: cut_row(start, ids, is_image, labels))


MUTANTS = [
    *((family, mutant) for family in ("qwen2_5_vl", "qwen3_vl") for mutant in (positions_run_on, no_moved_positions)),
    ("gemma3", images_do_not_see_themselves),
    *((family, mutant) for family in ("gemma3", "mistral_window") for mutant in (window_by_index, no_window)),
    ("qwen3_vl", no_deep_features),
    ("qwen3_vl", deep_features_in_the_order_of_the_batch),
    *((family, everything_is_seen) for family in ("llava", "gemma3", "qwen3_vl")),
    *((family, exemplar_before_the_closing_text) for family in ("internvl", "gemma3", "qwen2_5_vl")),
]


@pytest.mark.parametrize(
    ("family", "mutant"), MUTANTS, ids=lambda value: value if isinstance(value, str) else value.__name__
)
def test_a_mistake_is_noticed(family, mutant, tiny_hf, sized_data, monkeypatch):
    step = Step(tiny_hf(family), sized_data, vitask_stage=2)
    expected = step.stock(EVERYTHING, 2)
    mutant(monkeypatch)
    measured = distances(step.run(EVERYTHING, "packed"), expected)
    assert min(measured["logits"], measured["gradients"]) > 10 * TOLERANCE, measured
    assert max(measured.values()) > 100 * TOLERANCE, measured


@pytest.mark.parametrize("family", [family for family in TRAINED if family not in PACKED])
def test_what_cannot_be_packed_is_far_off(family, tiny_hf, sized_data):
    step = Step(tiny_hf(family), sized_data, vitask_stage=2)
    measured = distances(step.run(EVERYTHING, "packed"), step.stock(EVERYTHING, 2))
    assert max(measured.values()) > 1000 * TOLERANCE, measured


# Other kinds of run

# Relative to the largest logit and the largest gradient; two ways to round, both sides in the same dtype.
BFLOAT16 = 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family, tiny_hf, sized_data):
    step = Step(tiny_hf(family), sized_data, vitask_stage=2, dtype=torch.bfloat16)
    expected = step.stock(EVERYTHING, 2)
    for engine in ("packed", "branches"):
        measured = distances(step.run(EVERYTHING, engine), expected)
        assert TOLERANCE < max(measured.values()) <= BFLOAT16, (engine, measured)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_changes_nothing(family, lora, tiny_hf, sized_data):
    found = {}
    for checkpointing in (False, True):
        step = Step(tiny_hf(family), sized_data, vitask_stage=2)
        own = step.model
        if lora:
            own.requires_grad_(False)
            args = SimpleNamespace(lora_r=4, lora_alpha=8, lora_dropout=0.0)
            step.model = add_lora(own, args, projector=True)
            step.model.vitask_logits = own.vitask_logits
            torch.manual_seed(2)
            with torch.no_grad():
                for name, weight in step.model.named_parameters():
                    if "lora_" in name:
                        weight.normal_(std=0.1)  # B too, so that A has a gradient
        if checkpointing:
            step.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if lora:
                own.enable_input_require_grads()
        step.model.train()
        calls = []
        layer = own.model.language_model.layers[0]
        layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        found[checkpointing] = step.run(EVERYTHING, "packed")
        # One forward, one that is recomputed, and the logits without a gradient.
        assert len(calls) == (3 if checkpointing else 2)
    assert apart(found[True][2], found[False][2]) <= 1e-6
    assert any("lora_A" in name for name in found[True][2]) == lora
    assert float(found[True][0].loss) == pytest.approx(float(found[False][0].loss), rel=1e-6)


def test_the_data_has_what_it_claims(sized_data):
    samples = json.loads((sized_data / "train.json").read_text())
    assert [("vitask" in one, "image" in one) for one in samples[4:]] == [(False, False), (False, True), (False, True)]
    assert all("vitask" in one for one in samples[:4])
