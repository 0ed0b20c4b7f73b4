"""What a VITask batch holds beyond upstream's: TSM features, negative images, and the branches of each sample."""

from collections.abc import Sequence
from typing import Any

import torch
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.llava.conversations import reserved_strings
from vitask_plugin.llava.expansion import expanded_rows
from vitask_plugin.llava.images import read_by_us
from vitask_plugin.method.layout import branches_of
from vitask_plugin.method.sampler import Contrasted
from vitask_plugin.training.samples import TaskSamples, named


class VITaskDataset(TaskSamples, LazySupervisedDataset):
    """Upstream's dataset, and what `TaskSamples` knows of its samples."""

    def __init__(self, data_path: str, tokenizer: Any, data_args: Any, *, vitask: VITaskArguments) -> None:
        # Upstream's __init__ names its class in super(), and that name is ours in its module; all that it does beyond
        # reading the file is this.
        self.data_args = data_args
        super().__init__(data_path, data_args.image_folder, tokenizer, vitask, reserved_strings(tokenizer))

    def __getitem__(self, item: int | Contrasted) -> dict[str, Any]:
        """Upstream's instance plus `index`, `tsm_features`, and `negative` where the sampler chose one."""
        index = item.index if isinstance(item, Contrasted) else item
        with read_by_us(named(self.list_data_dict, index), self.image_folder):
            instance = super().__getitem__(index)
        instance["index"] = index
        if isinstance(item, Contrasted):
            instance["negative"] = item.negative
        instance["tsm_features"] = self._exemplar(index)
        return instance


class VITaskCollator(DataCollatorForSupervisedDataset):
    """Upstream's batch plus `vitask`: TSM features, and the branches of the batch, laid out (see `layout`).

    With CRT the instances are of `Contrasted` items. A negative image that no row of the batch holds becomes an extra
    row, one for each such image.
    """

    def __init__(self, tokenizer: Any, *, vitask: VITaskArguments) -> None:
        super().__init__(tokenizer=tokenizer)
        self.vitask = vitask
        self.dataset: VITaskDataset | None = None
        self.image_tokens = 0

    def attach(self, dataset: VITaskDataset, *, image_tokens: int) -> None:
        """What the trainer knows and upstream's constructor is not told.

        Args:
            image_tokens: tokens that the vision tower makes of one image.
        """
        self.dataset, self.image_tokens = dataset, image_tokens

    def __call__(self, instances: Sequence[dict[str, Any]]) -> dict[str, Any]:
        negatives, extra = [-1] * len(instances), []
        if self.vitask.uses_negatives:
            negatives, extra = self.negative_rows(instances)
        items = [*instances, *(self._prefix_row(instances[sample], image) for sample, image in extra)]
        batch = super().__call__([{key: item[key] for key in ("input_ids", "labels", "image")} for item in items])
        lengths, slots, features = [0] * len(instances), 0, {}
        if self.vitask.uses_exemplar:
            none = self.dataset.no_exemplar()
            found = [none if item["tsm_features"] is None else item["tsm_features"] for item in instances]
            lengths = [len(feature) for feature in found]
            # At least one slot, so that the connector runs on every rank.
            padded = pad_sequence([*found, none.new_zeros(1, *none.shape[1:])], batch_first=True)[:-1]
            slots, features = padded.shape[1], {"features": padded}
        limit = self.tokenizer.model_max_length
        rows, width = expanded_rows(
            batch["input_ids"], batch["attention_mask"], batch["labels"], image_tokens=self.image_tokens, limit=limit
        )
        branches = branches_of(
            rows,
            width,
            negatives,
            lengths,
            [int((item["labels"] != IGNORE_INDEX).sum()) for item in instances],
            slots=slots,
            replaces=self.vitask.vitask_ep == "replace",
            limit=limit,
            engine=self.vitask.vitask_engine,
        )
        relaxed = self.dataset.negatives.relaxed if self.vitask.uses_negatives else ()
        branches.counts["relaxed_negatives"] = sum(instance["index"] in relaxed for instance in instances)
        branches.unanswered = [instances[sample]["index"] for sample in branches.unanswered]
        return {**batch, "vitask": {"branches": branches, **features}}

    def negative_rows(self, instances: Sequence[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The row of each sample's negative (-1: it has none), and the extra rows as (sample, data set index)."""
        dataset = self.dataset
        rows, extra = [-1] * len(instances), []
        # Image -> a row that holds it behind the same prefix: upstream puts a task sample's image first in its turn.
        holding: dict[str, int] = {}
        for row, instance in enumerate(instances):
            if "vitask" in dataset.list_data_dict[instance["index"]]:
                holding.setdefault(dataset.list_data_dict[instance["index"]]["image"], row)
        for sample, instance in enumerate(instances):
            negative = instance["negative"]
            if negative >= 0:
                new = len(instances) + len(extra)
                rows[sample] = holding.setdefault(dataset.list_data_dict[negative]["image"], new)
                if rows[sample] == new:
                    extra.append((sample, negative))
        return rows, extra

    def _prefix_row(self, instance: dict[str, Any], image: int) -> dict[str, Any]:
        """The sample's tokens up to its image, with another sample's image: a prefix for its negative branch."""
        last = int((instance["input_ids"] == IMAGE_TOKEN_INDEX).nonzero()[-1])
        prefix = instance["input_ids"][: last + 1]
        return {
            "input_ids": prefix,
            "labels": torch.full_like(prefix, IGNORE_INDEX),
            "image": self.dataset[image]["image"],
        }
