"""Free text with shared prefixes equals the answer to each prompt alone, and what is shared is computed once."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.images import to_rgb
from vitask_plugin.method.branches import IGNORE, Continuation, Document, Prompts
from vitask_plugin.method.connector import ExemplarConnector

pytestmark = pytest.mark.compat  # transformers' cache and generate

NEW = {"max_new_tokens": 6, "pad_token_id": 0, "do_sample": False}
FEATURES = 5  # width of the TSM's


@pytest.fixture(scope="module", params=[2, 1], ids=["multi-head", "grouped-query"])
def model(request: pytest.FixtureRequest, tiny_checkpoint) -> Any:
    from vitask_plugin.llava import compat

    compat.prepare()
    from llava.model.language_model.llava_llama import LlavaConfig

    from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM

    torch.manual_seed(0)
    config = LlavaConfig.from_pretrained(tiny_checkpoint, num_key_value_heads=request.param, initializer_range=0.3)
    model = VITaskLlavaLlamaForCausalLM(config).eval()
    model.get_vision_tower().load_model()
    connector = ExemplarConnector("mlp2x_gelu", FEATURES, config.hidden_size)
    model.connect(VITaskArguments(vitask=True, vitask_ep="all", vitask_tsm="tsm"), connector)
    return model


def prompts_of(model: Any) -> Prompts:
    """Three images and a text; two questions about one image, and two prompts that come twice."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.tensor([1, 20, 21, -200]), torch.tensor([1, 40, 41, 42])
    rows = torch.nn.utils.rnn.pad_sequence([image, image, image, text], batch_first=True)
    asked = model.vitask_prompts(
        rows,
        torch.ones_like(rows),
        torch.randn(4, 3, 28, 28, generator=generator),
        tsm_features=torch.randn(4, 3, FEATURES, generator=generator),
        tsm_lengths=torch.tensor([3, 0, 2, 0]),
    )
    texts = torch.randint(50, 200, (12,), generator=generator)
    places = len(asked.pool) + torch.arange(len(texts))
    pool = torch.cat([asked.pool, model.get_model().embed_tokens(texts)])
    documents = []
    for number, own in [(0, places[:4]), (1, places[2:9]), (0, places[:9]), (3, places[:5]), (2, places[1:3])]:
        begin = asked.documents[number]
        question = torch.cat([begin.continuations[0].tokens, own])
        documents.append(Document(begin.prefix, [Continuation(question, torch.full_like(question, IGNORE))]))
    documents += [documents[1], documents[0]]
    return Prompts(pool.detach(), documents)


def places_of(prompts: Prompts) -> list[torch.Tensor]:
    return [torch.cat([one.prefix, one.continuations[0].tokens]) for one in prompts.documents]


