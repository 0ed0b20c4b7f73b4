"""The validation samples of a run: which ones, what is asked about each, and that they have nothing of the training's.

A sample's question is its own; its candidate answers are those of lmms-eval's `_score` tasks (`eval_tasks`).
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.checking import read_image
from vitask_plugin.data.comparison import Seen, check_prepared
from vitask_plugin.data.instructions import answers_of, question_text, same_task
from vitask_plugin.data.shared_files import shared_files
from vitask_plugin.data.splits import check_not_test
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import inside, sha256_file
from vitask_plugin.inference.asking import Query
from vitask_plugin.training import agreement
from vitask_plugin.training.samples import TaskSamples, named
from vitask_plugin.tsm.overlap import shared_groups


@dataclass(frozen=True)
class Judged:
    """What is asked about one sample.

    Attributes:
        query: without an exemplar. exemplar: what one is made of, None where the run has none.
        answers: one per class; of a multi-label sample one per label alone, then that of none. The sample's own answer
            comes last where it is not among them.
        candidates: how many of them the first ones are. own: which of them is the sample's.
    """

    query: Query
    exemplar: Tensor | None
    answers: list[str]
    candidates: int
    own: int


class ValidationSamples(TaskSamples):
    """The samples with a `vitask` block of --vitask_eval_data, or `--vitask_eval_samples` of them.

    Args:
        train: the run's training samples. seed: of the choice.

    Raises:
        VITaskError: a test split by its name, no sample with a `vitask` block, a task or label set that training does
            not have, images unlike those of training, images or groups that training has too, fewer samples
            wanted than there are tasks, and what `TaskSamples` refuses.
    """

    purpose, otherwise = "validate on", "leave --vitask_eval_data out"

    def __init__(self, vitask: VITaskArguments, train: TaskSamples, seed: int) -> None:
        path, wanted = vitask.vitask_eval_data, vitask.vitask_eval_samples
        check_not_test(path, "--vitask_eval_data")
        alone = replace(vitask, vitask_crt_weight=0.0)  # a validation round contrasts nothing
        super().__init__(path, train.image_folder, train.tokenizer, alone, train.reserved)
        _check_tasks(self, train)
        if agreement.is_first_of_node():  # it reads files
            _check_apart(self, train)
        check_prepared(
            Seen("this run is trained", train.seen.images, train.seen.tasks),
            self.seen,
            "give a --vitask_eval_data of such images",
        )
        if 0 < wanted < len(self.tasks):  # the best checkpoint is chosen by the mean over all of them
            raise VITaskError(
                f"--vitask_eval_samples {wanted} is fewer than the {len(self.tasks)} sets of --vitask_eval_data "
                f"{path!r}, some of which would have no part in the mean; give at least {len(self.tasks)}"
            )
        labelled = [sample for sample in self.list_data_dict if "vitask" in sample]
        self.list_data_dict = labelled if wanted == 0 else [labelled[i] for i in chosen(labelled, wanted, seed)]

    def __len__(self) -> int:
        return len(self.list_data_dict)

    def judged(self, index: int, exemplar: Tensor | None) -> Judged:
        """A sample, its image read. `exemplar`: what its exemplar is made of.

        Raises:
            VITaskError: naming sample and file.
        """
        sample = named(self.list_data_dict, index)
        block, (asked, answered) = sample["vitask"], sample["conversations"][:2]
        answers = answers_of(block["choices"], multi_label=isinstance(block["label"], list))
        candidates, own = len(answers), answered["value"].strip()
        if own not in answers:
            answers.append(own)
        question = question_text(asked["value"])  # the image comes first, as in training
        query = Query(question, [read_image(sample, self.image_folder)], block["task"])
        return Judged(query, exemplar, answers, candidates, answers.index(own))

    def digests(self) -> dict[str, str]:
        """`{what: hex digest}` for the ranks to compare."""
        return {"validation data": sha256_file(self.data_path)}


def chosen(samples: Sequence[Mapping[str, Any]], wanted: int, seed: int) -> list[int]:
    """`wanted` of the samples, in their order: as many of each task as of another, as far as it has them, and of its
    classes as they come, one at least of each if there is room."""
    tasks: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        tasks[sample["vitask"]["task"]].append(index)
    found: list[int] = []
    by_size = sorted(tasks.values(), key=len)
    for place, indices in enumerate(by_size):
        share = (wanted - len(found)) // (len(by_size) - place)
        found += _stratified(indices, [_label(samples[index]) for index in indices], share, seed)
    return sorted(found)


def _label(sample: Mapping[str, Any]) -> Hashable:
    label = sample["vitask"]["label"]
    return tuple(label) if isinstance(label, list) else label


def _stratified(indices: Sequence[int], labels: Sequence[Hashable], wanted: int, seed: int) -> list[int]:
    classes: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in zip(indices, labels, strict=True):
        classes[label].append(index)
    draw = random.Random(seed)
    ranked = []
    for members in classes.values():
        draw.shuffle(members)
        # The n-th of a class stands at n / its size, so that any first part holds the classes as they come.
        ranked += [((place + 0.5) / len(members) if place else 0.0, index) for place, index in enumerate(members)]
    return [index for _, index in sorted(ranked)[:wanted]]


def _check_tasks(samples: TaskSamples, train: TaskSamples) -> None:
    for task, entry in samples.tasks.items():
        known = train.tasks.get(task)
        if known is None:
            raise VITaskError(
                f"--vitask_eval_data {samples.data_path!r} has the task {task!r}, and --data_path {train.data_path!r} "
                f"has {', '.join(map(repr, train.tasks))} alone; give validation samples of the tasks of training"
            )
        if not same_task(known, entry):
            raise VITaskError(
                f"--vitask_eval_data {samples.data_path!r} has the labels {entry['choices']!r} for task {task!r}, and "
                f"--data_path {train.data_path!r} has {known['choices']!r}; give both with one list in one order"
            )


def _check_apart(samples: TaskSamples, train: TaskSamples) -> None:
    both = f"--vitask_eval_data {samples.data_path!r} and --data_path {train.data_path!r}"
    blocks = ([one["vitask"] for one in each.list_data_dict if "vitask" in one] for each in (train, samples))
    sentence = shared_groups(*blocks)
    if sentence is not None:
        raise VITaskError(f"{both}: {sentence}; split whole groups, as `vitask data folder --group` does")
    paths = ([inside(each.image_folder, image) for image in each.images()] for each in (train, samples))
    pairs = shared_files(*paths)
    if pairs:
        same = (
            "" if pairs[0][0] == pairs[0][1] else f", which holds what {str(pairs[0][1])!r} of the training data does"
        )
        raise VITaskError(
            f"{both} share {len(pairs)} of {len(samples.images())} validation images, the first being "
            f"{str(pairs[0][0])!r}{same}; split the images, so that none is in both"
        )
