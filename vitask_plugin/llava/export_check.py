"""Do a checkpoint and what was exported from it give the same scores? Asked of both before anything is published.

I drawn images, K labels. Each label is scored by a plain forward of its own, of the model itself and of nothing of
ours, from the image file's pixels and the question's text on: prompts, images and weights are all in it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.mm_utils import process_images
from PIL import Image
from torch import Tensor

from vitask_plugin.data.instructions import DRAWN, instruction, response
from vitask_plugin.errors import VITaskError
from vitask_plugin.llava.chat_template import message, question, upstream_ids
from vitask_plugin.llava.loading import Loaded
from vitask_plugin.method.branches import common

BOUND = 1e-4  # nats, in float32
_SIZES = ((640, 480), (375, 500))  # of photographs: neither is square
_QUESTION = instruction(DRAWN.modality, DRAWN.choices)
_ANSWERS = tuple(response(DRAWN.choices, label) for label in range(len(DRAWN.choices)))


class Scores(NamedTuple):
    """Of a model.

    Attributes:
        log_likelihoods: [I, K] float32 of each label at each image, summed over its tokens, end included (nats).
        ids: per image and label, the prompt's token ids, one per image however many the model makes of it.
        added: the largest probability that tokens which the checkpoint does not have were given.
    """

    log_likelihoods: Tensor
    ids: list[list[int]]
    added: float


@dataclass(frozen=True)
class Compared:
    """Attributes: difference: the largest of any label's log-likelihoods (nats); added: see `Scores`."""

    difference: float
    added: float


def drawn_images() -> list[Image.Image]:
    """The I images, RGB: smooth colours with noise, the same at any time."""
    generator = np.random.default_rng(0)
    images = []
    for width, height in _SIZES:
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + generator.normal(0, 12, smooth.shape)
        images.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    return images


@torch.no_grad()
def checkpoint_scores(loaded: Loaded, conversation: Conversation, image_token: int) -> Scores:
    """The scores of a LLaVA checkpoint, by upstream's prompts, images and forward.

    Args:
        image_token: the id that stands for an image in `Scores.ids`.
    """
    model, config = loaded.model, loaded.model.config
    asked = question(_QUESTION, 1, start_end=getattr(config, "mm_use_im_start_end", False))
    likely, all_ids = [], []
    for image in drawn_images():
        pixels = process_images([image], loaded.image_processor, config).to(model.device, model.dtype)
        open_ids = upstream_ids(conversation, loaded.tokenizer, asked, image_token)
        for answer in _ANSWERS:
            ids = upstream_ids(conversation, loaded.tokenizer, asked, image_token, answer)
            row = torch.tensor([ids], device=model.device)
            row = row.where(row != image_token, IMAGE_TOKEN_INDEX)
            logits = model(input_ids=row, images=pixels, image_sizes=[image.size], use_cache=False).logits[0]
            likely.append(_log_likelihood(logits, ids[common(open_ids, ids) :], logits.shape[-1])[0])
            all_ids.append(ids)
    return Scores(torch.tensor(likely).view(len(_SIZES), -1), all_ids, 0.0)


@torch.no_grad()
def exported_scores(model: Any, processor: Any, words: int) -> Scores:
    """The scores of a `LlavaForConditionalGeneration`, by its processor and chat template.

    Args:
        words: size of the checkpoint's own vocabulary, over which probabilities are taken.
    """
    likely, all_ids, added = [], [], 0.0
    for image in drawn_images():
        chat = message(_QUESTION, [image])
        [open_ids] = _inputs(processor, chat, add_generation_prompt=True)["input_ids"].tolist()
        for answer in _ANSWERS:
            reply = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            inputs = _inputs(processor, [*chat, reply]).to(model.device)
            [ids] = inputs["input_ids"].tolist()
            logits = model(**inputs.to(dtype=model.dtype), use_cache=False).logits[0]
            score, given = _log_likelihood(logits, ids[common(open_ids, ids) :], words)
            likely.append(score)
            all_ids.append(list(_collapsed(ids, model.config.image_token_id)))
            added = max(added, given)
    return Scores(torch.tensor(likely).view(len(_SIZES), -1), all_ids, added)


def compare(expected: Scores, found: Scores, what: str | Path) -> Compared:
    """How far the scores of checkpoint and export are apart.

    Raises:
        VITaskError: other tokens, or a difference of more than `BOUND`.
    """
    if expected.ids != found.ids:
        raise VITaskError(
            f"the export of {str(what)!r} reads a question as other tokens than the checkpoint, so it would answer "
            "another one; nothing was written: report the checkpoint's tokenizer"
        )
    difference = (expected.log_likelihoods - found.log_likelihoods).abs().max().item()
    if not difference <= BOUND:
        raise VITaskError(
            f"the export of {str(what)!r} scores labels {difference:.2g} nats from the checkpoint, where {BOUND:g} is "
            "rounding, so it is another model; nothing was written: report the checkpoint's config.json"
        )
    return Compared(difference, found.added)


def load_exported(folder: str | Path, device: str | torch.device) -> tuple[Any, Any]:
    """Model (float32) and processor, as anybody's `from_pretrained` makes them.

    Raises:
        VITaskError: weights that are missing, or that the model has no place for.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, found = AutoModelForImageTextToText.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    wrong = sorted({*found["missing_keys"], *found["unexpected_keys"], *map(str, found["mismatched_keys"])})
    if wrong:
        raise VITaskError(f"the exported weights do not fit transformers' LLaVA ({wrong[0]!r}); nothing was written")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def _inputs(processor: Any, chat: list[dict[str, Any]], *, add_generation_prompt: bool = False) -> Any:
    return processor.apply_chat_template(
        chat, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True, return_tensors="pt"
    )


def _log_likelihood(logits: Tensor, answer: list[int], words: int) -> tuple[float, float]:
    """That of the last tokens, and the largest probability there of tokens from `words` on.

    Args:
        logits: [positions, V].
    """
    where = logits[-len(answer) - 1 : -1].float()
    own = where[:, :words].log_softmax(dim=-1)
    likely = own.gather(-1, torch.tensor(answer, device=own.device)[:, None]).sum().item()
    return likely, where.softmax(dim=-1)[:, words:].sum(dim=-1).max().item()


def _collapsed(ids: list[int], image: int) -> Iterator[int]:
    """The ids with one for each row of image tokens."""
    for before, token in zip([None, *ids], ids, strict=False):
        if not before == token == image:
            yield token
