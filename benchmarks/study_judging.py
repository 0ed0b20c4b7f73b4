"""Label scores of a model on a split, by the code of validation rounds, and the figures that a row of the study holds.

N samples, K classes.
"""

import string
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import survey
from vitask_plugin.data.instructions import read_samples
from vitask_plugin.data.label_file import read_labels
from vitask_plugin.hf import loading
from vitask_plugin.hf.asking import HFAsker
from vitask_plugin.hf.conversation import Template, reserved_strings
from vitask_plugin.hf.prompting import Prompter
from vitask_plugin.inference import metrics
from vitask_plugin.inference.metrics import Outcome, Probabilities
from vitask_plugin.method.branches import LAYOUTS
from vitask_plugin.training import starting
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.training.validation_round import scored_samples
from vitask_plugin.training.validation_samples import ValidationSamples

DIGITS = string.digits + string.ascii_lowercase  # a class each, so that N answers are one word


class SplitSamples(ValidationSamples):
    """All samples of a file; what is theirs and not the training's was made sure of where they were split."""

    def __init__(self, path: Path, images: Path, template: Template, vitask: VITaskArguments) -> None:
        tokenizer, alone = template.tokenizer, replace(vitask, vitask_crt_weight=0.0)
        TaskSamples.__init__(self, str(path), str(images), tokenizer, alone, reserved_strings(tokenizer))


class Judge:
    """A model in eval mode, and what its exemplars are made of.

    Args:
        vitask: flags of its exemplars. batch: samples of a forward. bf16: all but the head is computed in it.
    """

    def __init__(self, model: Any, template: Template, vitask: VITaskArguments, *, batch: int, bf16: bool) -> None:
        self.model, self.template, self.vitask, self.batch, self.bf16 = model, template, vitask, batch, bf16

    @classmethod
    def of(cls, checkpoint: Path, vitask: VITaskArguments, **how: Any) -> "Judge":
        """Of a checkpoint of the HF host, or of a model that was not tuned."""
        loaded = loading.load(checkpoint, device="cuda" if torch.cuda.is_available() else "cpu")
        return cls(loaded.model, loaded.template, vitask, **how)

    @torch.no_grad()
    def scores(self, data: Path, images: Path) -> dict[bool, np.ndarray]:
        """Log-likelihoods [N, K] of all labels, without an exemplar and, where there are any, with it."""
        samples = SplitSamples(data, images, self.template, self.vitask)
        names = samples.task_images()
        contents = survey(str(images), names, frozenset(names), [])
        found = starting.open_store(Path(self.vitask.vitask_features), self.vitask) if self.vitask.uses_tsm else ()
        exemplars = Exemplars(self.vitask, samples, contents, *found)
        asker = HFAsker(self.model, Prompter(self.template), self.model.device)
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            scored = scored_samples(
                samples,
                exemplars,
                asker,
                _Exact(self.model, self.bf16),
                layout=LAYOUTS["packed"],
                batch_size=self.batch,
                workers=0,
                ready=lambda one: one if one is None else one.to(device),
            )
        return {
            prompted: -np.array([one[prompted].losses for one in scored], dtype=np.float64) for prompted in scored[0]
        }


class _Exact(nn.Module):
    """The model whose head computes in float32, also where all else does not: what tells labels apart is small."""

    def __init__(self, model: Any, half: bool) -> None:
        super().__init__()
        self.model, self.half = model, half

    def vitask_states(self, *given: Any) -> Tensor:
        return self.model.vitask_states(*given)

    def lm_head(self, states: Tensor) -> Tensor:
        with torch.autocast(states.device.type, enabled=False):
            return self.model.lm_head(states.to(self.model.lm_head.weight.dtype))


def labels_of(data: Path) -> tuple[np.ndarray, str]:
    """Class indices [N] of a single-label file, and `medmnist`'s word for its kind."""
    blocks = [sample["vitask"] for sample in read_samples(data) if "vitask" in sample]
    return np.array([block["label"] for block in blocks]), read_labels(data.parent, "label set")["type"]


def figures(scores: np.ndarray, labels: np.ndarray, kind: str, tsm: np.ndarray | None = None) -> dict[str, Any]:
    """What a row says of one split.

    Args:
        scores: [N, K] log-likelihoods. labels: [N]. tsm: the TSM's scores [N, K], to be compared with.
    """
    likely = [metrics.probabilities(-row, kind) for row in scores]
    answers = np.array([metrics.decide(one, kind) for one in likely])
    outcomes = [Outcome(int(label), int(answer)) for label, answer in zip(labels, answers, strict=True)]
    items = [Probabilities(int(label), one, kind) for label, one in zip(labels, likely, strict=True)]
    own = np.array([one[label] for one, label in zip(likely, labels, strict=True)])
    found: dict[str, Any] = {
        "n": len(labels),
        "accuracy": round(metrics.accuracy(outcomes), 4),
        "balanced_accuracy": round(metrics.balanced_accuracy(outcomes), 4),
        "macro_f1": round(metrics.macro_f1(outcomes), 4),
        "auc": _number(metrics.auc(items)) if len(set(labels.tolist())) == scores.shape[1] else None,
        "loss": round(float(-np.log(own.clip(1e-12)).mean()), 4),
        "ece": round(float(metrics.ece(items)), 4),
        "kappa": _number(metrics.quadratic_kappa(outcomes)) if kind.startswith("ordinal") else None,
        "answers": _word(answers),
        "labels": _word(labels),
    }
    if tsm is not None:
        found |= against(
            answers, np.array([metrics.decide(metrics.probabilities(-row, kind), kind) for row in tsm]), labels
        )
    return found


def against(answers: np.ndarray, others: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How often the answers are the TSM's, and who is right where they are not."""
    apart = answers != others
    return {
        "agrees_with_tsm": round(float((~apart).mean()), 4),
        "where_they_differ": {
            "model_right": int((apart & (answers == labels)).sum()),
            "tsm_right": int((apart & (others == labels)).sum()),
            "neither": int((apart & (answers != labels) & (others != labels)).sum()),
        },
    }


def _word(classes: Sequence[int] | np.ndarray) -> str:
    return "".join(DIGITS[int(one)] for one in classes)


def _number(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
