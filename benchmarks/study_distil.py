"""The obvious alternative to RDA: the TSM's probabilities as soft labels of the label scores, on the same VLM.

The loss of a sample is the cross entropy of its label in the softmax over its K label scores, and D_KL(TSM || softmax),
in nats, weight 1 each: what the exemplar branch would hand on, without an exemplar and over labels alone.

B samples, K classes.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_data import file_of
from study_judging import Judge, SplitSamples
from study_plan import Run
from study_training import Bench
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, set_seed

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.hf import loading
from vitask_plugin.hf.asking import HFAsker
from vitask_plugin.hf.prompting import Prompter
from vitask_plugin.method.branches import Packed, all_targets, targets

NONE = VITaskArguments(vitask=True, vitask_ep="none")


class Numbers(Dataset):
    """Sample numbers, which the model looks up itself."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        return index


class Taught(nn.Module):
    """A VLM whose label scores are taught by labels and by a TSM.

    Args:
        samples: of training. soft: [N, K] log-probabilities of the TSM.
    """

    def __init__(self, model: Any, template: Any, samples: SplitSamples, soft: Tensor) -> None:
        super().__init__()
        self.model, self.config, self.samples = model, model.config, samples
        self.register_buffer("soft", soft, persistent=False)
        self._asker = HFAsker(model.get_base_model(), Prompter(template), soft.device)

    def forward(self, numbers: Tensor) -> dict[str, Tensor]:
        self._asker.device = self.soft.device
        scores = self.scores(numbers.tolist())
        labels = [self.samples.list_data_dict[number]["vitask"]["label"] for number in numbers.tolist()]
        own = scores.log_softmax(-1)
        hard = nn.functional.nll_loss(own, torch.tensor(labels, device=own.device))
        soft = self.soft[numbers]
        return {"loss": hard + (soft.exp() * (soft - own)).sum(-1).mean()}

    def scores(self, numbers: Sequence[int]) -> Tensor:
        """[B, K] log-likelihoods of the labels, as `inference.scoring` sums them, with gradients."""
        judged = [self.samples.judged(number, None) for number in numbers]
        queries, answers = [one.query for one in judged], [one.answers for one in judged]
        prompts = self._asker.scored(queries, answers, [None] * len(judged))
        model, documents = self.model.get_base_model(), prompts.documents
        wanted = all_targets(documents).to(prompts.pool.device)
        logits = model.lm_head(model.vitask_states(Packed.of(documents).to(wanted.device), prompts.pool)).float()
        likely = logits.gather(-1, wanted[:, None]).squeeze(-1) - logits.logsumexp(-1)
        lengths = [len(targets(one, label)) for one in documents for label in one.continuations]
        return torch.stack([part.sum() for part in likely.split(lengths)]).view(len(judged), -1)


def distilled(
    bench: Bench, data: Path, run: Run, splits: Sequence[str], soft: np.ndarray
) -> tuple[dict[tuple[str, bool, bool], np.ndarray], dict[str, Any]]:
    """Scores [N, K] by (split, complete instruction, False), and what training took.

    Args:
        soft: the TSM's log-probabilities [N, K] of the training images.
    """
    own, args = bench.settings, bench.arguments(run)
    set_seed(run.seed)
    config = loading.read_config(str(bench.model))
    template = loading.load_template(str(bench.model), config)
    model = loading.load_model(str(bench.model), config, dtype=torch.float32)
    model.requires_grad_(False)
    samples = SplitSamples(file_of(data, "train"), data / "images", template, NONE)
    taught = Taught(
        loading.add_lora(model, args, projector=True), template, samples, torch.from_numpy(soft).float().to(args.device)
    )
    began, computed = time.monotonic(), time.process_time()
    numbers = Numbers(len(samples))
    Trainer(
        model=taught, args=args, train_dataset=numbers, data_collator=lambda some: {"numbers": torch.tensor(some)}
    ).train()
    spent = {"seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - computed}
    judge = Judge(model.eval(), template, NONE, batch=own.judge_batch, bf16=own.bf16)
    found = {}
    for split in splits:
        for complete in (True, False):
            scores = judge.scores(file_of(data, split, complete=complete), data / "images")
            found[split, complete, False] = scores[False]
    return found, {"training": {name: round(value, 1) for name, value in spent.items()}}
