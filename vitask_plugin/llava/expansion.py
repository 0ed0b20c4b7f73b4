"""Where upstream's expansion of image tokens puts each token of a batch, without running it."""

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from torch import Tensor

from vitask_plugin.method.layout import Row, cut_row


def expanded_rows(
    input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, image_tokens: int, limit: int
) -> tuple[list[Row], int, Tensor]:
    """The rows as upstream's `prepare_inputs_labels_for_multimodal` lays them out, without running it; W; and labels.

    Args:
        input_ids, labels: [R, T]. attention_mask: [R, T] bool, False on pads.
        image_tokens: tokens of one image.
        limit: upstream's `tokenizer_model_max_length`; what is behind it is cut.

    Returns:
        Rows, W, and the labels [R, T] with `IGNORE_INDEX` where they are cut off: the loss is not divided by those.
    """
    pieces, kept = [], labels.clone()
    for number, valid in enumerate(attention_mask.bool()):
        ids, row_labels = input_ids[number, valid], labels[number, valid]
        repeats = torch.where(ids == IMAGE_TOKEN_INDEX, image_tokens, 1)
        source = torch.repeat_interleave(torch.arange(len(ids)), repeats)
        source, behind = source[:limit], source[limit:]
        kept[number, valid.nonzero().squeeze(-1)[behind]] = IGNORE_INDEX
        is_image = ids[source] == IMAGE_TOKEN_INDEX
        pieces.append((ids[source], is_image, row_labels[source].masked_fill(is_image, IGNORE_INDEX)))
    width = max(len(ids) for ids, *_ in pieces)
    return [cut_row(number * width, *piece) for number, piece in enumerate(pieces)], width, kept