def alone(model: Any, embeds: torch.Tensor, **settings: Any) -> list[int]:
    """What transformers' own generate answers to one prompt [positions, D]."""
    from transformers import LlamaForCausalLM

    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    return LlamaForCausalLM.generate(model, inputs_embeds=embeds[None], attention_mask=mask, **settings)[0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_those_of_each_prompt_alone(
    model: Any, beams: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    prompts = prompts_of(model)
    found = model.vitask_generate(prompts, num_beams=beams, **NEW).tolist()
    expected = [alone(model, prompts.pool[places], num_beams=beams, **NEW) for places in places_of(prompts)]
    assert [answer[: len(own)] for answer, own in zip(found, expected, strict=True)] == expected
    assert found[0] == found[6]
    assert len({tuple(answer) for answer in expected}) == 5  # seven prompts, two of them asked twice


def test_sampling_draws_as_without_sharing(model: Any) -> None:
    from transformers import LlamaForCausalLM

    prompts = prompts_of(model)
    settings = {**NEW, "do_sample": True, "temperature": 1.5, "top_k": 20}
    places = places_of(prompts)
    longest = max(map(len, places))
    padded = [torch.nn.functional.pad(prompts.pool[own], (0, 0, longest - len(own), 0)) for own in places]
    mask = torch.stack([torch.arange(longest) >= longest - len(own) for own in places]).long()
    torch.manual_seed(3)
    expected = LlamaForCausalLM.generate(model, inputs_embeds=torch.stack(padded), attention_mask=mask, **settings)
    torch.manual_seed(3)
    found = model.vitask_generate(prompts, **settings)
    assert torch.equal(found, expected)
    assert found[0].tolist() != found[6].tolist()  # the same prompt, two draws


@pytest.fixture
def positions(model: Any) -> Iterator[list[int]]:
    """How many positions each forward of the decoder computes."""
    found: list[int] = []

    def count(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        embeds, ids = kwargs.get("inputs_embeds"), kwargs.get("input_ids")
        found.append(ids.numel() if embeds is None else embeds[..., 0].numel())

    hook = model.model.register_forward_pre_hook(count, with_kwargs=True)
    yield found
    hook.remove()


def test_a_prefix_is_computed_once_and_no_position_twice(model: Any, positions: list[int]) -> None:
    prompts = prompts_of(model)
    same = [prompts.documents[number] for number in (0, 2, 6)]
    model.vitask_generate(Prompts(prompts.pool, same), **{**NEW, "eos_token_id": None})
    texts = [len(one.continuations[0].tokens) for one in same]
    # All but the last token of each prompt, then a token of each prompt at a time.
    assert positions == [len(same[0].prefix) + sum(texts) - 3] + [3] * NEW["max_new_tokens"]
    assert len(same[0].prefix) > sum(texts) / 3


# The harness' requests ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def harness_model(tiny_checkpoint) -> Any:
    from vitask_plugin.evaluation.lmms_llava import VITaskLlava

    return VITaskLlava(str(tiny_checkpoint), batch_size=6, device="cpu")


class Rows(list):
    """Documents of a task without a `vitask` block."""

    column_names = ()


def requests_of(model: Any, images: list[Image.Image], tasks: dict[str, str]) -> list[Any]:
    """Each task asks its question about all images, as the harness hands several tasks on: task by task."""
    from lmms_eval.api.instance import Instance

    made = []
    for task, question in tasks.items():
        model.task_dict[task] = {"test": Rows(SimpleNamespace(image=image) for image in images)}
        made += [
            Instance(
                request_type="generate_until",
                # A copy, as a data set decodes an image anew each time.
                arguments=(question, {"max_new_tokens": 6}, lambda row: [row.image.copy()], number, task, "test"),
                idx=0,
                metadata={"task": task, "doc_id": number, "repeats": 1},
            )
            for number in range(len(images))
        ]
    return made


def noise(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (28, 28, 3), dtype=np.uint8)) for _ in range(count)]


def test_the_questions_of_several_tasks_about_an_image_meet_in_one_batch(harness_model: Any) -> None:
    requests = requests_of(harness_model, noise(5), {"long": "Analyze. " * 5, "short": "Analyze."})
    encoded: list[int] = []
    tower = harness_model.model.get_vision_tower()
    hook = tower.register_forward_pre_hook(lambda _, images: encoded.append(len(images[0])))
    together = harness_model.generate_until(requests)
    hook.remove()
    assert encoded == [3, 2]  # batches of 6 and 4 answers
    assert together == [harness_model.generate_until([request])[0] for request in requests]
    assert len(set(together)) > 2


def test_images_are_the_same_where_both_models_see_the_same() -> None:
    from vitask_plugin.evaluation.lmms_exemplars import Query

    picture = noise(1)[0]
    grey = picture.convert("L")
    transparent = picture.convert("RGBA")
    transparent.putpixel((3, 3), (*picture.getpixel((3, 3)), 0))  # black for both

    def pixels(*images: Image.Image) -> tuple[str, ...]:
        return Query("", [to_rgb(image) for image in images]).pixels

    assert pixels(picture) == pixels(picture.copy()) == pixels(picture.convert("RGBA"))
    assert pixels(grey) == pixels(grey.convert("RGB"))
    assert len({pixels(picture), pixels(grey), pixels(transparent), pixels(picture.resize((14, 56))), pixels()}) == 5
    assert pixels(picture, grey) != pixels(grey, picture)
