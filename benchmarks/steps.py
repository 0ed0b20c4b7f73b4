"""Training steps to measure: upstream LLaVA's own, and VITask's on the same weights and the same samples.

Nothing here is a stand-in: upstream's model class, ours, and AdamW as transformers' Trainer takes it. Only the weights
are made on the spot. The vision tower is frozen in every variant, as in LLaVA's tuning; its size is a setting, small on
a CPU.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from measuring import CLOCKS, turns, wait
from torch import Tensor, nn
from workload import VARIANTS, Batches, Settings, Variant, Workload

from vitask_plugin.llava import compat
from vitask_plugin.method.connector import ExemplarConnector

compat.prepare()
from llava.constants import IGNORE_INDEX  # noqa: E402 (after the workarounds)
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402
from llava.train.train import find_all_linear_names  # noqa: E402

from vitask_plugin.llava.model import VITaskLlavaLlamaForCausalLM  # noqa: E402

LEARNING_RATE = 1e-4
WARM_UP = 1  # rounds; the first step allocates the optimizer's state


class Steps:
    """A model, its optimizer, and every variant's training step on them.

    Args:
        upstream: build upstream's class alone, for the memory of its own step; VITask's variants are then absent.
        clock: that `run` reads, of `measuring.CLOCKS`.
    """

    def __init__(self, batches: Batches, upstream: bool = False, clock: str = "wall") -> None:
        self._clock = CLOCKS[clock]
        workload = self._workload = batches.workload
        settings = self.settings = workload.settings
        self.positions = 0  # of the decoder, in the last step
        torch.manual_seed(0)
        model = self.make_model(upstream)
        if settings.gradient_checkpointing:  # as upstream's train() and the Trainer
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
        if settings.lora:
            self.add_lora(model)
        if upstream:
            self._vanilla = model
        else:
            self._vitask = model
            self._vanilla = self.stock_view(model)
            torch.manual_seed(1)
            connector = ExemplarConnector("mlp2x_gelu", batches.exemplars.features.width, settings.hidden)
            model.connect(workload.arguments(VARIANTS["stage2_packed"]), connector.to(settings.device))
        model.train()
        # Behind the last layer, which no gradient checkpointing computes twice.
        self.decoder(model).norm.register_forward_pre_hook(self._count)
        self.model = model
        self._set_stage(1)
        self._optimizer = torch.optim.AdamW(self.trainable().values(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)

    # What depends on the host -----------------------------------------------------------------------------------------

    def make_model(self, upstream: bool) -> Any:
        """The stock model, or ours, with what is frozen in every run."""
        settings = self.settings
        with _default_dtype(settings.dtype), torch.device(settings.device):
            made = (LlavaLlamaForCausalLM if upstream else VITaskLlavaLlamaForCausalLM)(model_config(self._workload))
        tower = made.get_vision_tower()
        tower.load_model()
        tower.to(device=settings.device, dtype=getattr(torch, settings.dtype)).requires_grad_(False)
        return made

    def stock_view(self, model: Any) -> Any:
        """Upstream's class, untouched, around the modules of ours: same weights, no second copy."""
        with torch.device("meta"):
            view = LlavaLlamaForCausalLM(model.config)
        view.model, view.lm_head = model.model, model.lm_head
        return view

    def decoder(self, model: Any) -> nn.Module:
        return model.model

    def add_lora(self, model: Any) -> None:
        _add_lora(model, self.settings)

    def lean_loss(self, batch: dict[str, Any]) -> Tensor:
        return lean_vanilla_loss(self._vanilla, batch)

    # Steps ------------------------------------------------------------------------------------------------------------

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable weights by name; the connector's only in stage 1."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def loss(self, variant: Variant, batch: dict[str, Any]) -> Tensor:
        """One forward pass."""
        with torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            if variant.stage is not None:
                return self._vitask(**batch).loss
            return self.lean_loss(batch) if variant.lean else self._vanilla(**batch).loss

    def prepare(self, variant: Variant) -> None:
        """What a training run of this variant would have set up before its first step."""
        # Not set_attn_implementation(), which would change the vision tower's too.
        self.decoder(self.model).config._attn_implementation = variant.attention
        if variant.stage is not None:
            self._set_stage(variant.stage)
            self._vitask.connect(self._workload.arguments(variant), self._vitask.vitask_connector)

    def run(self, variant: Variant, batch: dict[str, Any]) -> float:
        """Seconds of one step: forward, backward, optimizer."""
        self.prepare(variant)
        self.positions = 0
        wait(self.settings.device)
        start = self._clock()
        self.loss(variant, batch).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        wait(self.settings.device)
        return self._clock() - start

    def gradients(self, variant: Variant, batch: dict[str, Any]) -> tuple[float, dict[str, Tensor]]:
        """Loss, and the gradient of every trainable weight. Dropout is off: its draws would differ between engines."""
        self.prepare(variant)
        with _without_dropout(self.model):
            loss = self.loss(variant, batch)
            loss.backward()
        found = {name: weight.grad.clone() for name, weight in self.trainable().items() if weight.grad is not None}
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item(), found

    def _set_stage(self, stage: int) -> None:
        if hasattr(self, "_vitask"):
            self._vitask.vitask_connector.requires_grad_(stage == 1)

    def _count(self, module: nn.Module, args: tuple[Tensor]) -> None:
        self.positions += math.prod(args[0].shape[:2])


