"""What every host's collator does alike: negatives, exemplars, and the branches of a batch."""

from collections.abc import Sequence
from typing import Any

from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.method.branches import IGNORE
from vitask_plugin.method.layout import Asked, Row, branches_of
from vitask_plugin.training.exemplars import Exemplars
from vitask_plugin.training.samples import TaskSamples


def pad_of(tokenizer: Any) -> int:
    """The token id that rows are padded with; the mask hides it."""
    pad = tokenizer.pad_token_id
    return tokenizer.eos_token_id if pad is None else pad


class BranchedBatches:
    """A host's collator inherits it, and makes rows of tokens of the instances.

    With CRT the instances are of `Contrasted` items. A negative image that no row of the batch holds becomes an extra
    row, one for each such image.

    Args:
        dataset: what the instances are of. exemplars: of its samples. vitask: the flags.
        kwargs: of the host's own collator.

    Attributes:
        engine: that batches are laid out for.
    """

    def __init__(self, dataset: TaskSamples, exemplars: Exemplars, vitask: VITaskArguments, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dataset, self.exemplars, self.vitask = dataset, exemplars, vitask
        self.engine = vitask.vitask_engine

    def settle(self, engine: str) -> None:
        """The engine of all later batches. The self-test finds it, which needs batches, and the DataLoader holds this
        object by then."""
        self.engine = engine

    def contrasted(self, instances: Sequence[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """`negative_rows` with CRT; without it no sample has a negative."""
        return self.negative_rows(instances) if self.vitask.uses_negatives else ([-1] * len(instances), [])

    def negative_rows(self, instances: Sequence[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
        """The row of each sample's negative (-1: it has none), and the extra rows as (sample, data set index)."""
        samples = self.dataset.list_data_dict
        rows, extra = [-1] * len(instances), []
        # Image -> a row that holds it behind the same prefix: a task sample's image is put first in its turn.
        holding: dict[str, int] = {}
        for row, instance in enumerate(instances):
            if "vitask" in samples[instance["index"]]:
                holding.setdefault(samples[instance["index"]]["image"], row)
        for sample, instance in enumerate(instances):
            negative = instance["negative"]
            if negative >= 0:
                new = len(instances) + len(extra)
                rows[sample] = holding.setdefault(samples[negative]["image"], new)
                if rows[sample] == new:
                    extra.append((sample, negative))
        return rows, extra

    def branched(
        self, instances: Sequence[dict[str, Any]], rows: list[Row], width: int, negatives: list[int], *, limit: int
    ) -> dict[str, Any]:
        """The `vitask` part of a batch: its branches and TSM features.

        Args:
            rows: of the instances, then of the extra images. width: W.
            negatives: see `negative_rows`. limit: a branch is cut behind this many positions.
        """
        lengths, slots, features = [0] * len(instances), 0, {}
        if self.vitask.uses_exemplar:
            none = self.exemplars.none()
            own = [self.exemplars.of(item["index"]) for item in instances]
            found = [none if exemplar is None else exemplar for exemplar in own]
            lengths = [len(feature) for feature in found]
            # At least one slot, so that the connector runs on every rank.
            padded = pad_sequence([*found, none.new_zeros(1, *none.shape[1:])], batch_first=True)[:-1]
            slots, features = padded.shape[1], {"features": padded}
        relaxed = self.dataset.negatives.relaxed if self.vitask.uses_negatives else ()
        asked = [
            Asked(item["index"], int((item["labels"] != IGNORE).sum()), length, negative, item["index"] in relaxed)
            for item, length, negative in zip(instances, lengths, negatives, strict=True)
        ]
        branches = branches_of(
            rows,
            asked,
            width=width,
            slots=slots,
            replaces=self.vitask.vitask_ep == "replace",
            limit=limit,
            engine=self.engine,
        )
        return {"branches": branches, **features}
