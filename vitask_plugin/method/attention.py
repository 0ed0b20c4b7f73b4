"""The mask of the packed layout: one rule, and the form of it that each attention backend takes.

R rows, L positions of a row.
"""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Rule:
    """Who sees whom in the rows of one forward.

    Attributes:
        until: [R, L] see `visible`.
        positions: [R, L] of each token in the sequence that it would stand in alone.
        window: how many positions back a token sees (sliding-window layers); None: all.
        blocks: [R, L] which block of tokens that all see each other it belongs to, such as those of one image; 0: none.
        beyond: whether tokens of a block see each other beyond the window too.
    """

    until: Tensor
    positions: Tensor | None = None
    window: int | None = None
    blocks: Tensor | None = None
    beyond: bool = False

    def sees(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Whether `query` sees `key`; indices that broadcast against each other, the result is boolean."""
        seen = visible(query, key, self.until[row, key])
        together = None
        if self.blocks is not None:
            block = self.blocks[row, query]
            # Documents of a row may begin with one and the same image, and do not see each other for that.
            alike = (key < self.until[row, query]) & (query < self.until[row, key])
            together = (block > 0) & (block == self.blocks[row, key]) & alike
            seen = seen | together
        if self.window is not None:
            assert self.positions is not None, "a window is one of positions"
            near = self.positions[row, query] - self.positions[row, key] < self.window
            seen = seen & (near | together if self.beyond and together is not None else near)
        return seen


def additive_mask(rule: Rule, dtype: torch.dtype) -> Tensor:
    """The rule for sdpa and eager: float [R, 1, L, L], 0 where visible, the dtype's minimum elsewhere.

    Float and additive because a boolean mask is silently wrong under the `eager` attention of transformers.
    """
    rows, length = rule.until.shape
    index = torch.arange(length, device=rule.until.device)
    row = torch.arange(rows, device=rule.until.device)[:, None, None]
    seen = rule.sees(row, index[None, :, None], index[None, None, :])
    mask = torch.full(seen.shape, torch.finfo(dtype).min, dtype=dtype, device=seen.device)
    return mask.masked_fill_(seen, 0.0)[:, None]


def block_mask(rule: Rule, dtype: torch.dtype) -> Any:
    """The rule for FlexAttention: a `BlockMask` over [R, 1, L, L]; blocks that nobody sees are not computed."""
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = rule.until.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return rule.sees(row, query, key)

    return create_block_mask(sees, B=rows, H=None, Q_LEN=length, KV_LEN=length, device=rule.until.device)


MASKS = {"eager": additive_mask, "sdpa": additive_mask, "flex_attention": block_mask}


def mask(implementation: str | None, rule: Rule, dtype: torch.dtype) -> Any:
    """What a decoder with this `_attn_implementation` takes as attention mask.

    Raises:
        VITaskError: the backend takes no mask of one's own (FlashAttention).
    """
    if implementation not in MASKS:
        raise VITaskError(
            f"attention {implementation!r} takes no shared-prefix mask; load the model with one of {', '.join(MASKS)}"
        )
    return MASKS[implementation](rule, dtype)