def lean_vanilla_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    """Upstream's loss with one saving granted: logits only where a response token is predicted.

    The second baseline: what is left of VITask's price when that saving, which vanilla tuning could have too, is taken
    out of the comparison.
    """
    _, _, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
        batch["input_ids"], None, batch["attention_mask"], None, batch["labels"], batch["images"]
    )
    hidden = model.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).last_hidden_state
    predicts = labels[:, 1:] != IGNORE_INDEX
    logits = model.lm_head(hidden[:, :-1][predicts])
    return nn.functional.cross_entropy(logits.float(), labels[:, 1:][predicts])


def model_config(workload: Workload) -> LlavaConfig:
    """LLaVA's configuration in the workload's sizes, with its vision tower."""
    settings = workload.settings
    return LlavaConfig.from_pretrained(
        workload.directory / "tiny-llava",
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.hidden // settings.head_width,
        num_key_value_heads=settings.hidden // settings.head_width,
        head_dim=settings.head_width,
        max_position_embeddings=4096,
        tokenizer_model_max_length=workload.longest,
        use_cache=False,  # as upstream's train()
        attn_implementation="sdpa",
    )


def _add_lora(model: Any, settings: Settings) -> None:
    """LoRA as upstream's train() adds it; then the projector alone is trained beside it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=2 * settings.lora_rank,
        target_modules=find_all_linear_names(model),
        lora_dropout=0.05,
        bias="none",
        task_type="CAUSAL_LM",
    )
    get_peft_model(model, config)  # changes the model in place; its wrapper is not needed
    model.get_model().mm_projector.requires_grad_(True)


@contextmanager
def _default_dtype(name: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    for module, _ in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, p in dropouts:
            module.p = p


def measure_time(
    steps: Steps, batches: Batches, variants: Mapping[str, Variant], repeats: int
) -> dict[str, dict[str, Any]]:
    """Runs the variants in turn, in an order that rotates from round to round.

    Returns:
        Per variant {"seconds": [repeats], "collate_seconds": [repeats], "positions": [repeats], of the decoder}.
    """
    found = {name: {"seconds": [], "collate_seconds": [], "positions": []} for name in variants}
    for number, name in turns(variants, repeats, WARM_UP):
        batch, collation = batches(variants[name], max(number, 0))
        seconds = steps.run(variants[name], batch)
        if number >= 0:
            found[name]["seconds"].append(seconds)
            found[name]["collate_seconds"].append(collation)
            found[name]["positions"].append(steps.positions)
    return found
