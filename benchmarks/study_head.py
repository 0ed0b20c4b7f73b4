"""The peer that most users would take: a class head on the same VLM in place of words, with the same LoRA and budget.

The head reads the hidden state from which the first token of the answer would be predicted (as ms-swift's `seq_cls`
does, and transformers' classifiers of sequences).

B samples, K classes, D hidden width.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_data import file_of
from study_plan import Run
from study_training import Bench
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, set_seed

from vitask_plugin.data.instructions import read_samples
from vitask_plugin.hf import loading
from vitask_plugin.hf.batch import EncodedSamples, PlainBatches
from vitask_plugin.method.branches import IGNORE
from vitask_plugin.training.batches import pad_of

LIMIT = 1024


class Questions(EncodedSamples):
    """Samples up to where their answer starts, with their class."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = self.encoded(index, index)
        start = int((found["labels"] != IGNORE).nonzero()[0])
        cut = {name: found[name][:start] for name in ("input_ids", "labels")}
        return {**found, **cut, "class": self.list_data_dict[index]["vitask"]["label"]}


class ClassBatches(PlainBatches):
    """Rows as the stock forward takes them, and `classes` [B]."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = super().__call__(items)
        del batch["labels"]
        return {**batch, "classes": torch.tensor([item["class"] for item in items])}


class Headed(nn.Module):
    """A VLM, with adapters or without, and a linear head of K classes on its last state."""

    def __init__(self, model: Any, classes: int) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.head = nn.Linear(model.config.get_text_config().hidden_size, classes)
        nn.init.zeros_(self.head.weight)

    def forward(self, classes: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        states = self.model.get_base_model().model(**inputs, use_cache=False).last_hidden_state
        last = inputs["attention_mask"].sum(1) - 1
        logits = self.head(states[torch.arange(len(last)), last].to(self.head.weight.dtype)).float()
        loss = {} if classes is None else {"loss": nn.functional.cross_entropy(logits, classes)}
        return {**loss, "logits": logits}


def headed(
    bench: Bench, data: Path, run: Run, splits: Sequence[str]
) -> tuple[dict[tuple[str, bool, bool], np.ndarray], dict[str, Any]]:
    """Log-probabilities [N, K] by (split, complete instruction, False), and what training took."""
    own, args = bench.settings, bench.arguments(run)
    set_seed(run.seed)
    config = loading.read_config(str(bench.model))
    template = loading.load_template(str(bench.model), config)
    model = loading.load_model(str(bench.model), config, dtype=torch.float32)
    model.requires_grad_(False)
    samples = read_samples(file_of(data, "train"))
    tuned = Headed(loading.add_lora(model, args, projector=True), len(samples[0]["vitask"]["choices"]))
    folder, batches = str(data / "images"), ClassBatches(pad_of(template.tokenizer))
    began, computed = time.monotonic(), time.process_time()
    questions = Questions(samples, folder, template, LIMIT)
    Trainer(model=tuned, args=args, train_dataset=questions, data_collator=batches).train()
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - computed}
    found = {}
    for split in splits:
        for complete in (True, False):
            judged = Questions(read_samples(file_of(data, split, complete=complete)), folder, template, LIMIT)
            loader = DataLoader(judged, batch_size=own.judge_batch, collate_fn=batches)
            found[split, complete, False] = _likely(tuned.eval(), loader, own.bf16)
    return found, {"training": {name: round(value, 1) for name, value in spent.items()}}


@torch.no_grad()
def _likely(model: Headed, loader: DataLoader, bf16: bool) -> np.ndarray:
    device = model.head.weight.device
    found = []
    for batch in loader:
        inputs = {name: value.to(device) for name, value in batch.items() if name != "classes"}
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            found.append(model(**inputs)["logits"].log_softmax(-1).cpu())
    return torch.cat(found).double().numpy()
