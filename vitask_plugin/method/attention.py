"""The mask of the packed layout: one rule, and the form of it that each attention backend takes.

R rows, L positions of a row.
"""

from typing import Any

import torch
from torch import Tensor

from vitask_plugin.errors import VITaskError

DEFAULT = "sdpa"


def visible(query_index: Tensor, key_index: Tensor, key_until: Tensor) -> Tensor:
    """The mask rule: a key is visible iff it is not later than the query and the query is not past the key's `until`.

    `until` is the end of the part of the row that may see the key: of its document for a prefix, of its own
    continuation for a token of one, and of the last continuation that shares it for a shared instruction. As documents,
    and continuations within a document, lie one behind the other, this is "same document, and prefix, shared or own".

    All arguments broadcast against each other; the result is boolean.
    """
    return (key_index <= query_index) & (query_index < key_until)


def additive_mask(until: Tensor, dtype: torch.dtype) -> Tensor:
    """The rule for sdpa and eager: float [R, 1, L, L], 0 where visible, the dtype's minimum elsewhere.

    Float and additive because a boolean mask is silently wrong under the `eager` attention of transformers.
    """
    index = torch.arange(until.shape[1], device=until.device)
    seen = visible(index[:, None], index[None, :], until[:, None, :])
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return mask.masked_fill_(seen, 0.0)[:, None]


def block_mask(until: Tensor, dtype: torch.dtype) -> Any:
    """The rule for FlexAttention: a `BlockMask` over [R, 1, L, L]; blocks that nobody sees are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = until.shape

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(query, key, until[row, key])

    return create_block_mask(rule, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=until.device)


MASKS = {"eager": additive_mask, "sdpa": additive_mask, "flex_attention": block_mask}


def mask(implementation: str | None, until: Tensor, dtype: torch.dtype) -> Any:
    """What a decoder with this `_attn_implementation` takes as attention mask.

    Raises:
        VITaskError: the backend takes no mask of one's own (FlashAttention).
    """
    if implementation not in MASKS:
        raise VITaskError(
            f"attention {implementation!r} takes no shared-prefix mask; load the model with one of {', '.join(MASKS)}"
        )
    return MASKS[implementation](until, dtype)
