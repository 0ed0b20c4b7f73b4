"""A checkpoint that is asked about images, whatever its host: what lmms-eval's models and a `Specialist` share.

Knows no harness.
"""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from vitask_plugin.data.comparison import Seen
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.decoding import Decoding
from vitask_plugin.evaluation.with_exemplars import WithExemplars
from vitask_plugin.inference.asking import Query
from vitask_plugin.inference.scoring import LabelScores
from vitask_plugin.record import checkpoint


class AskedModel(WithExemplars):
    """Born complete by `open`, after `prepare`.

    Attributes:
        HOST: of the checkpoint, see `record.host`. rank: of this process; only 0 speaks.
    """

    HOST: ClassVar[str]
    rank: int = 0

    def open(
        self,
        pretrained: str,
        model_base: str | None = None,
        *,
        tsm: str | None = None,
        connector: str | None = None,
        ep: bool | str | None = None,
        dtype: torch.dtype,
        device: torch.device,
        force: bool = False,
        trust_code: bool = False,
    ) -> None:
        """Loads checkpoint and TSM.

        Args:
            see `VITaskModel`; `force` is its swap=force.

        Raises:
            VITaskError: damaged files, or a TSM that means nothing to the connector.
        """
        self.device = device
        self.folders = [Path(folder) for folder in (pretrained, model_base, tsm, connector) if folder]
        self.connector_folder = connector or pretrained
        self.load(pretrained, model_base, connector=connector, dtype=dtype, device=device)
        self.open_exemplars(ep, tsm, connector, force=force, trust_code=trust_code)

    # The host ----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Before anything is loaded.

        Args:
            the host's own.

        Raises:
            VITaskError: one of them is no good.
        """

    @abstractmethod
    def load(self, pretrained: str, base: str | None, **words: Any) -> None:
        """Sets `model`, `tokenizer` and `record`.

        Args:
            words: connector, dtype, device; see the host's `loading.load`.
        """

    @abstractmethod
    def answer(self, queries: list[Query], decoding: Decoding) -> torch.Tensor:
        """Token ids [B, new tokens] of the answers."""

    @abstractmethod
    def score(self, queries: list[Query], answers: list[list[str]]) -> list[LabelScores]:
        """How likely each of a query's answers is."""

    # What it was trained on --------------------------------------------------------------------------------------

    def check_labels(self, who: str, task: str, choices: Sequence[str]) -> None:
        """Refuses other labels for a task than those of training.

        Args:
            who: opens the sentence.
        """
        known = (self.record or {}).get("tasks", {}).get(task, choices)
        if not same_names(choices, known):
            raise VITaskError(
                f"{who} has the label set {list(choices)!r}, but checkpoint "
                f"{str(self.folders[0])!r} was trained on {known!r} for {task!r}; "
                "evaluate it with the labels of its training data"
            )

    def trained(self) -> list[Seen]:
        """The training images of the checkpoint, if it is one of VITask, and of the TSM."""
        found = [] if self.record is None else [checkpoint.trained_on(self.record, self.folders[0])]
        return found if self.tsm is None else [*found, self.tsm.trained_on]
