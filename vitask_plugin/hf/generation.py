"""transformers' `generate` behind prompts that are laid out as the branches of training are.

Positions, masks and features of a prompt are what its layout says, so `generate` runs on the bare decoder and its head,
with the cache that the prompts have left.

Shapes: B prompts, T positions of the longest one, D hidden width, V vocabulary, A axes of positions.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vitask_plugin.hf import families
from vitask_plugin.inference.generation import begin
from vitask_plugin.method.branches import Prompts


class Answering(PreTrainedModel, GenerationMixin):
    """The decoder of a vision-language model and its head, one token of each prompt at a time.

    Args:
        model: see `hf.model.with_vitask`; its weights are used, not copied.
        ends: token ids that end an answer where the model's own generation settings name none.
    """

    _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, model: nn.Module, ends: int | None) -> None:
        decoder = families.decoder(model)
        super().__init__(copy.deepcopy(decoder.config))
        self.decoder, self.lm_head = decoder, model.lm_head
        self.generation_config = copy.deepcopy(model.generation_config)
        self.generation_config.cache_implementation = None  # the prompts have left one
        if self.generation_config.eos_token_id is None:
            self.generation_config.eos_token_id = ends
        self.eval()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        moved: Tensor | None = None,
        **unused: Any,
    ) -> dict[str, Any]:
        """The last token of each row.

        Args:
            moved: [A, B] by how much its position differs from its index; see `hf.model.Expanded`.
        """
        length = input_ids.shape[1]
        index = torch.full_like(input_ids[:, 0], length) if attention_mask is None else attention_mask.sum(dim=-1)
        positions = (index - 1)[:, None]
        if moved is not None:  # [B, A] -> [A, B, 1]
            positions = (positions + moved).T[..., None]
        return {
            "input_ids": input_ids[:, -1:],
            "attention_mask": attention_mask,
            "positions": positions,
            "past_key_values": past_key_values,
        }

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        past_key_values: Any,
        attention_mask: Tensor | None = None,
        **unused: Any,
    ) -> CausalLMOutputWithPast:
        """[B, 1, V] logits of what follows one token [B, 1] of each row."""
        states = self.decoder(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=past_key_values,
            use_cache=True,
        ).last_hidden_state
        return CausalLMOutputWithPast(logits=self.lm_head(states), past_key_values=past_key_values)


@torch.no_grad()
def generate(
    model: nn.Module,
    answering: Answering,
    prompts: Prompts,
    tokens: Tensor,
    *,
    shares: bool,
    num_beams: int = 1,
    **kwargs: Any,
) -> Tensor:
    """Token ids [B, T + new tokens] of prompts and answers; in float32 those of each prompt alone.

    Args:
        model: the whole one. answering: of it. prompts: with a pool of `hf.model.Expanded`.
        tokens: [N] token ids by place in the pool: what stands there for `generate`'s processors of scores.
        shares: whether a shared prefix is right for the model.
        num_beams, kwargs: of `generate`.
    """
    expanded = prompts.pool
    cache = DynamicCache() if shares else DynamicCache(config=families.decoder(model).config)
    begun = begin(model, prompts, cache, num_beams=num_beams, shares=shares)
    moved = None
    if expanded.positions is not None:
        last = torch.stack([one.prefix[-1] for one in prompts.documents]).to(expanded.device)
        counted = torch.tensor([one.counted for one in prompts.documents], device=expanded.device)
        moved = expanded.moved[last].masked_fill(counted, 0)[:, None].expand(-1, len(expanded.positions))
    pad = kwargs["pad_token_id"]
    return answering.generate(
        tokens.to(expanded.device)[begun.places].masked_fill(begun.mask == 0, pad),
        attention_mask=begun.mask,
        past_key_values=begun.cache,
        use_cache=True,
        num_beams=num_beams,
        moved=moved,
        **kwargs,
    )
