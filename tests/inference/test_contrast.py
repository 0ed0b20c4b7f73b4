"""Contrastive decoding against its definition: one plain forward per view and token, alone and unpadded."""

import json

import pytest
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList

from vitask_plugin.inference.contrast import ContrastLogits, ContrastModel, blind_prompts, both, without_image
from vitask_plugin.inference.scoring import label_log_likelihoods, label_prompts

WEIGHT = 0.7
NEW_TOKENS = 6
LABELS = ("rising stripes.", "vertical stripes.", "stripes.")
# Two questions of other lengths after the same system text; the image stands first.
QUESTIONS = ("Analyze the given drawn texture image.", "Analyze the image. The possible diagnoses are: stripes.")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint):
    from vitask_plugin.llava.loading import load

    found = load(tiny_checkpoint)
    with torch.no_grad():  # random weights of the usual 0.02 would hardly look at the image
        for parameter in [*found.model.model.layers.parameters(), *found.model.model.mm_projector.parameters()]:
            if parameter.ndim > 1:
                parameter.mul_(8)
    return found


@pytest.fixture(scope="module")
def asked(loaded, drawn_data):
    """Per prompt: token ids, and the image's pixels."""
    from llava.mm_utils import process_images, tokenizer_image_token

    samples = json.loads((drawn_data / "test.json").read_text())
    ids = [tokenizer_image_token(f"USER: <image>\n{text} ASSISTANT:", loaded.tokenizer) for text in QUESTIONS]
    images = [Image.open(drawn_data / "images" / sample["image"]) for sample in samples[: len(ids)]]
    return ids, process_images(images, loaded.image_processor, loaded.model.config)


def plain_logits(loaded, ids, image, answer):
    """[V] logits of the next token after prompt and answer, given an image or none, by one forward of the LLM."""
    model = loaded.model
    parts = []
    for token in [*ids, *answer]:
        if token >= 0:
            parts.append(model.get_model().embed_tokens.weight[token][None])
        elif image is not None:
            parts.append(model.encode_images(image[None])[0])
    hidden = model.model(inputs_embeds=torch.cat(parts)[None], use_cache=False).last_hidden_state
    return model.lm_head(hidden[0, -1]).double()


def contrasted_logits(loaded, ids, image, answer, weight):
    seen = plain_logits(loaded, ids, image, answer)
    return seen + weight * (seen - plain_logits(loaded, ids, None, answer))


def prompts_of(loaded, asked):
    ids, pixels = asked
    rows = [torch.tensor(row) for row in ids]
    mask = [torch.ones_like(row) for row in rows]
    return loaded.model.vitask_prompts(
        pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True), pixels
    )


def generated(loaded, asked, weight):
    embed = loaded.model.get_model().embed_tokens
    seen = prompts_of(loaded, asked)
    prompts = both(seen, blind_prompts(asked[0], seen.pool, embed))
    found = loaded.model.vitask_generate(
        prompts,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        logits_processor=LogitsProcessorList([ContrastLogits(weight)]),
    )
    assert torch.equal(found[: len(asked[0])], found[len(asked[0]) :])
    return found[: len(asked[0])].tolist()


@torch.no_grad()
def test_generated_text_is_that_of_the_definition(loaded, asked):
    end = loaded.model.generation_config.eos_token_id
    for weight in (0.0, WEIGHT, 3.0):
        expected = []
        for ids, image in zip(*asked, strict=True):
            answer = []
            for _ in range(NEW_TOKENS):
                logits = contrasted_logits(loaded, ids, image, answer, weight)
                logits[end] = -torch.inf
                answer.append(int(logits.argmax()))
            expected.append(answer)
        assert generated(loaded, asked, weight) == expected, weight


@torch.no_grad()
def test_a_weight_changes_the_answer_and_none_is_plain_decoding(loaded, asked):
    plain = loaded.model.vitask_generate(
        prompts_of(loaded, asked), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False
    ).tolist()
    assert generated(loaded, asked, 0.0) == plain
    assert generated(loaded, asked, 3.0) != plain


@torch.no_grad()
def test_label_likelihoods_are_those_of_the_definition(loaded, asked):
    embed = loaded.model.get_model().embed_tokens
    labels = [loaded.tokenizer(label, add_special_tokens=False).input_ids for label in LABELS]
    ids = asked[0]
    answered = [[[*prompt, *label] for label in labels] for prompt in ids]
    seen = prompts_of(loaded, asked)
    blind = blind_prompts(ids, seen.pool, embed)
    texts = [[without_image(row) for row in rows] for rows in answered]
    model = ContrastModel(loaded.model, label_prompts(blind, [without_image(row) for row in ids], texts, embed), WEIGHT)
    found = label_log_likelihoods(model, label_prompts(seen, ids, answered, embed))
    plain = label_log_likelihoods(loaded.model, label_prompts(seen, ids, answered, embed))
    for prompt, image, scores, unlike in zip(*asked, found, plain, strict=True):
        for number, label in enumerate(labels):
            total, greedy = 0.0, True
            for place, token in enumerate(label):
                logits = contrasted_logits(loaded, prompt, image, label[:place], WEIGHT)
                total += float(logits.log_softmax(dim=-1)[token])
                greedy &= int(logits.argmax()) == token
            assert float(scores.log_likelihoods[number]) == pytest.approx(total, rel=1e-4)
            assert bool(scores.greedy[number]) == greedy
            assert abs(float(scores.log_likelihoods[number] - unlike.log_likelihoods[number])) > 1e-2
