"""Any HF vision-language model with a VITask step: one forward for all branches of a batch, and the losses.

What the model gives its decoder for a batch is asked of the model's own forward, so that towers, projectors, positions
and masks of a family are the family's. Branches are then laid out over that.

Shapes: R rows of the batch, W positions of a row, N = R W places in the pool (and the exemplar tokens behind them),
D hidden width, B samples, E exemplar tokens, F TSM feature width, A axes of positions, L positions of a layout's row.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
from transformers.modeling_outputs import BaseModelOutputWithPast

from vitask_plugin.errors import VITaskError
from vitask_plugin.hf import families
from vitask_plugin.method import attention
from vitask_plugin.method.branches import COUNTED, NOWHERE, Layout, Rows
from vitask_plugin.method.connected import Connected
from vitask_plugin.method.layout import Branches
from vitask_plugin.training import precision
from vitask_plugin.training.step import VITaskOutput, output_of


def with_vitask(config: Any) -> type:
    """The stock class of a configuration, with a VITask step; it keeps the stock name, under which it is saved.

    Raises:
        VITaskError: transformers has no image-text-to-text model for it.
    """
    try:
        stock = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    except KeyError:
        raise VITaskError(
            f"a model of type {getattr(config, 'model_type', None)!r} is none that AutoModelForImageTextToText loads; "
            "give a vision-language model in HF format, or tune a LLaVA 1.5 with `python -m vitask_plugin.llava.train`"
        ) from None

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, vitask: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if vitask is None:
            return stock.forward(self, *args, **kwargs)
        # PEFT's wrapper hands on every argument it knows, most of them None.
        return self.vitask_step(**vitask, inputs={name: value for name, value in kwargs.items() if value is not None})

    # With the stock module too: transformers renames the tensors of older checkpoints for classes of its own alone.
    own = {"forward": forward, "__doc__": stock.__doc__, "__module__": stock.__module__}
    return type(stock.__name__, (VITaskStep, stock), own)


class VITaskStep(Connected):
    """What a stock class is given. Without a `vitask` batch its forward is the stock one's."""

    def vitask_step(
        self, *, branches: Branches, denominator: Tensor, features: Tensor | None = None, inputs: dict[str, Any]
    ) -> VITaskOutput:
        """All branches of a batch in one forward, logits where a response token is predicted, and the stage's loss.

        Args:
            branches: built by the collator, over rows of the width of `input_ids`.
            denominator: scalar, response tokens of the whole accumulation step over all ranks.
            features: [B, E, F] TSM features, padded; with `--vitask_ep text` [B, E] token ids.
            inputs: of the stock forward: input_ids [R, W], attention_mask [R, W], pixels; labels are not used.
        """
        logits = self.vitask_logits(branches.layout, inputs, features)
        return output_of(logits, branches, self.vitask_arguments, denominator)

    def vitask_logits(self, layout: Layout, inputs: dict[str, Any], features: Tensor | None = None) -> Tensor:
        """[n, V] logits of a layout's labelled tokens, see `vitask_step`."""
        expanded = self.expand({name: value for name, value in inputs.items() if name != "labels"})
        if features is not None:
            expanded = expanded.followed_by(self.exemplars(features).flatten(0, 1))
        return self.lm_head(self.vitask_states(layout, expanded))

    def expand(self, inputs: dict[str, Any]) -> "Expanded":
        """What the model's own forward gives its decoder for a batch."""
        language_model = families.decoder(self)
        with _handed_over(language_model) as given:
            self.model(**inputs, use_cache=False)
        return Expanded.of(given, sees_itself=self._image_blocks(inputs["input_ids"]))

    def _image_blocks(self, ids: Tensor) -> Tensor | None:
        """[R, W] a number for each run of image tokens, 0 elsewhere, where the family lets them see each other."""
        if self.config.model_type not in families.IMAGES_SEE_THEMSELVES:
            return None
        is_image = (ids == families.image_token(self.config, self.config.model_type)).long()
        starts = torch.nn.functional.pad(is_image, (1, 0))[:, :-1] < is_image
        return starts.flatten().cumsum(0).view_as(ids) * is_image

    def vitask_states(self, layout: Layout, expanded: "Expanded", **kwargs: Any) -> Tensor:
        """The hidden states [n, D] that predict the labelled tokens of a layout.

        Args:
            kwargs: for the decoder, such as a key-value cache.
        """
        language_model = families.decoder(self)

        def decode(rows: Rows) -> Tensor:
            return language_model(
                inputs_embeds=rows.embedded(expanded.pool),
                attention_mask=self._masks(rows, expanded),
                position_ids=expanded.positions_of(rows),
                **expanded.deep_of(rows),
                **{"use_cache": False, **kwargs},
            ).last_hidden_state

        return layout.states(decode)

    def _masks(self, rows: Rows, expanded: "Expanded") -> Any:
        """What the decoder takes as attention mask: one, or one for each kind of layer."""
        config, blocks = families.decoder(self).config, expanded.blocks
        if rows.valid is not None and blocks is None:
            return rows.valid  # plain causal sequences: the model makes its own masks
        here = None if blocks is None else blocks[rows.source]
        window, backend = getattr(config, "sliding_window", None), config._attn_implementation

        def mask(width: int | None) -> Any:
            beyond = here is not None and families.images_reach_beyond_windows()
            rule = attention.Rule(rows.until, rows.position_ids, width, here, beyond)
            return attention.mask(backend, rule, expanded.pool.dtype)

        kinds = families.layer_kinds(config)
        if "sliding_attention" in kinds:
            return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
        return mask(None if kinds else window)


