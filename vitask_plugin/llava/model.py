"""Upstream's LlavaLlamaForCausalLM with a VITask step: one forward for all branches of a batch, and the losses.

Shapes: R rows of the batch, W positions of a row after upstream expanded its image tokens, N places in the pool of
embeddings that the branches point into, D hidden width, B samples, E exemplar tokens, F TSM feature width, V words.
"""

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vitask_plugin.errors import VITaskError
from vitask_plugin.inference import generation
from vitask_plugin.inference.asking import with_exemplars
from vitask_plugin.method.branches import Layout, Prompts, Rows
from vitask_plugin.method.connected import Connected
from vitask_plugin.method.layout import Branches, Row, cut_row
from vitask_plugin.reading import readable
from vitask_plugin.record.whole_model import check_weights
from vitask_plugin.training import precision
from vitask_plugin.training.step import VITaskOutput, output_of

logger = logging.getLogger(__name__)
_ADDED = ("mm_projector", "vision_tower")  # what upstream's script gives to a language model after loading it


class VITaskLlavaLlamaForCausalLM(Connected, LlavaLlamaForCausalLM):
    """LLaVA with an exemplar connector. Without a `vitask` batch its forward is upstream's."""

    # A checkpoint holds the frozen tower too, which upstream reads from its own folder after the model: known.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^model\.vision_tower\."]

    @classmethod
    def from_pretrained(
        cls, *args: Any, attn_implementation: str | None = None, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As upstream, but sdpa for the FlashAttention that `train_mem.py` asks for: it takes no shared-prefix mask.

        Raises:
            VITaskError: unreadable; or weights that are not there, unless `output_loading_info` leaves that to the
                caller: transformers draws them at random, and warns.
        """
        if attn_implementation and attn_implementation.startswith("flash_attention"):
            logger.warning("attention: sdpa instead of %s, which takes no shared-prefix mask", attn_implementation)
            attn_implementation = "sdpa"
        # Under ZeRO-3 loading draws random numbers: LoRA and a new projector would start from others than elsewhere.
        with readable("model", args[0]), torch.random.fork_rng(devices=[], enabled=is_deepspeed_zero3_enabled()):
            # As a plain str: upstream's script hands over a `ModelPath`, which model cards would show as an object.
            kwargs |= {"attn_implementation": attn_implementation, "output_loading_info": True}
            model, found = super().from_pretrained(str(args[0]), *args[1:], **kwargs)
        if output_loading_info:
            return model, found
        check_weights(found, model, str(args[0]), added=_ADDED)
        return model

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        with precision.buffers_kept(self):
            return super()._apply(fn, recurse)

    def get_vision_tower(self) -> Any:
        tower = super().get_vision_tower()
        if tower is not None:
            precision.keep_buffers(tower)  # upstream casts it apart from the model
        return tower

    @functools.wraps(LlavaLlamaForCausalLM.forward)
    def forward(self, *args: Any, vitask: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        if vitask is None:
            return super().forward(*args, **kwargs)
        # PEFT's wrapper hands on every argument it knows, most of them None.
        return self._vitask_step(**vitask, **{name: value for name, value in kwargs.items() if value is not None})

    # Training ----------------------------------------------------------------------------------------------------

    def vitask_states(self, layout: Layout, pool: Tensor, **kwargs: Any) -> Tensor:
        """The hidden states [n, D] that predict the labelled tokens of a layout over `pool` [N, D].

        Args:
            kwargs: for the decoder, such as a key-value cache.
        """

        def decode(rows: Rows) -> Tensor:
            return self.model(
                inputs_embeds=rows.embedded(pool),
                attention_mask=rows.mask(self.config._attn_implementation, pool.dtype),
                position_ids=rows.position_ids,
                **{"use_cache": False, **kwargs},
            ).last_hidden_state

        return layout.states(decode)

    def _vitask_step(self, *, branches: Branches, denominator: Tensor, **inputs: Any) -> VITaskOutput:
        """All branches of a batch in one forward, logits where a response token is predicted, and the stage's loss.

        Args:
            branches: built by the collator.
            denominator: scalar, response tokens of the whole accumulation step over all ranks.
            inputs: see `vitask_logits`.
        """
        logits = self.vitask_logits(branches=branches, **inputs)
        return output_of(logits, branches, self.vitask_arguments, denominator)

    def vitask_logits(
        self,
        *,
        branches: Branches,
        features: Tensor | None = None,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        images: Any = None,
        image_sizes: Any = None,
    ) -> Tensor:
        """[n, V] logits of the labelled tokens of all branches of a batch.

        Args:
            features: [B, E, F] TSM features, padded; with `--vitask_ep text` [B, E] token ids.
            input_ids, attention_mask: [R, T]. labels: [R, T], which `branches` holds already.
        """
        with _embedded_at_once(self.get_model(), input_ids[attention_mask.bool()]):
            _, _, _, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
                input_ids, None, attention_mask, None, labels, images, image_sizes
            )
        if embeds.shape[1] != branches.width:
            raise VITaskError(
                f"the expanded batch is {embeds.shape[1]} positions long where {branches.width} were expected: this "
                "projector does not give one token per patch of the vision tower, which VITask training needs"
            )
        pool = precision.computed(embeds.flatten(0, 1))
        if features is not None:
            exemplars = self.exemplars(features).to(pool.dtype)
            pool = torch.cat([pool, exemplars.flatten(0, 1)])
        return self.lm_head(self.vitask_states(branches.layout, pool))

    # Inference ---------------------------------------------------------------------------------------------------

    def vitask_prompts(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Any,
        image_sizes: Any = None,
        tsm_features: Tensor | None = None,
        tsm_lengths: Tensor | None = None,
    ) -> Prompts:
        """Prompts for generation and scoring, whatever number of tokens an image has.

        With TSM features the exemplar tokens stand after the image tokens, before the instruction; for a checkpoint
        trained with `replace`, in place of the image tokens.

        Args:
            input_ids: [B, T]. attention_mask: [B, T], 0 on pads. images, image_sizes: as upstream.
            tsm_features: [B, E, F], or [B, E] token ids (see `exemplars`). tsm_lengths: [B], exemplar tokens of each
                sample; 0: none.
        """
        pool, rows = self.vitask_rows(input_ids, attention_mask, images, image_sizes)
        exemplars = [None] * len(rows)
        if tsm_features is not None:
            lengths = tsm_lengths.tolist()
            exemplars = [one[:length] if length else None for one, length in zip(tsm_features, lengths, strict=True)]
        replaces = tsm_features is not None and self.vitask_arguments.vitask_ep == "replace"
        pool, documents, _ = with_exemplars(pool, rows, exemplars, self.exemplars, replaces=replaces)
        return Prompts(pool, documents)

    def vitask_rows(
        self, input_ids: Tensor, attention_mask: Tensor, images: Any, image_sizes: Any = None
    ) -> tuple[Tensor, list[Row]]:
        """The pool [N, D] of what stands before answers, and the B rows in it; see `vitask_prompts`."""
        # Token numbers travel through upstream's expansion in place of the labels: where each position came from.
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        with _embedded_at_once(self.get_model(), input_ids[attention_mask.bool()]):
            _, _, mask, _, embeds, sources = self.prepare_inputs_labels_for_multimodal(
                input_ids, None, attention_mask, None, numbers, images, image_sizes
            )
        rows = _rows(input_ids.cpu(), mask.cpu().bool(), sources.cpu())
        return precision.computed(embeds.flatten(0, 1)), rows

    def vitask_generate(self, prompts: Prompts, **kwargs: Any) -> Tensor:
        """Generated token ids [B, new tokens], see `generation.generate`."""
        # Past upstream's generate, which takes token ids and images only.
        return generation.generate(self, prompts, super(LlavaLlamaForCausalLM, self).generate, **kwargs)


class _Embedded(nn.Module):
    """Stands in for `embed_tokens`: hands out embeddings [N, D] in the order in which they are asked for."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self._left = embeddings

    def forward(self, ids: Tensor) -> Tensor:
        found, self._left = self._left[: len(ids)], self._left[len(ids) :]
        return found


@contextlib.contextmanager
def _embedded_at_once(llama: nn.Module, ids: Tensor) -> Iterator[None]:
    """While the block runs, upstream's embeddings row by row come from one call.

    ZeRO-3 gathers the weights in every call, which all ranks have to make, and rows differ between ranks: a negative
    from the data set is one more.

    Args:
        ids: token ids of all rows in their order, `IMAGE_TOKEN_INDEX` among them.
    """
    original = llama.embed_tokens
    llama.embed_tokens = _Embedded(original(ids[ids != IMAGE_TOKEN_INDEX]))
    try:
        yield
    finally:
        llama.embed_tokens = original


def _rows(input_ids: Tensor, valid: Tensor, sources: Tensor) -> list[Row]:
    """The rows behind upstream's expansion.

    Args:
        input_ids: [B, T]. valid: [B, W] bool. sources: [B, W] the token number of each position, `IGNORE_INDEX` for
            image tokens.
    """
    rows = []
    for number, ids in enumerate(input_ids):
        start = number * valid.shape[1] + int(valid[number].int().argmax())  # behind the pads, if they are on the left
        source = sources[number][valid[number]]
        is_image = source == IGNORE_INDEX
        rows.append(
            cut_row(start, ids[source.masked_fill(is_image, 0)], is_image, torch.full_like(source, IGNORE_INDEX))
        )
    return rows
