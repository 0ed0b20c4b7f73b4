"""Which weights each `--freeze_*` flag lets move, in both stages, full and with LoRA: all that it should, and no other.

In families that name their parts differently: Qwen3-VL's projector lies inside the vision tower, part of
LLaVA-OneVision's is a bare parameter.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hf_runs import LORA, plain, vitask

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.train import train
from vitask_plugin.hf.trainer import HFTrainer

TOWER, PROJECTOR, WORDS, ADAPTERS, CONNECTOR = "tower", "projector", "language model", "adapters", "connector"
# The first that a name begins with says of which part it is.
PREFIXES = {
    "llava_onevision": {
        "model.multi_modal_projector.": PROJECTOR,
        "model.image_newline": PROJECTOR,
        "model.vision_tower.": TOWER,
        "model.language_model.": WORDS,
        "lm_head.": WORDS,
        "vitask_connector.": CONNECTOR,
    },
    "qwen3_vl": {
        "model.visual.merger.": PROJECTOR,
        "model.visual.deepstack_merger_list.": PROJECTOR,
        "model.visual.": TOWER,
        "model.language_model.": WORDS,
        "lm_head.": WORDS,
        "vitask_connector.": CONNECTOR,
    },
}
# No gradient reaches them, whatever is trained.
IDLE = {
    "llava_onevision": ("vision_model.head.", "vision_model.post_layernorm.", "vision_tower.post_layernorm."),
    # Added behind the last layer of a decoder this small, where nobody looks at an image any more.
    "qwen3_vl": ("deepstack_merger_list.1.",),
}
OFF, ON = "False", "True"


@dataclass(frozen=True)
class Moved:
    """Names by part: those whose values are other ones after training, and those that are as they were, bit for bit."""

    moved: dict[str, set[str]]
    same: dict[str, set[str]]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], Moved]:
    """(family, command line) to what a run of two steps has moved; each parameter of the model is in it."""
    found: dict[str, bool] = {}
    stock = HFTrainer.train

    @functools.wraps(stock)
    def watched(self, *args, **kwargs):
        before = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        result = stock(self, *args, **kwargs)
        found.update({name: not torch.equal(before[name], weight) for name, weight in self.model.named_parameters()})
        return result

    def part_of(family: str, name: str) -> str:
        if "lora_" in name:
            return ADAPTERS
        plain = name.removeprefix("base_model.model.")
        part = next(part for prefix, part in PREFIXES[family].items() if plain.startswith(prefix))
        return part if ".original_module." not in name else f"{part} of the base"

    def run(family: str, command: list[str]) -> Moved:
        found.clear()
        train([*command, "--max_steps", "2"])
        sides: tuple[dict, dict] = {}, {}
        for name, differs in found.items():
            sides[not differs].setdefault(part_of(family, name), set()).add(name)
        return Moved(*sides)

    monkeypatch.setattr(HFTrainer, "train", watched)
    return run


def assert_trained(found: Moved, family: str, parts: set[str]) -> None:
    assert found.moved.keys() == parts
    idle = {name for part in parts for name in found.same.get(part, ())}
    assert all(any(word in name for word in IDLE[family]) for name in idle), idle


FULL = {
    "default": ((), {PROJECTOR, WORDS}),
    "tower too": (("--freeze_vision_tower", OFF), {TOWER, PROJECTOR, WORDS}),
    "without projector": (("--freeze_projector", ON), {WORDS}),
    "projector alone": (("--freeze_language_model", ON), {PROJECTOR}),
    "tower alone": (
        ("--freeze_vision_tower", OFF, "--freeze_projector", ON, "--freeze_language_model", ON),
        {TOWER},
    ),
}


@pytest.mark.parametrize(("flags", "parts"), FULL.values(), ids=FULL)
@pytest.mark.parametrize("family", PREFIXES)
def test_full(family, flags, parts, moved, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    data = sized_mixture, sized_mixture_features
    assert_trained(moved(family, vitask(tiny_hf(family).folder, *data, first, *flags)), family, {*parts, CONNECTOR})
    later = ("--vitask_stage", "2", "--vitask_connector_path", str(first))
    found = moved(family, vitask(first, *data, second, *flags, *later))
    assert_trained(found, family, parts)
    assert len(found.same[CONNECTOR]) == 4


ADAPTED = {
    "default": ((), {ADAPTERS, PROJECTOR}),
    "without projector": (("--freeze_projector", ON), {ADAPTERS}),
}


@pytest.mark.parametrize(("flags", "parts"), ADAPTED.values(), ids=ADAPTED)
@pytest.mark.parametrize("family", PREFIXES)
def test_lora(family, flags, parts, moved, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run = functools.partial(vitask, tiny_hf(family).folder, sized_mixture, sized_mixture_features)
    for stage, command in enumerate(
        (
            run(first, *LORA, *flags),
            run(second, *LORA, *flags, "--vitask_stage", "2", "--vitask_connector_path", str(first)),
        ),
        1,
    ):
        found = moved(family, command)
        assert found.moved.keys() == parts | ({CONNECTOR} if stage == 1 else set())
        assert {TOWER, WORDS} <= found.same.keys()
        still = {name for part in parts for name in found.same.get(part, ())}
        # A bare parameter cannot lie beside adapters.
        assert all(any(word in name for word in (*IDLE[family], "image_newline")) for name in still), still


@pytest.mark.parametrize("family", PREFIXES)
def test_without_vitask(family, moved, tiny_hf, sized_mixture, tmp_path):
    for name in ("default", "without projector", "tower alone"):
        flags, parts = FULL[name]
        command = plain(tiny_hf(family).folder, sized_mixture, tmp_path / name, *flags)
        assert_trained(moved(family, command), family, parts)


ALL_FROZEN = ("--freeze_projector", ON, "--freeze_language_model", ON)


def test_stage_1_may_train_the_connector_alone(moved, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    command = vitask(tiny_hf("qwen3_vl").folder, sized_mixture, sized_mixture_features, tmp_path / "out", *ALL_FROZEN)
    assert moved("qwen3_vl", command).moved.keys() == {CONNECTOR}


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ((), "are all True, so nothing would be trained; leave one of them out"),
        (("--vitask", ON, "--vitask_stage", "2"), "all True and --vitask_stage 2 trains no connector, so nothing"),
        (("--vitask", ON, "--vitask_ep", "none"), "all True and --vitask_stage 1 trains no connector, so nothing"),
    ],
    ids=["without vitask", "stage 2", "no exemplar"],
)
def test_a_run_that_trains_nothing_is_refused(flags, why, tiny_hf, sized_mixture, sized_mixture_features, tmp_path):
    own = ("--vitask_features", str(sized_mixture_features)) if "2" in flags else ()
    own += ("--vitask_connector_path", str(tmp_path)) if "2" in flags else ()
    command = plain(tiny_hf("qwen3_vl").folder, sized_mixture, tmp_path / "out", *ALL_FROZEN, *flags, *own)
    with pytest.raises(VITaskError, match=why):
        train(command)
