"""What the exemplars of a run's samples are made of: TSM features, the words of its prediction, or nothing."""

from typing import Any

import torch

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.contents import Contents
from vitask_plugin.data.instructions import same_task
from vitask_plugin.errors import VITaskError
from vitask_plugin.files import digest_of, sha256_file
from vitask_plugin.training.samples import TaskSamples
from vitask_plugin.tsm.features import FeatureStore
from vitask_plugin.tsm.joint import Tasks
from vitask_plugin.tsm.predicted import predicted_answer


class Exemplars:
    """Of the samples with a `vitask` block, by their number.

    Args:
        contents: what is in the samples' images; each must be what its feature was extracted from.
        features: None where no TSM is used.
        tsm_tasks: of the TSM, by name; needed with `--vitask_ep text` alone.

    Raises:
        VITaskError: naming the first image that is unknown to the store or has changed, or a task that the TSM has
            other labels for.
    """

    def __init__(
        self,
        vitask: VITaskArguments,
        dataset: TaskSamples,
        contents: Contents,
        features: FeatureStore | None = None,
        tsm_tasks: Tasks | None = None,
    ) -> None:
        self.kind, self.features = vitask.vitask_ep, features
        self._samples, self._tokenizer = dataset.list_data_dict, dataset.tokenizer
        self._contents, self._tsm_tasks = contents, tsm_tasks or {}
        if features is None:
            return
        if self.kind == "text":
            _check_words(dataset, self._tsm_tasks)
        for image in dataset.task_images():
            features.check_image(image, contents.sha256(image))

    def of(self, index: int) -> torch.Tensor | None:
        """What a sample's exemplar is made of, None for a sample without a `vitask` block.

        [E, F] float32 TSM features; for `learned` [1, 0], nothing; for `text` [E] int64 token ids of the TSM's
        prediction.
        """
        sample = self._samples[index]
        if "vitask" not in sample or self.kind == "none":
            return None
        if self.kind == "learned":
            return torch.zeros(1, 0)
        image = sample["image"]
        if self.kind == "text":
            words = predicted_answer(self._tsm_tasks, self.features.logits(image), sample["vitask"]["task"])
            return torch.tensor(self._tokenizer(words, add_special_tokens=False).input_ids)
        return self.features.get(image, self._contents.sha256(image))

    def none(self) -> torch.Tensor:
        """An exemplar of no tokens, of the kind that the others are."""
        if self.kind == "text":
            return torch.zeros(0, dtype=torch.int64)
        return torch.zeros(0, 0 if self.features is None else self.features.width)


def digests(dataset: Any, contents: Contents, features: FeatureStore | None) -> dict[str, str]:
    """`{what: hex digest}` of what a sample is made of, for the ranks to compare.

    Images count by their content where a TSM looked at them, else by their size.

    Args:
        dataset: a host's, of `TaskSamples`.
    """
    first = dataset[0]
    found = {
        "data": sha256_file(dataset.data_path),
        "images": contents.digest(dataset.images()),
        "tokens": digest_of([first[name].tolist() for name in ("input_ids", "labels")]),
    }
    return found if features is None else {**found, "TSM": features.tsm_hash}


def _check_words(dataset: TaskSamples, tsm_tasks: Tasks) -> None:
    for task, entry in dataset.tasks.items():
        known = tsm_tasks.get(task)
        if known is None or not same_task(known, entry):
            found = known and known["choices"]
            raise VITaskError(
                f"{dataset.data_path!r}: task {task!r} has the labels {entry['choices']!r}, the TSM's labels for it "
                f"are {found!r}; --vitask_ep text needs a TSM that was trained on this task"
            )
