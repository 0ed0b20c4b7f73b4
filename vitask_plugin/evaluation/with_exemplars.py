"""Exemplar prompting (EP): the task-specific model (TSM) runs beside the VLM on the same image.

What an exemplar is, the checkpoint's vitask.json says: TSM features, or in the controls a learned prefix or the TSM's
prediction in words. Which documents get one, `exemplars` says: those of a task that the checkpoint was trained on.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from vitask_plugin import model_folder
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.exemplars import Prompting, read_ep
from vitask_plugin.inference.asking import Query, alike
from vitask_plugin.method.connector import LEARNED
from vitask_plugin.record import checkpoint
from vitask_plugin.record.swap import check_tsm
from vitask_plugin.tsm.model import TSM, TSMOutput
from vitask_plugin.tsm.predicted import predicted_answer, task_of


class WithExemplars:
    """What a model that is asked has for exemplars, or for none.

    Attributes:
        model, tokenizer, device, record, folders: of the checkpoint, set before `open_exemplars`.
        prompting: which documents get an exemplar; None: none does. tsm: None without one.
        learned: whether the exemplar is a learned prefix.
        log: what its words go to, logging's or loguru's.
    """

    log: ClassVar[Any] = logging.getLogger(__name__)
    model: Any
    tokenizer: Any
    device: torch.device
    record: dict[str, Any] | None
    folders: list[Path]

    def open_exemplars(
        self, ep: bool | str | None, tsm: str | None, connector: str | None, *, force: bool, trust_code: bool
    ) -> None:
        """See `--model_args` in `lmms_base`.

        Raises:
            VITaskError: the checkpoint has no exemplars, or a TSM that means nothing to its connector.
        """
        self.prompting = self._prompting(tsm, ep)
        self.tsm: TSM | None = None
        if self.prompting and tsm is not None:
            self.tsm = TSM.load(tsm, self.device, trust_code=trust_code)
            self._check_swap(self.tsm, connector, tsm, force=force)
        self.learned = self.prompting is not None and self.tsm is None

    def _prompting(self, folder: str | None, ep: bool | str | None) -> Prompting | None:
        """Which documents get exemplars, if checkpoint and TSM allow it; None without exemplars."""
        wanted, everywhere = read_ep(ep, folder)
        if not wanted:
            return None
        kind = self.record and self.record["ep"]
        if kind == LEARNED and folder is not None:
            raise VITaskError(
                f"checkpoint {str(self.folders[0])!r} was trained with a learned prefix, which no TSM has a part in; "
                "give ep=True without tsm"
            )
        if kind != LEARNED and folder is None:
            raise VITaskError("ep=True needs the task-specific model; add tsm=DIR to --model_args, or set ep=False")
        if self.record is None or (kind != "text" and self.model.vitask_connector is None):
            missing = model_folder.CONNECTOR_FILE if self.record else checkpoint.RECORD_FILE
            raise VITaskError(
                f"checkpoint {str(self.folders[0])!r} cannot be prompted with exemplars, for it has no {missing}; "
                "evaluate it with ep=False and without tsm"
            )
        return Prompting(self.record.get("tasks", {}), everywhere)

    def _check_swap(self, tsm: TSM, connector: str | None, folder: str, *, force: bool) -> None:
        """A word on plug-and-play if the TSM is not the one of training."""
        trained = self.folders[0]
        warning = check_tsm(self.record, tsm, checkpoint=trained, connector=connector, folder=folder, force=force)
        fitted = self.record.get("fitted")
        if warning:
            self.log.warning(warning)
        elif fitted:
            how = "aligned" if fitted.get("aligned") else "refitted"
            self.log.info(
                f"plug-and-play: TSM {tsm.hash[:12]} through a connector {how} to it on the frozen VLM, which was "
                f"trained with TSM {fitted['tsm'][:12]}"
            )
        elif tsm.hash != self.record["tsm"]["hash"]:
            self.log.info(
                f"plug-and-play: words of TSM {tsm.hash[:12]} in place of TSM {self.record['tsm']['hash'][:12]}"
            )

    def exemplars_of(self, queries: Sequence[Query]) -> list[torch.Tensor | None]:
        """What each query's exemplar is made of, see `Exemplars`; queries about one image of one task share theirs."""
        numbers = [number for number, query in enumerate(queries) if query.prompted]
        if (self.tsm is None and not self.learned) or not numbers:
            return [None] * len(queries)
        own, first = alike([(queries[number].pixels, queries[number].task) for number in numbers])
        prompted = [queries[numbers[i]] for i in first]
        if self.learned:
            found = [torch.zeros(1, 0, device=self.device) for _ in prompted]
        elif self.record["ep"] == "text":
            found = [torch.tensor(ids, device=self.device) for ids in self._predicted_words(prompted)]
        else:
            found = list(self._exemplar_tokens([query.images[0] for query in prompted]))
        exemplars: list[torch.Tensor | None] = [None] * len(queries)
        for number, place in zip(numbers, own, strict=True):
            exemplars[number] = found[place]
        return exemplars

    def _exemplar_tokens(self, images: list[Image.Image]) -> torch.Tensor:
        """TSM features [B, E, F] of the images."""
        return self.tsm.tokens(self._see(images), self.model.vitask_arguments.exemplar_tokens)

    def _predicted_words(self, queries: Sequence[Query]) -> list[list[int]]:
        """Token ids of what the TSM itself predicts for each query's image."""
        tasks, logits = self.tsm.record["tasks"], self._see([query.images[0] for query in queries]).logits
        words = [
            predicted_answer(tasks, own, task_of(tasks, query.task)) for own, query in zip(logits, queries, strict=True)
        ]
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in words]

    def _see(self, images: list[Image.Image]) -> TSMOutput:
        return self.tsm(torch.stack([self.tsm.preprocess(image) for image in images]).to(self.device))