@dataclass
class Expanded:
    """What a decoder is given for a batch, by place in the pool.

    Attributes:
        pool: [N, D] embeddings.
        positions: [A, N] position ids, None where they are the index in the sequence.
        moved: [N] by how much positions of what stands behind a place differ from the index in the sequence.
        blocks: [N] tokens with one number see each other; None: no such family.
        deep_row: [N] row in each of `deep`; `NOWHERE`: none. deep: [image tokens, D] each, added to the states of the
            first layers (DeepStack).
    """

    pool: Tensor
    positions: Tensor | None = None
    moved: Tensor | None = None
    blocks: Tensor | None = None
    deep_row: Tensor | None = None
    deep: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, given: dict[str, Any], sees_itself: Tensor | None = None) -> "Expanded":
        """From what the decoder was handed for rows that are padded on the right."""
        embeds, positions, visual = given["inputs_embeds"], given.get("position_ids"), given.get("visual_pos_masks")
        pool = precision.computed(embeds.flatten(0, 1))
        moved = deep_row = None
        if positions is not None and positions.ndim == 3:
            # What stands behind a token is one further than the largest position up to there, on every axis.
            ahead = positions.amax(dim=0).cummax(dim=-1).values
            moved = (ahead - torch.arange(ahead.shape[-1], device=ahead.device)).flatten()
            positions = positions.flatten(1)
        else:
            positions = None  # the index in the sequence
        if visual is not None:
            flat = visual.flatten()
            deep_row = torch.where(flat, flat.long().cumsum(0) - 1, NOWHERE)
        return cls(
            pool,
            positions,
            moved,
            None if sees_itself is None else sees_itself.flatten(),
            deep_row,
            tuple(given.get("deepstack_visual_embeds") or ()),
        )

    def __len__(self) -> int:
        return len(self.pool)

    @property
    def device(self) -> torch.device:
        return self.pool.device

    def followed_by(self, tokens: Tensor) -> "Expanded":
        """With tokens [M, D] behind the pool that are no image tokens."""
        count = len(tokens)

        def longer(values: Tensor | None, value: int) -> Tensor | None:
            if values is None:
                return None
            return torch.cat([values, values.new_full((*values.shape[:-1], count), value)], dim=-1)

        return Expanded(
            torch.cat([self.pool, tokens.to(self.pool.dtype)]),
            longer(self.positions, 0),
            longer(self.moved, 0),
            longer(self.blocks, 0),
            longer(self.deep_row, NOWHERE),
            self.deep,
        )

    def positions_of(self, rows: Rows) -> Tensor:
        """[R, L] or [A, R, L] position ids of a layout's rows.

        A prefix keeps those that the model gave it; what stands behind it goes on from there, whatever it is. Where the
        image itself is replaced there is nothing to go by: text stands where it is counted.
        """
        if self.positions is None:
            return rows.position_ids
        behind = rows.behind
        follows = rows.position_ids + torch.where(behind == COUNTED, 0, self.moved[behind.clamp(min=0)])
        return torch.where(behind == NOWHERE, self.positions[:, rows.source], follows)

    def deep_of(self, rows: Rows) -> dict[str, Any]:
        """The arguments of a decoder whose first layers are given image features."""
        if self.deep_row is None:
            return {}
        found = self.deep_row[rows.source]
        visual = found != NOWHERE
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": [one[found[visual]] for one in self.deep]}


@contextlib.contextmanager
def _handed_over(language_model: nn.Module) -> Iterator[dict[str, Any]]:
    """While the block runs, the decoder computes nothing and tells what it is given."""
    found: dict[str, Any] = {}

    def keep(**given: Any) -> BaseModelOutputWithPast:
        found.update(given)
        return BaseModelOutputWithPast(last_hidden_state=given["inputs_embeds"])

    before = vars(language_model).get("forward")
    language_model.forward = keep
    try:
        yield found
    finally:
        if before is None:
            del language_model.forward
        else:
            language_model.forward = before
