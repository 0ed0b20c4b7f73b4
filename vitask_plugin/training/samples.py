"""The samples of a run, whatever host makes tokens of them: read, checked, and who may be whose negative."""

import os
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.checking import check_images
from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.data.comparison import Seen
from vitask_plugin.data.instructions import read_samples, tasks_of
from vitask_plugin.data.names import plain
from vitask_plugin.data.preparation import seen_in
from vitask_plugin.data.questions import questions_of
from vitask_plugin.data.reserved import check_turns
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import check_folder, inside
from vitask_plugin.method.negatives import NO_INSTRUCTION, Negatives
from vitask_plugin.method.sampler import Contrasted, Epoch
from vitask_plugin.training.peers import node_share

PAIRS = 16  # of samples that a self-test looks at for answers that are not cut off


class TaskSamples:
    """The samples of a data file, and for those with a `vitask` block who can be whose negative.

    A host's data set inherits it and says what a sample's tokens are (`__getitem__`, with "input_ids" and "labels").

    Args:
        reserved: strings that the run's template or tokenizer gives a meaning.

    Attributes:
        list_data_dict: the samples, as in LLaVA's JSON.
        negatives: who can be whose negative; None without CRT.
        seen: what its task images are, for the record and to compare with the TSM's.
        questions: how its tasks are asked, for the record.
        epoch: that a sampler of them goes by.

    Raises:
        VITaskError: the JSON is not LLaVA's, an image is missing, broken or outside the image folder, a turn of a
            sample with a `vitask` block holds one of `reserved`, or CRT is on and a task has a single answer (no image
            could be a negative).
    """

    purpose, otherwise = "align or contrast", "train without --vitask"

    def __init__(
        self, data_path: str, image_folder: str, tokenizer: Any, vitask: VITaskArguments, reserved: Sequence[str]
    ) -> None:
        samples = read_samples(data_path)
        self.list_data_dict, self.tokenizer, self.image_folder = samples, tokenizer, image_folder
        self.data_path, self.reserved = data_path, reserved
        self.tasks, self.questions = tasks_of(samples), questions_of(samples)
        check_folder(image_folder, "image folder")
        first_with: dict[str, int] = {}
        for index, sample in enumerate(samples):
            if "image" in sample:
                first_with.setdefault(sample["image"], index)
        number, processes = node_share()  # the processes of a node share the looking
        for image, index in islice(first_with.items(), number, None, processes):
            try:
                if not os.path.isfile(inside(image_folder, image)):
                    raise VITaskError(
                        f"image {image!r} is not in the image folder {image_folder!r}; check --image_folder"
                    )
            except VITaskError as error:
                raise VITaskError(f"sample {named(samples, index)['id']!r} of {data_path!r}: {error}") from None
        if not self.tasks:
            raise VITaskError(
                f"{data_path!r} has no sample with a 'vitask' block, so there is nothing to {self.purpose}; "
                f"write it with `vitask data`, or {self.otherwise}"
            )
        check_turns(samples, reserved, data_path)
        self.negatives: Negatives | None = None
        if vitask.uses_negatives:
            self.negatives = Negatives(**_identities(samples))
            self._check_negatives(samples, data_path)
        with_images = [named(samples, index) for index in first_with.values()]
        check_images(with_images, image_folder, vitask.vitask_check_images, (number, processes))
        self.seen: Seen = seen_in(samples, image_folder, data_path)
        self.epoch = Epoch()

    def _check_negatives(self, samples: list[dict], data_path: str) -> None:
        if self.negatives.unmatched:
            first = samples[self.negatives.unmatched[0]]
            task = first["vitask"]["task"]
            count = sum(sample.get("vitask", {}).get("task") == task for sample in samples)
            raise VITaskError(
                f"{data_path!r}: none of the {count} samples of task {task!r} has another label and another answer "
                f"than sample {first.get('id')!r}, so CRT has no negative image for it; add samples of another class, "
                "or set --vitask_crt_weight 0"
            )

    def set_epoch(self, epoch: int) -> None:
        """Where a run is resumed on several processes, accelerate tells the data set and not the sampler."""
        self.epoch.number = epoch

    def forget_sizes(self) -> None:
        """Its images may be of another size, or prepared in another way, than those of checkpoint and TSM."""
        self.seen = Seen(self.seen.who, None)

    @property
    def first_task_sample(self) -> int:
        """Number of the first sample with a `vitask` block."""
        return next(number for number, sample in enumerate(self.list_data_dict) if "vitask" in sample)

    def pairs(self, contrasted: bool) -> Iterator[list[Contrasted]]:
        """At most `PAIRS` times two samples with a `vitask` block, each other's negative if `contrasted`; one alone is
        taken twice."""
        asked = [number for number, sample in enumerate(self.list_data_dict) if "vitask" in sample]
        for place, first in enumerate(asked[:PAIRS]):
            others = iter(asked[place + 1 :] + asked[:place])
            if contrasted:
                second = next(number for number in others if self.negatives.contrast(first, number))
                yield [Contrasted(first, second), Contrasted(second, first)]
            else:
                yield [Contrasted(first, -1), Contrasted(next(others, first), -1)]

    def images(self) -> list[str]:
        """Paths of all images, each once."""
        return list(dict.fromkeys(sample["image"] for sample in self.list_data_dict if "image" in sample))

    def task_images(self) -> list[str]:
        """Paths of the images of samples with a `vitask` block, each once."""
        return list(dict.fromkeys(sample["image"] for sample in self.list_data_dict if "vitask" in sample))


def named(samples: Sequence[dict], index: int) -> dict:
    """A sample as errors name it: by its place in the file where it has no id."""
    return samples[index] if samples[index].get("id") is not None else {**samples[index], "id": index}


def _identities(samples: list[dict]) -> dict[str, list[int]]:
    """The arguments of `Negatives`.

    All are compared by what can be seen of them (`plain`). Questions as they are asked: upstream puts the image first,
    wherever <image> stands. Labels by their names, in any order and letter case; answers in any letter case.
    """
    numbers: dict[tuple, int] = {}
    ids: dict[str, list[int]] = {name: [] for name in ("instruction_ids", "label_ids", "response_ids", "task_ids")}
    for sample in samples:
        for name, thing in _compared(sample).items() if "vitask" in sample else dict.fromkeys(ids).items():
            ids[name].append(NO_INSTRUCTION if thing is None else numbers.setdefault((name, thing), len(numbers)))
    return ids


def _compared(sample: dict[str, Any]) -> dict[str, Any]:
    block, turns = sample["vitask"], sample["conversations"]
    labels = block["label"] if isinstance(block["label"], list) else [block["label"]]
    asked, answers = ([turn["value"] for turn in turns if turn["from"] == who] for who in ("human", "gpt"))
    return {
        "instruction_ids": tuple(plain(question.replace(IMAGE_TOKEN, "")) for question in asked),
        "label_ids": tuple(sorted(plain(block["choices"][label]).casefold() for label in labels)),
        "response_ids": tuple(plain(answer).casefold() for answer in answers),
        "task_ids": block["task"],
    }
