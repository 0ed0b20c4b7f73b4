"""A data set in the model's own tokens, and its batches: rows as the model takes them, and their branches."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.data.checking import read_image
from vitask_plugin.errors import VITaskError
from vitask_plugin.hf.conversation import Encoded, Template, joined, reserved_strings
from vitask_plugin.method.branches import IGNORE
from vitask_plugin.method.layout import cut_row
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training.batches import BranchedBatches
from vitask_plugin.training.samples import TaskSamples, named


class EncodedSamples(Dataset):
    """Samples of LLaVA's JSON, each as the model's template and processor write it.

    Args:
        samples: see `data.instructions.read_samples`. limit: positions of a sample; what is behind is cut.
    """

    def __init__(self, samples: list[dict], image_folder: str, template: Template, limit: int) -> None:
        self.list_data_dict, self.image_folder = samples, image_folder
        self.template, self.limit = template, limit

    def __len__(self) -> int:
        return len(self.list_data_dict)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encoded(index, index)

    def encoded(self, index: int, image: int) -> dict[str, Any]:
        """{"input_ids", "labels": [T], "end", "inputs"} of a sample, with the image of sample `image`.

        Raises:
            VITaskError: the image takes so many tokens that no answer would be left.
        """
        sample = self.list_data_dict[index]
        pictures = []
        if "image" in sample:
            pictures = [read_image(named(self.list_data_dict, image), self.image_folder)]
        found: Encoded = self.template.encode(sample["conversations"], pictures)
        self._check_room(found, index, image)
        ids, labels = found.ids[: self.limit], found.labels[: self.limit]
        return {"input_ids": ids, "labels": labels, "end": found.end, "inputs": found.inputs}

    def _check_room(self, found: Encoded, index: int, image: int) -> None:
        images = (found.ids == self.template.image_id).nonzero()
        if len(images) and int(images[-1]) + 1 >= self.limit:
            own = named(self.list_data_dict, index)
            raise VITaskError(
                f"sample {own['id']!r}: image {self.list_data_dict[image]['image']!r} takes {len(images)} tokens, and "
                f"--model_max_length {self.limit} would cut it and the answer; give a larger one, smaller images "
                "(`vitask data folder --max-side`), or a processor of fewer pixels"
            )


class PlainBatches:
    """Rows of samples, padded on the right, as the stock forward takes them.

    Args:
        pad: token id of pads.
    """

    def __init__(self, pad: int) -> None:
        self.pad = pad

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids = pad_sequence([item["input_ids"] for item in items], batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(item["input_ids"]) for item in items])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        labels = pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE)
        inputs = joined([item["inputs"] for item in items], ids.shape[1])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, **inputs}


class VITaskDataset(TaskSamples, EncodedSamples):
    """Encoded samples, and what `TaskSamples` knows of them."""

    def __init__(
        self, data_path: str, image_folder: str, template: Template, limit: int, vitask: VITaskArguments
    ) -> None:
        tokenizer = template.tokenizer
        TaskSamples.__init__(self, data_path, image_folder, tokenizer, vitask, reserved_strings(tokenizer))
        self.template, self.limit = template, limit

    def __getitem__(self, item: int | Contrasted) -> dict[str, Any]:
        """A sample in tokens, plus `index`, and `negative` where the sampler chose one."""
        index = item.index if isinstance(item, Contrasted) else item
        instance = {**self.encoded(index, index), "index": index}
        if isinstance(item, Contrasted):
            instance["negative"] = item.negative
        return instance


class VITaskCollator(BranchedBatches, PlainBatches):
    """Rows as the stock forward takes them plus `vitask`: TSM features, and the branches of the batch."""

    dataset: VITaskDataset

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        negatives, extra = self.contrasted(instances)
        items = [*instances, *(self._prefix_row(instances[sample]["index"], image) for sample, image in extra)]
        if not any(item["end"] for item in items):
            # The tower runs on every rank: ZeRO-3 gathers its weights in every call.
            items.append(self._prefix_row(self.dataset.first_task_sample, self.dataset.first_task_sample))
        batch = PlainBatches.__call__(self, items)
        width, image_id = batch["input_ids"].shape[1], self.dataset.template.image_id
        rows = []
        for number, item in enumerate(items):
            is_image = item["input_ids"] == image_id
            rows.append(cut_row(number * width, item["input_ids"], is_image, item["labels"], item["end"]))
        return {**batch, "vitask": self.branched(instances, rows, width, negatives, limit=self.dataset.limit)}

    def _prefix_row(self, sample: int, image: int) -> dict[str, Any]:
        """The sample's tokens up to its instruction, with another sample's image: a prefix for its negative branch."""
        found = self.dataset.encoded(sample, image)
        ids = found["input_ids"][: found["end"]]
        return {**found, "input_ids": ids, "labels": torch.full_like(ids, IGNORE)}
