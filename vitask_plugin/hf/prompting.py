"""A question with images as the model's own template and processor put it, up to where the answer starts.

The processor runs once for each question's images. What follows them is text, whose tokens are the tokenizer's: a
prompt, and the same prompt with an answer, begin with the same tokens up to the end of the images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.instructions import question_text
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.conversation import TEXT, Template, messages_of

_ANSWER = {"from": "gpt", "value": "A word."}


@dataclass(frozen=True)
class Question:
    """A question in tokens.

    Attributes:
        turn: LLaVA's form of it.
        prefix: [P] int64, image tokens expanded: up to behind the images and what closes them; of text its first token.
        end: P, or 0 without an image.
        text: token ids of what follows, up to where the answer starts.
        begins: token ids of what precedes `text` where images are not expanded.
        inputs: what else the processor made of the prefix, as the model takes it.
    """

    turn: dict[str, str]
    prefix: Tensor
    end: int
    text: list[int]
    begins: list[int]
    inputs: dict[str, Tensor]


class Prompter:
    """Puts questions in tokens as training puts them: the images come first in their turn.

    Args:
        template: of the model.
    """

    def __init__(self, template: Template) -> None:
        self.template = template

    def ask(self, text: str, images: Sequence[Image.Image]) -> Question:
        """A question about images, or about nothing but itself.

        Raises:
            VITaskError: the processor changes the text behind the images.
        """
        template = self.template
        words = question_text(text)
        turn = {"from": "human", "value": f"{IMAGE_TOKEN}\n" * len(images) + words}
        rendered = template.render(messages_of([turn]), asks=True)
        prompt = template.words(rendered)
        if not images:
            inputs = _others(template.process(rendered, []), 1)
            return Question(turn, torch.tensor(prompt[:1]), 0, prompt[1:], prompt[:1], inputs)
        found = template.encode([turn, _ANSWER], images)
        whole = template.words(template.answers(messages_of([turn, _ANSWER]))[0])
        start = len(whole) - (len(found.ids) - found.end)
        if whole[start:] != found.ids[found.end :].tolist() or whole[:start] != prompt[:start]:
            raise VITaskError(
                f"the processor of {template.name!r} changes the text behind an image, so VITask cannot tell where an "
                "answer to it would start; evaluate this model with lmms-eval's own adapter"
            )
        inputs = _others(found.inputs, found.end)
        return Question(turn, found.ids[: found.end], found.end, prompt[start:], prompt[:start], inputs)

    def answered(self, question: Question, answer: str) -> list[int]:
        """Token ids of `question.text`, the answer and its end token, as one text (as in training).

        Raises:
            VITaskError: the answer changes what precedes the question.
        """
        turns = [question.turn, {"from": "gpt", "value": answer}]
        text, spans = self.template.answers(messages_of(turns))
        ids = self.template.words(text, spans[-1][1])
        start = len(question.begins)
        if ids[:start] != question.begins:
            raise VITaskError(
                f"the chat template of {self.template.name!r} writes another beginning before the answer {answer!r} "
                "than before none; give a template with generation turns"
            )
        return ids[start:]


def _others(inputs: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """What is not text; of each token there is as much as of the first `length` ones."""
    found = {name: value for name, value in inputs.items() if name not in TEXT}
    return {name: value[:, :length] if name.endswith("token_type_ids") else value for name, value in found.items()}


def as_inputs(inputs: dict[str, Tensor], like: Tensor) -> dict[str, Any]:
    """The processor's tensors on the model's device, pixels in its dtype."""
    return {name: as_input(value, like) for name, value in inputs.items()}


def as_input(value: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device of `like`, numbers in its dtype, token ids as they are."""
    return value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
