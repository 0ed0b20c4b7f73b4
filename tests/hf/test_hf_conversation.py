"""Where the prefix ends and which tokens are learnt, in the chat template of each family."""

import copy
from types import SimpleNamespace

import pytest
import torch
from hf_models import INSTALLED, SIZES, picture, turns

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.conversation import Template, joined
from vitask_plugin.hf.tiny import FAMILIES
from vitask_plugin.hf.tiny_templates import CHATS
from vitask_plugin.method.branches import IGNORE

pytestmark = pytest.mark.compat

QUESTION, ANSWER = "What is this texture?", "falling stripes."
# What stands between the last image token and the question.
CLOSES = {
    **{"llava": "\n", "mistral_window": "\n", "llava_onevision": "\n", "internvl": "</img>\n"},
    **dict.fromkeys(("qwen2_5_vl", "qwen3_vl", "qwen3_5"), "<|vision_end|>"),
    **{"gemma3": "<end_of_image>\n\n", "paligemma": "<bos>"},
}
# What ends an answer in the template; LLaVA's has nothing, and only the last answer is given the tokenizer's end.
ENDS = {family: CHATS[family].ends[0] for family in CLOSES if family not in ("llava", "mistral_window", "paligemma")}


@pytest.fixture(params=INSTALLED)
def tiny(request, tiny_hf):
    return tiny_hf(request.param)


