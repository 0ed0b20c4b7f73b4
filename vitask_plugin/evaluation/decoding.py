"""What a task asks of free text (`generation_kwargs`), in the arguments of transformers' `generate`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vitask_plugin.errors import VITaskError
from vitask_plugin.training.batches import pad_of


@dataclass(frozen=True)
class Decoding:
    """How the answers to one kind of request are made.

    Attributes:
        stops: an answer ends before the first of them. new_tokens: at most.
        temperature: 0 = greedy or beam search; else tokens are drawn, as `top_p` and `top_k` say.
    """

    stops: tuple[str, ...]
    new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    beams: int

    @classmethod
    def of(cls, settings: Mapping[str, Any], new_tokens: int) -> "Decoding":
        """Of a task's settings; `new_tokens`: where it sets no limit."""
        stops = settings.get("until") or []
        temperature = float(settings.get("temperature") or 0)
        samples = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
        return cls(
            (stops,) if isinstance(stops, str) else tuple(stops),
            int(settings.get("max_new_tokens") or new_tokens),
            temperature if samples else 0.0,
            settings.get("top_p") if samples else None,
            settings.get("top_k") if samples else None,
            int(settings.get("num_beams") or 1),
        )

    @property
    def samples(self) -> bool:
        return self.temperature > 0

    def arguments(
        self, tokenizer: Any, folder: Path, *, start: int = 0, processors: Sequence[LogitsProcessor] = ()
    ) -> dict[str, Any]:
        """Of `generate`.

        Args:
            folder: of the checkpoint, for messages. start: how many token ids stand before the answers.
            processors: of the scores, besides those that the settings ask for.
        """
        stopping = StoppingCriteriaList([_StopAt(self.stops, tokenizer, start)]) if self.stops else None
        return {
            "max_new_tokens": self.new_tokens,
            "do_sample": self.samples,
            "temperature": self.temperature if self.samples else None,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "num_beams": self.beams,
            "pad_token_id": pad_of(tokenizer),
            "logits_processor": LogitsProcessorList([_Numbers(folder), *processors]),
            "stopping_criteria": stopping,
        }

    def cut(self, text: str) -> str:
        return _cut(text, self.stops).strip()


def no_numbers(folder: Path) -> VITaskError:
    """What to say of a model whose scores are NaN."""
    return VITaskError(
        f"checkpoint {str(folder)!r} gives NaN in place of scores: its training has diverged, or float16 "
        "is too narrow for it; look at its losses, or give dtype=bfloat16 or float32"
    )


class _Numbers(LogitsProcessor):
    """Refuses scores that are no numbers: the answers would be empty, and count as wrong ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise no_numbers(self.folder)
        return scores


class _StopAt(StoppingCriteria):
    """Ends a row once its text holds one of `stops`."""

    def __init__(self, stops: Sequence[str], tokenizer: Any, start: int) -> None:
        self.stops, self.tokenizer, self.start = stops, tokenizer, start

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :], skip_special_tokens=True)
        return torch.tensor([_cut(text, self.stops) != text for text in texts], device=input_ids.device)


def _cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
