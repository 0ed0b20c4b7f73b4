"""What a VITask batch holds beyond upstream's: TSM features, negative images, and the branches of each sample."""

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.llava.conversations import reserved_strings
from vitask_plugin.llava.expansion import expanded_rows
from vitask_plugin.llava.images import read_by_us
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training.batches import BranchedBatches
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples, named


class VITaskDataset(TaskSamples, LazySupervisedDataset):
    """Upstream's dataset, and what `TaskSamples` knows of its samples."""

    def __init__(self, data_path: str, tokenizer: Any, data_args: Any, *, vitask: VITaskArguments) -> None:
        # Upstream's __init__ names its class in super(), and that name is ours in its module; all that it does beyond
        # reading the file is this.
        self.data_args = data_args
        super().__init__(data_path, data_args.image_folder, tokenizer, vitask, reserved_strings(tokenizer))

    def __getitem__(self, item: int | Contrasted) -> dict[str, Any]:
        """Upstream's instance plus `index`, and `negative` where the sampler chose one."""
        index = item.index if isinstance(item, Contrasted) else item
        with read_by_us(named(self.list_data_dict, index), self.image_folder):
            instance = super().__getitem__(index)
        instance["index"] = index
        if isinstance(item, Contrasted):
            instance["negative"] = item.negative
        return instance


class VITaskCollator(BranchedBatches, DataCollatorForSupervisedDataset):
    """Upstream's batch plus `vitask`: TSM features, and the branches of the batch, laid out (see `method.layout`).

    Args:
        image_tokens: tokens that the vision tower makes of one image.
    """

    def __init__(
        self, dataset: VITaskDataset, exemplars: Exemplars, vitask: VITaskArguments, *, image_tokens: int
    ) -> None:
        super().__init__(dataset, exemplars, vitask, tokenizer=dataset.tokenizer)
        self.image_tokens = image_tokens

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        negatives, extra = self.contrasted(instances)
        items = [*instances, *(self._prefix_row(instances[sample], image) for sample, image in extra)]
        batch = super().__call__([{key: item[key] for key in ("input_ids", "labels", "image")} for item in items])
        limit = self.tokenizer.model_max_length
        rows, width, labels = expanded_rows(
            batch["input_ids"], batch["attention_mask"], batch["labels"], image_tokens=self.image_tokens, limit=limit
        )
        return {**batch, "labels": labels, "vitask": self.branched(instances, rows, width, negatives, limit=limit)}

    def _prefix_row(self, instance: dict[str, Any], image: int) -> dict[str, Any]:
        """The sample's tokens up to its image, with another sample's image: a prefix for its negative branch."""
        last = int((instance["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()[-1])
        prefix = instance["input_ids"][: last + 1]
        return {
            "input_ids": prefix,
            "labels": torch.full_like(prefix, IGNORE_INDEX),
            "image": self.dataset[image]["image"],
        }