def learnt(tiny, found) -> list[list[int]]:
    """Token ids of each run of labels."""
    runs, before = [], False
    for token, label in zip(found.ids.tolist(), found.labels.tolist(), strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE and not before:
            runs.append([])
        if label != IGNORE:
            runs[-1].append(token)
        before = label != IGNORE
    return runs


def expected(tiny, *answers: str) -> list[list[int]]:
    tokenizer = tiny.template.tokenizer

    def words(answer: str, last: bool) -> list[int]:
        if tiny.family in ENDS:
            text = answer + ENDS[tiny.family]
        elif tiny.family == "paligemma":
            text = answer + tokenizer.eos_token
        else:
            text = f" {answer}" + (tokenizer.eos_token if last else "")
        return tokenizer(text, add_special_tokens=False).input_ids

    return [words(answer, number == len(answers) - 1) for number, answer in enumerate(answers)]


@pytest.mark.parametrize("size", SIZES[:3], ids=lambda size: f"{size[0]}x{size[1]}")
def test_prefix_ends_behind_what_closes_the_image(tiny, size):
    found = tiny.template.encode(turns(f"<image>\n{QUESTION}", ANSWER), [picture(*size)])
    tokenizer = tiny.template.tokenizer
    images = (found.ids == tiny.config.image_token_id).nonzero().flatten()
    assert tokenizer.decode(found.ids[images[-1] + 1 : found.end]) == CLOSES[tiny.family]
    assert tokenizer.decode(found.ids[found.end :]).startswith(QUESTION)
    assert (found.labels[: found.end] == IGNORE).all()
    assert learnt(tiny, found) == expected(tiny, ANSWER)


def test_image_tokens_of_several_sizes(tiny):
    counts = {
        int(
            (tiny.template.encode(turns("<image>\nQ?", "A."), [picture(*size)]).ids == tiny.config.image_token_id).sum()
        )
        for size in SIZES
    }
    assert (len(counts) > 1) == (tiny.family in ("llava_onevision", "internvl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"))


@pytest.mark.parametrize("word", ["<image>\nWhat?", "What?\n<image>", "<image>What?", "Look: <image> What?"])
def test_the_image_comes_first_wherever_it_is_written(tiny, word):
    found = tiny.template.encode(turns(word, "A."), [picture(28, 28)])
    text = word.replace("<image>", "").strip()
    assert tiny.template.tokenizer.decode(found.ids[found.end :]).startswith(text)


def without_chat(family: str) -> bool:
    return family == "paligemma"  # one question, one answer


def test_several_turns(tiny):
    if without_chat(tiny.family):
        pytest.skip("no turns")
    conversation = turns(f"<image>\n{QUESTION}", ANSWER, "Are you sure?", ANSWER, "Why?", "It is  so.\nYes!")
    found = tiny.template.encode(conversation, [picture(28, 56)])
    assert learnt(tiny, found) == expected(tiny, ANSWER, ANSWER, "It is  so.\nYes!")
    assert tiny.template.tokenizer.decode(found.ids[found.end :]).startswith(QUESTION)


def test_answer_before_the_image(tiny):
    if without_chat(tiny.family):
        pytest.skip("no turns")
    found = tiny.template.encode(turns("Hello.", "Good day.", "<image>\nWhat?", ANSWER), [picture(28, 56)])
    assert learnt(tiny, found) == expected(tiny, "Good day.", ANSWER)
    assert tiny.template.tokenizer.decode(found.ids[found.end :]).startswith("What?")
    assert (found.labels[: found.end] != IGNORE).any()


def test_text_alone(tiny):
    if without_chat(tiny.family):
        with pytest.raises(VITaskError, match=r"does not take text without an image .* leave such samples out"):
            tiny.template.encode(turns("Hello.", ANSWER), [])
        return
    found = tiny.template.encode(turns("Hello.", ANSWER), [])
    assert found.end == 0 and learnt(tiny, found) == expected(tiny, ANSWER)
    assert not any("pixel" in name for name in found.inputs)


def test_begins_once(tiny):
    found = tiny.template.encode(turns("<image>\nQ?", "A."), [picture(28, 28)])
    bos = tiny.template.tokenizer.bos_token_id
    assert bos is None or int((found.ids == bos).sum()) == (
        tiny.family in ("llava", "mistral_window", "gemma3", "paligemma")
    )


def test_an_image_token_in_words_is_not_taken_for_a_word_of_the_template(tiny):
    """A question that repeats an answer, and an answer that the template's own words are in."""
    words = "user\nassistant\nASSISTANT: model"
    found = tiny.template.encode(turns(f"<image>\n{words}", words), [picture(28, 28)])
    assert learnt(tiny, found) == expected(tiny, words)


def test_as_the_processor_is_asked_by_others(tiny):
    """The tokens are those of transformers' own way with a chat, and the end token where the template has none."""
    if tiny.family == "paligemma":
        pytest.skip("its processor appends a line of its own")
    image = picture(56, 28)
    chat = [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    stock = tiny.processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    found = tiny.template.encode(turns(f"<image>\n{QUESTION}", ANSWER), [image])
    stop = int((found.labels != IGNORE).nonzero()[-1]) + (tiny.family in ENDS)
    assert found.ids[:stop].tolist() == stock["input_ids"][0, :stop].tolist()
    for name in found.inputs:
        if name.startswith(("pixel", "image")):
            assert torch.equal(found.inputs[name], stock[name])


def test_joined_inputs_are_those_of_the_processor(tiny):
    """Samples encoded one by one, put together, are what the processor makes of all of them."""
    samples = [tiny.template.encode(turns("<image>\nQ?", "A."), [picture(*size, seed=1)]) for size in SIZES]
    texts = [tiny.template.answers([*_messages("Q?", "A.")])[0]] * len(SIZES)
    images = [[picture(*size, seed=1)] for size in SIZES]
    own = {"add_special_tokens": False} if tiny.template._begins_itself(texts[0]) else {}
    stock = tiny.processor(text=texts, images=images, return_tensors="pt", padding=True, padding_side="right", **own)
    found = joined([sample.inputs for sample in samples], stock["input_ids"].shape[1])
    assert found.keys() == stock.keys() - {"input_ids", "attention_mask", "labels"}
    for name, value in found.items():
        assert torch.equal(value, stock[name]), name


def _messages(question: str, answer: str):
    from vitask_plugin.hf.conversation import messages_of

    return messages_of(turns(f"<image>\n{question}", answer))


# Bad templates


def changed(tiny, **changes) -> Template:
    """The family's template, with another chat template or another tokenizer."""
    processor = copy.deepcopy(tiny.processor)
    for name, value in changes.items():
        setattr(processor, name, value)
        if name == "chat_template":
            processor.tokenizer.chat_template = value
    return Template(processor, tiny.config.image_token_id, "the/model")


QWEN = CHATS["qwen3_vl"].template
BAD = {
    "none": (None, "'the/model' has no chat template"),
    "no answers": (
        "{% for m in messages if m.role == 'user' %}{{ m.content[-1].text }}{% endfor %}",
        "writes no turn of the assistant",
    ),
    "no image": (QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", ""), "writes no image token"),
    "another image token": (
        QWEN.replace("<|vision_start|><|image_pad|><|vision_end|>", "Picture: "),
        "its own (chat )?template",  # the processor of transformers 5 refuses it itself
    ),
    "thoughts that are left out of the history": (
        # As reasoning models do: an answer is written with its thoughts only while it is the last one.
        QWEN.replace(
            "{{- '<|im_start|>' + message.role + '\n' }}",
            "{{- '<|im_start|>' + message.role + '\n' }}"
            "{%- if message.role == 'assistant' and loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
        ),
        "writes the same turn otherwise when the conversation goes on",
    ),
    "no start of an answer": (
        QWEN[: QWEN.index("{%- if add_generation_prompt")],
        r"does not begin the assistant's turn .*'<\|im_start\|>assistant' would be learnt",
    ),
    "refuses": ("{{ raise_exception('only system messages') }}", "only system messages"),
    "broken": (
        "{% for %}",
        "the chat template of 'the/model' does not take the turns user, assistant .*Expected an expr",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_template_that_cannot_be_learnt_from_is_refused(case, tiny_hf):
    template, message = BAD[case]
    with pytest.raises(VITaskError, match=message) as error:
        found = changed(tiny_hf("qwen3_vl"), chat_template=template)
        found.encode(turns("<image>\nA?", "One.", "B?", "Two."), [picture(28, 28)])
    assert "\n" not in str(error.value)


def test_a_template_that_the_tokenizer_alone_has(tiny_hf):
    tiny = tiny_hf("internvl")
    processor = copy.deepcopy(tiny.processor)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    conversation, image = turns(f"<image>\n{QUESTION}", ANSWER), [picture(28, 28)]
    found = Template(processor, tiny.config.image_token_id, "the/model").encode(conversation, image)
    assert torch.equal(found.labels, tiny.template.encode(conversation, image).labels)


def test_a_slow_tokenizer_is_refused(tiny_hf):
    tiny = tiny_hf("llava")
    slow = SimpleNamespace(is_fast=False, chat_template="x")
    with pytest.raises(VITaskError, match="'the/model' is a slow one"):
        Template(SimpleNamespace(tokenizer=slow, chat_template=tiny.processor.chat_template), 1, "the/model")


def test_every_family_was_tried():
    assert set(INSTALLED) >= set(FAMILIES) and set(CLOSES) >= set(INSTALLED)
