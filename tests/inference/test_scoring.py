"""Label log-likelihoods equal those of one plain forward per label, whatever is scored together."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.inference import scoring
from vitask_plugin.inference.scoring import label_log_likelihoods, label_prompts, with_text
from vitask_plugin.method.branches import Prompts
from vitask_plugin.method.connector import ExemplarConnector

FEATURES = 5  # width of the TSM's
END = 2
IMAGE = [1, 20, 21, -200]
QUESTIONS = [[50, 51, 52, 53, 54], [50, 60], [70, 71, 72]]
# Uneven, one token alone, the same first tokens, one that goes on from another, the same twice; not the same number.
LABELS = [
    [[80, 81, END], [82, END], [80, 83, 84, 85, END], [86]],
    [[80, 81, END], [80, 81, 82, END], [80, 81, END]],
    [[90, END]],
]
EXEMPLARS = {0: 2, 1: 0, 2: 1}  # tokens, by sample


@pytest.fixture(scope="module")
def model(tiny_checkpoint) -> Any:
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaConfig

    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    torch.manual_seed(0)
    config = LlavaConfig.from_pretrained(tiny_checkpoint, initializer_range=0.3)
    model = VITaskLlavaLlamaForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    connector = ExemplarConnector("mlp2x_gelu", FEATURES, config.hidden_size)
    model.connect(VITaskArguments(vitask=True, vitask_ep="all", vitask_tsm="tsm"), connector)
    return model


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "images": torch.randn(3, 3, 28, 28, generator=generator),
        "tsm_features": torch.randn(3, 2, FEATURES, generator=generator),
    }


def prompts_of(model: Any, inputs: dict[str, Tensor], samples: list[int]) -> tuple[Prompts, list[list[int]]]:
    """Prompts with exemplars for some of the samples, and their token ids."""
    ids = [IMAGE + QUESTIONS[sample] for sample in samples]
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    found = model.vitask_prompts(
        rows,
        (rows != 0).long(),
        inputs["images"][samples],
        tsm_features=inputs["tsm_features"][samples],
        tsm_lengths=torch.tensor([EXEMPLARS[sample] for sample in samples]),
    )
    return found, ids


def scored(model: Any, inputs: dict[str, Tensor], samples: list[int]) -> list[scoring.LabelScores]:
    prompts, ids = prompts_of(model, inputs, samples)
    answered = [[row + label for label in LABELS[sample]] for row, sample in zip(ids, samples, strict=True)]
    return label_log_likelihoods(model, label_prompts(prompts, ids, answered, model.get_model().embed_tokens))


@torch.no_grad()
def plain(model: Any, inputs: dict[str, Tensor], sample: int, answer: list[int], cut: int = 0) -> tuple[float, bool]:
    """(log-likelihood, greedy) of an answer by one forward of its own: upstream's embeddings, the exemplar put in by
    hand. `cut`: question tokens that `answer` replaces."""
    ids = torch.tensor([IMAGE + QUESTIONS[sample][: len(QUESTIONS[sample]) - cut] + answer])
    _, _, _, _, embeds, _ = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, inputs["images"][[sample]]
    )
    after_image = embeds.shape[1] - (ids.shape[1] - len(IMAGE))
    exemplar = model.vitask_connector(inputs["tsm_features"][[sample]])[:, : EXEMPLARS[sample]]
    embeds = torch.cat([embeds[:, :after_image], exemplar, embeds[:, after_image:]], dim=1)
    logits = model(inputs_embeds=embeds).logits[0, -len(answer) - 1 : -1].double()
    wanted = torch.tensor(answer)
    likely = logits.log_softmax(-1).gather(-1, wanted[:, None]).sum()
    return float(likely), bool((logits.argmax(-1) == wanted).all())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("samples", [[0], [1], [2, 0, 1], [1, 1, 2]])
def test_scores_are_those_of_one_forward_per_label(
    samples: list[int], attention: str, model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    for scores, sample in zip(scored(model, inputs, samples), samples, strict=True):
        expected = [plain(model, inputs, sample, label)[0] for label in LABELS[sample]]
        assert scores.log_likelihoods.tolist() == pytest.approx(expected, rel=1e-5)
        assert max(expected) < -1  # there is something to compare


def test_the_exemplar_counts(model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with_exemplar = scored(model, inputs, [0])[0].log_likelihoods
    monkeypatch.setitem(EXEMPLARS, 0, 0)
    assert (scored(model, inputs, [0])[0].log_likelihoods - with_exemplar).abs().max() > 1e-2


@pytest.mark.parametrize("at_once", [1, 3])
def test_logits_a_few_tokens_at_a_time_give_the_same(
    at_once: int, model: Any, inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    hook = model.lm_head.register_forward_hook(lambda *arguments: sizes.append(arguments[-1].shape[0]))
    together = scored(model, inputs, [0, 1, 2])
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", at_once)
    parts = scored(model, inputs, [0, 1, 2])
    hook.remove()
    tokens = sum(len(label) for labels in LABELS for label in labels)
    assert sizes[0] == tokens
    assert max(sizes[1:]) == at_once
    assert sum(sizes[1:]) == tokens
    for one, other in zip(together, parts, strict=True):
        assert torch.allclose(one.log_likelihoods, other.log_likelihoods, rtol=1e-6)
        assert torch.equal(one.greedy, other.greedy)


def test_greedy_is_what_generation_would_say(model: Any, inputs: dict[str, Tensor]) -> None:
    prompts, ids = prompts_of(model, inputs, [0])
    said = model.vitask_generate(prompts, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[
        0
    ].tolist()
    labels = [said, said[:2], [said[0], said[1] + 1], [said[0] + 1, *said[1:]]]
    answered = [[ids[0] + label for label in labels]]
    (scores,) = label_log_likelihoods(model, label_prompts(prompts, ids, answered, model.get_model().embed_tokens))
    assert scores.greedy.tolist() == [True, True, False, False]
    assert [plain(model, inputs, 0, label)[1] for label in labels] == [True, True, False, False]


def test_a_label_that_changes_the_prompts_last_tokens_starts_where_the_ids_part(
    model: Any, inputs: dict[str, Tensor]
) -> None:
    prompts, ids = prompts_of(model, inputs, [0])
    answered = [[[*ids[0][:-1], 99, 81, END], [*ids[0], 80, END]]]
    (scores,) = label_log_likelihoods(model, label_prompts(prompts, ids, answered, model.get_model().embed_tokens))
    # All labels of a question are scored from the same place on.
    expected = [plain(model, inputs, 0, answer, cut=1)[0] for answer in ([99, 81, END], [QUESTIONS[0][-1], 80, END])]
    assert scores.log_likelihoods.tolist() == pytest.approx(expected, rel=1e-5)


def test_text_is_put_behind_the_pool() -> None:
    pool, table = torch.randn(3, 4), torch.randn(9, 4)
    grown, places = with_text(pool, [[5, 6], [], [5]], lambda ids: table[ids])
    assert torch.equal(grown, torch.cat([pool, table[[5, 6, 5]]]))
    assert [place.tolist() for place in places] == [[3, 4], [], [5]]
