"""One validation round: every sample's answers are scored by one forward, in the branches that the run has.

Image and system text are computed once for both branches, each branch's question once for all of its answers. The
samples are shared out among the processes, and all of them end with all scores.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitask_plugin.errors import VITaskError
from vitask_plugin.inference.asking import Asker
from vitask_plugin.inference.scoring import LabelScores, joined, label_log_likelihoods
from vitask_plugin.method.branches import Layout, Prompts
from vitask_plugin.training import agreement
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.validation_metrics import Scored, check_finite
from vitask_plugin.training.validation_samples import Judged, ValidationSamples
from vitask_plugin.tsm.device import memory_error_as


def scored_samples(
    samples: ValidationSamples,
    exemplars: Exemplars,
    asker: Asker,
    model: Any,
    *,
    layout: type[Layout],
    batch_size: int,
    workers: int,
    ready: Any,
) -> list[dict[bool, Scored]]:
    """The scores of each sample by branch, the same on every process. All of them have to call it.

    Args:
        exemplars: of these samples; without any there is one branch. model: what `asker` asks, out of training.
        batch_size: samples per forward. workers: processes that read images; 0 = this one.
        ready: puts what an exemplar is made of on the model's device, in the dtype of a step.

    Raises:
        VITaskError: an image that cannot be read, on every process; a score that is no number; no room in memory.
    """
    processes, rank = len(agreement.gathered(None)), agreement.rank()
    batches = _batches(len(samples), batch_size, processes)
    numbers = [batch[rank] for batch in batches]
    found: dict[int, dict[bool, Scored]] = {}
    sentence = (
        f"out of memory in a validation round with {batch_size} samples in a batch; give a smaller "
        "--per_device_eval_batch_size"
    )
    reading = DataLoader(_Reading(samples, exemplars, numbers), batch_size=None, num_workers=workers)
    for batch, read in zip(numbers, reading, strict=True):
        judged = _agreed(read)
        with memory_error_as(sentence):
            scores = scores_of(judged, asker, model, layout, exemplars.kind != "none", ready)
        for number, one in zip(batch, scores, strict=True):
            found[number] = one
    everyone: dict[int, dict[bool, Scored]] = {}
    for own in agreement.gathered(found):
        everyone |= own
    with agreement.together():
        for number in range(len(samples)):
            check_finite(everyone[number], f"validation sample {samples.list_data_dict[number].get('id', number)!r}")
    return [everyone[number] for number in range(len(samples))]


def _batches(count: int, size: int, processes: int) -> list[list[list[int]]]:
    """Samples by batch and process: as many batches for each, and no batch without a sample. Under ZeRO-3 a process
    that did another number of forwards would wait for ever; some samples are therefore scored twice, with one result.
    """
    rounds = [list(range(first, min(first + size * processes, count))) for first in range(0, count, size * processes)]
    return [[numbers[rank::processes] or numbers[:1] for rank in range(processes)] for numbers in rounds]


class _Reading(Dataset):
    """Batch of sample numbers -> what is asked about them, or a sentence: an error must leave a worker as one."""

    def __init__(self, samples: ValidationSamples, exemplars: Exemplars, batches: Sequence[Sequence[int]]) -> None:
        self.samples, self.exemplars, self.batches = samples, exemplars, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[Judged] | str:
        try:
            return [self.samples.judged(index, self.exemplars.of(index)) for index in self.batches[number]]
        except VITaskError as error:
            return str(error)


def _agreed(read: list[Judged] | str) -> list[Judged]:
    with agreement.together():
        if isinstance(read, str):
            raise VITaskError(read)
    return read


def scores_of(
    judged: Sequence[Judged], asker: Asker, model: Any, layout: type[Layout], exemplars: bool, ready: Any
) -> list[dict[bool, Scored]]:
    """One batch, in one forward if the layout is packed; see `scored_samples`."""
    branches = [False, True] if exemplars else [False]
    queries = [replace(one.query, prompted=prompted) for prompted in branches for one in judged]
    given: list[Tensor | None] = [None] * len(judged)
    given += [ready(one.exemplar) for one in judged] * exemplars
    prompts = asker.scored(queries, [one.answers for _ in branches for one in judged], given)
    documents, places = joined(prompts.documents)
    whole = label_log_likelihoods(model, Prompts(prompts.pool, documents), layout, most=_most)
    scores = [_part(whole[number], own) for number, own in places]
    by_branch = [scores[number * len(judged) :][: len(judged)] for number in range(len(branches))]
    return [
        {prompted: _scored(one, own) for prompted, own in zip(branches, of_sample, strict=True)}
        for one, *of_sample in zip(judged, *by_branch, strict=True)
    ]


def _most(tokens: int) -> int:
    return max(agreement.gathered(tokens))


def _part(scores: LabelScores, own: slice) -> LabelScores:
    return LabelScores(*(values[own] for values in scores))


def _scored(judged: Judged, scores: LabelScores) -> Scored:
    losses = (-scores.log_likelihoods).tolist()
    on_label = bool(scores.greedy.any())
    return Scored(losses[: judged.candidates], losses[judged.own], int(scores.tokens[judged.own]), on_label)
