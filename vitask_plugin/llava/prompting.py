"""A question with images as upstream puts it: conversation template, image tokens, pixels."""

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation, conv_templates
from llava.mm_utils import process_images, tokenizer_image_token
from PIL import Image

DEFAULT_TEMPLATE = "vicuna_v1"
TEMPLATES: dict[str, Conversation] = conv_templates


def trained_template(version: str | None) -> str:
    """The name of the template of a training run; `version`: its `--version`, None if the checkpoint does not tell."""
    # Upstream's script takes its default for v0, v0.5 and what it does not know.
    return version if version in conv_templates and version != "v0" else DEFAULT_TEMPLATE


def prompt_ids(
    template: Conversation, tokenizer: Any, text: str, *, images: int, answer: str | None = None, marked: bool = False
) -> list[int]:
    """Token ids of the conversation, up to where the answer starts, or with `answer` and its end token.

    Args:
        images: that many come first, unless the text itself says where. marked: with `mm_use_im_start_end`.
    """
    token = DEFAULT_IMAGE_TOKEN
    if token not in text:
        text = f"{token}\n" * images + text
    if marked:
        text = text.replace(token, DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN)
    conversation = template.copy()
    conversation.append_message(conversation.roles[0], text)
    conversation.append_message(conversation.roles[1], answer)
    return tokenizer_image_token(conversation.get_prompt(), tokenizer)


def pixels_of(images: Sequence[Image.Image], processor: Any, config: Any, like: torch.Tensor) -> Any:
    """Of the images, as upstream prepares them; dtype and device are those of `like`."""
    pixels = process_images(list(images), processor, config)
    if isinstance(pixels, list):
        return [image.to(like.device, like.dtype) for image in pixels]
    return pixels.to(like.device, like.dtype)
