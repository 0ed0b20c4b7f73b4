"""A conversation as the model's own chat template and processor write it, and which of its tokens are answers.

Characters of the template's text are followed into tokens by the tokenizer's offsets, so that labels come from the
template's turns and never from a guess about the tokens.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from PIL import Image
from torch import Tensor

from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.instructions import question_text
from vitask_plugin.errors import VITaskError
from vitask_plugin.method.branches import IGNORE

# Stand for two questions: the template's text up to where they part is what stands before any question.
_SENTINELS = ("\ue000", "\ue001")
TEXT = ("input_ids", "attention_mask", "offset_mapping")


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens, its image tokens expanded.

    Attributes:
        ids: [T] int64. labels: [T], `IGNORE` where no answer is learnt.
        end: where its prefix ends: behind the image and what closes it, before the instruction; 0 without an image.
        inputs: what else the processor made, as the model takes it (pixels, grids, token types).
    """

    ids: Tensor
    labels: Tensor
    end: int
    inputs: dict[str, Tensor] = field(default_factory=dict)


def messages_of(turns: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
    """LLaVA's `conversations` as chat messages; the image comes first in its turn, as upstream puts it."""
    messages = []
    for turn in turns:
        if turn["from"] == "gpt":
            messages.append({"role": "assistant", "content": [{"type": "text", "text": turn["value"]}]})
            continue
        images = turn["value"].count(IMAGE_TOKEN)
        text = question_text(turn["value"])
        messages.append({"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]})
    return messages


class Template:
    """The chat template of a processor.

    Args:
        processor: of the model, with a fast tokenizer. image_id: the id of an expanded image token.
        name: of the model, for messages.

    Raises:
        VITaskError: no template, no turns to learn an answer from, no place for an image, or a tokenizer that does not
            say which characters its tokens are of.
    """

    def __init__(self, processor: Any, image_id: int, name: str) -> None:
        self.processor, self.tokenizer, self.name = processor, processor.tokenizer, name
        self.image_id = image_id
        self._starts: dict[tuple, int] = {}
        own = getattr(processor, "chat_template", None)
        # None: the processor's own; it does not look at the tokenizer's.
        self._chat_template = self.tokenizer.chat_template if own is None else None
        if own is None and self._chat_template is None:
            raise VITaskError(
                f"the model in {name!r} has no chat template, so nothing says where its turns begin and end; give a "
                "model that was tuned for conversations, or put a chat_template.jinja beside it"
            )
        if not self.tokenizer.is_fast:
            raise VITaskError(
                f"the tokenizer of {name!r} is a slow one, which does not say which characters a token is of; install "
                "tokenizers, or give a model with a tokenizer.json"
            )
        question = {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat is it?"}
        text, spans = self.answers(messages_of([question, {"from": "gpt", "value": "A word."}]))
        if not spans or "A word." not in text[slice(*spans[0])]:
            raise VITaskError(
                f"the chat template of {name!r} writes no turn of the assistant that could be learnt; give a model "
                "that was tuned for conversations"
            )
        self._check_asks(question)
        unseen = VITaskError(
            f"the chat template of {name!r} writes no image token (id {image_id}) for an image, so the model would "
            "not see it; give a vision-language model, and its own template"
        )
        user = messages_of([question])
        if self.render(user) == self.render([{**user[0], "content": user[0]["content"][1:]}]):
            raise unseen
        found = self.encode([question, {"from": "gpt", "value": "A word."}], [Image.new("RGB", (64, 64))])
        if not (found.ids == image_id).any():
            raise unseen

    def _check_asks(self, question: Mapping[str, str]) -> None:
        """Refuses a template that does not begin the assistant's turn when an answer is asked for, and writes something
        in front of the answer all the same: that would be learnt, and scored, as a part of every answer."""
        user, word = messages_of([question]), {"from": "gpt", "value": "A word."}
        asked, answered = self.render(user, asks=True), self.render(messages_of([question, word]))
        before = answered[len(asked) :].partition("A word.")[0].strip()
        if asked == self.render(user) and before:
            raise VITaskError(
                f"the chat template of {self.name!r} does not begin the assistant's turn when it is asked to "
                f"(add_generation_prompt), so that {before!r} would be learnt as a part of each answer; give a "
                "template with generation turns"
            )

    # Text ------------------------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Mapping[str, Any]], *, asks: bool = False) -> str:
        """The conversation as text; `asks`: up to where the next answer starts."""
        try:
            return self.processor.apply_chat_template(
                list(messages), chat_template=self._chat_template, tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message["role"] for message in messages)
            raise VITaskError(
                f"the chat template of {self.name!r} does not take the turns {roles} ({' '.join(str(error).split())}); "
                "give it turns that it takes, user and assistant in turn, or another model"
            ) from None

    def answers(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of a whole conversation, and where in it each answer with its end token starts and stops.

        White space behind an end token belongs to the template. Where a template ends an answer with nothing, the
        tokenizer's end token is put behind the last one, or the model would never learn to stop.
        """
        text, spans = self.render(messages), []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, through = self.render(messages[:number], asks=True), self.render(messages[: number + 1])
            if not (text.startswith(before) and text.startswith(through.rstrip())):
                raise VITaskError(
                    f"the chat template of {self.name!r} writes the same turn otherwise when the conversation goes on, "
                    "so training and inference would ask different questions; give a template with generation turns"
                )
            spans.append((len(before), len(through.rstrip())))
        if spans and spans[-1][1] == len(text.rstrip()):
            text = text.rstrip()
            if text.endswith(messages[-1]["content"][-1]["text"].rstrip()):
                text += self.tokenizer.eos_token
                spans[-1] = (spans[-1][0], len(text))
        return text, spans

    def _question_start(self, messages: Sequence[Mapping[str, Any]], number: int) -> int:
        """Where the words of turn `number` start in the text."""
        key = tuple((one["role"], *(part.get("text", "image") for part in one["content"])) for one in messages[:number])
        key = (*key, len(messages[number]["content"]))
        if key not in self._starts:
            images = messages[number]["content"][:-1]
            one, other = (
                self.render(
                    [*messages[:number], {"role": "user", "content": [*images, {"type": "text", "text": word}]}]
                )
                for word in _SENTINELS
            )
            parts = (place for place, pair in enumerate(zip(one, other, strict=False)) if len({*pair}) > 1)
            self._starts[key] = next(parts, len(one))
        return self._starts[key]

    # Tokens ----------------------------------------------------------------------------------------------------------

    def encode(self, turns: Sequence[Mapping[str, str]], images: Sequence[Image.Image]) -> Encoded:
        """A whole conversation, and the labels of its answers.

        Raises:
            VITaskError: the processor changes the text so that the answers are not found again.
        """
        messages = messages_of(turns)
        text, spans = self.answers(messages)
        found = self.process(text, images)
        offsets = found.pop("offset_mapping")[0]
        ids = found["input_ids"][0]
        with_image = [number for number, one in enumerate(messages) if one["content"][0]["type"] == "image"]
        start = self._question_start(messages, with_image[-1]) if with_image else 0
        longer = int(offsets[:, 1].max()) - len(text)  # by as much the processor has expanded the images' text
        wanted = _compared("".join(text[slice(*span)] for span in spans))
        tried = [(*self._labels(ids, offsets, spans, start, longer - appended), appended) for appended in (0, 1)]
        fitting = [(labels, said, appended) for labels, said, appended in tried if _compared(said) == wanted]
        if not fitting:
            raise VITaskError(
                f"the processor of {self.name!r} changes the text behind an image: the answers "
                f"{[text[slice(*span)] for span in spans]} have become {tried[0][1]!r}; VITask cannot tell which "
                "tokens to learn"
            )
        # Some end the text with a line of their own, behind all that the template wrote: no answer ends with it.
        labels, _, appended = min(fitting, key=lambda one: one[1] != one[1].rstrip())
        longer -= appended
        end = 0
        if with_image:
            images_end = int((ids == self.image_id).nonzero()[-1]) + 1 if (ids == self.image_id).any() else 0
            behind = (offsets[:, 1] > start + longer).nonzero()
            end = max(images_end, int(behind[0]) if len(behind) else len(ids))
        return Encoded(ids, labels, end, {name: value for name, value in found.items() if name not in TEXT})

    def _labels(
        self, ids: Tensor, offsets: Tensor, spans: Sequence[tuple[int, int]], start: int, longer: int
    ) -> tuple[Tensor, str]:
        """Labels [T] of the answers in `spans`, and what they say; answers before the image lie where they did."""
        learnt = torch.zeros_like(ids, dtype=torch.bool)
        for first, stop in spans:
            moved = longer if first > start else 0
            learnt |= (offsets[:, 1] > first + moved) & (offsets[:, 0] < stop + moved) & (offsets[:, 1] > offsets[:, 0])
        said = self.tokenizer.decode(ids[learnt], clean_up_tokenization_spaces=False)
        return torch.where(learnt, ids, IGNORE), said

    def process(self, text: str, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """The processor's tokens of one text, and the inputs of its images."""
        own = {"add_special_tokens": False} if self._begins_itself(text) else {}
        pictures = {"images": [list(images)]} if images else {}
        try:
            found = self.processor(text=[text], **pictures, return_tensors="pt", return_offsets_mapping=True, **own)
        except (ValueError, TypeError) as error:
            what = f"{len(images)} image{'s'[: len(images) != 1]}" if images else "text without an image"
            raise VITaskError(
                f"the processor of {self.name!r} does not take {what} ({error}); leave such samples out, or give "
                "another model, or this one with its own chat template"
            ) from None
        return {name: value for name, value in found.items() if name != "labels"}

    def words(self, text: str, stop: int | None = None) -> list[int]:
        """Token ids of a text as they are where images are not expanded; of those that start before character `stop`
        if it is given."""
        own = {"add_special_tokens": False} if self._begins_itself(text) else {}
        found = self.tokenizer(text, return_offsets_mapping=True, **own)
        if stop is None:
            return found.input_ids
        return [token for token, (start, _) in zip(found.input_ids, found.offset_mapping, strict=True) if start < stop]

    def _begins_itself(self, text: str) -> bool:
        """Whether the template has written the token that the tokenizer would put first."""
        return self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)


def _compared(text: str) -> list[str]:
    """Words in the one form of Unicode that tokenizers may bring them into."""
    return unicodedata.normalize("NFKC", text).split()


def reserved_strings(tokenizer: Any) -> tuple[str, ...]:
    """The tokenizer's special tokens: in the words of a sample they would mean something else."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = [*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)]
    return tuple(dict.fromkeys(string for string in found if string.strip() and string != IMAGE_TOKEN))


def joined(samples: Sequence[Mapping[str, Tensor]], length: int) -> dict[str, Tensor]:
    """The inputs of several samples [1 or more of each] as those of one batch.

    What has one entry per token is padded on the right with 0 to `length`; of all else the samples lie one behind the
    other, padded with 0 where their tiles differ in number.
    """
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        values = [sample[name] for sample in samples if name in sample]
        width = (
            length if name.endswith("token_type_ids") else max((v.shape[1] for v in values if v.ndim > 1), default=0)
        )
        found[name] = torch.cat([_widened(value, width) for value in values])
    return found


def _widened(value: Tensor, width: int) -> Tensor:
    missing = width - value.shape[1] if value.ndim > 1 else 0
    if missing <= 0:
        return value[:, :width] if value.ndim > 1 and missing < 0 else value
    return torch.cat([value, value.new_zeros(value.shape[0], missing, *value.shape[2:])], dim=1)
