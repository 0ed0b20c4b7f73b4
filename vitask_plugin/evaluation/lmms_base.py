"""What our models of lmms-eval have in common, whatever host their VLM is of: arguments, requests, batches, checks."""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from tqdm import tqdm

from vitask_plugin.data.class_names import IMAGE_TOKEN
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import lmms_cache
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.evaluation.calibrated import Calibrations
from vitask_plugin.evaluation.decoding import Decoding
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.evaluation.model_args import (
    ARGUMENTS,
    as_device,
    as_dtype,
    check_calibrated,
    check_folders,
    check_host,
    check_numbers,
    check_prompting,
)
from vitask_plugin.evaluation.pictures import check_images, read_document
from vitask_plugin.evaluation.unread import foreign, unread
from vitask_plugin.inference.asking import Query
from vitask_plugin.tsm.device import memory_error_as


class VITaskModel(AskedModel, lmms_cache.ByContent, lmms):
    """A VLM of some host. Bad input ends the program with one sentence and status 1.

    Args:
        pretrained: folder of a checkpoint, of VITask or not.
        model_base: folder of the model that a LoRA checkpoint was trained from.
        tsm: folder of the TSM, written by `vitask tsm`. For another one than in training (plug-and-play) see `swap`.
        connector: folder of a connector that `vitask connector align` or `fit` made for this checkpoint and that TSM.
        swap: force = take a TSM as wide as the connector's own though it is another; by default that is refused.
        trust_tsm_code: import the Python code that the TSM's tsm.json names, if it names any.
        ep: whether to prompt with exemplars; by default if there is a `tsm`. A learned prefix needs no `tsm`. Documents
            of tasks that the checkpoint was not trained on get none, unless it is "all": every one with one image.
        dtype: float32, bfloat16, float16, or auto: as the weights were saved.
        batch_size: samples per forward. In float32 the answers do not depend on it.
        device: cpu, cuda or cuda:N. By default cuda where there is one; with several processes, one GPU each.
        max_new_tokens: limit for tasks that set none.
        calibrated: scale the label scores as `vitask calibrate` has found, see `calibrated`; answers in words stay.
        image_size: `any` evaluates images of another size, or prepared in another way, than those of training, which
            is refused otherwise.
        own: of the host, see `OWN`.
    """

    NAME: ClassVar[str]
    OWN: ClassVar[tuple[str, ...]] = ()  # what `--model_args` may hold besides `ARGUMENTS`
    log = logger
    rank, world_size = lmms.rank, lmms.world_size

    @exit_on_bad_input
    def __init__(
        self,
        pretrained: str = "",
        model_base: str | None = None,
        tsm: str | None = None,
        connector: str | None = None,
        swap: str | None = None,
        trust_tsm_code: bool = False,
        ep: bool | str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 128,
        image_size: str | None = None,
        calibrated: bool = False,
        max_batch_size: int | None = None,  # lmms-eval hands its --max_batch_size to every model; batch_size decides
        **own: Any,
    ) -> None:
        super().__init__()
        self._check_known(own)
        check_folders(
            self.NAME, {"pretrained": pretrained, "model_base": model_base, "tsm": tsm, "connector": connector}
        )
        check_numbers(batch_size, max_new_tokens)
        check_prompting(ep, tsm, connector, swap, trust_tsm_code)
        if image_size not in (None, "any"):
            raise VITaskError(f"image_size={image_size!r} is unknown; leave it out, or give image_size=any")
        check_host(pretrained, self.HOST)
        check_calibrated(calibrated, own.get("contrast"))
        self.prepare(**own)
        self.any_size = image_size == "any"
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.open(
            pretrained,
            model_base,
            tsm=tsm,
            connector=connector,
            ep=ep,
            dtype=as_dtype(dtype, pretrained),
            device=as_device(device, self.accelerator.local_process_index),
            force=swap == "force",
            trust_code=trust_tsm_code,
        )
        hash_of_tsm = None if self.tsm is None else self.tsm.hash
        self.calibrations = Calibrations(pretrained, hash_of_tsm, connector) if calibrated else None
        self._announced: set[tuple[str, str]] = set()

    def _check_known(self, own: Iterable[str]) -> None:
        unknown = [name for name in own if name not in self.OWN]
        if unknown:
            *names, last = sorted((*ARGUMENTS, *self.OWN))
            raise VITaskError(
                f"--model_args {', '.join(map(repr, unknown))} unknown; {self.NAME} takes {', '.join(names)} and {last}"
            )

    # Requests of the harness -------------------------------------------------------------------------------------

    @exit_on_bad_input
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request."""
        self.announce(requests)
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        for group in groups.values():
            group.sort(key=lambda number: lmms_cache.place(requests[number]))
        answers = [""] * len(requests)
        for batch in self._batches(groups.values(), "Answering"):
            queries = [self._query(requests[number]) for number in batch]
            decoding = Decoding.of(requests[batch[0]].args[1], self.max_new_tokens)
            with self._memory_for(batch), torch.no_grad():
                found = self.answer(queries, decoding)
            texts = self.tokenizer.batch_decode(found, skip_special_tokens=True)
            for number, text in zip(batch, texts, strict=True):
                answers[number] = decoding.cut(text)
        self._warn_of_unread(requests, answers)
        return answers

    @exit_on_bad_input
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(loss, greedy) of each request: the summed negative log-likelihood of its continuation in nats, since the
        harness takes the smallest, and whether greedy decoding would give it.

        All continuations of one prompt are scored in one forward.
        """
        self.announce(requests)
        prompts: dict[tuple, list[int]] = {}
        for number, request in enumerate(requests):
            context, _, _, document, task, split = request.args
            prompts.setdefault((task, split, document, context), []).append(number)
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        group = sorted(prompts.values(), key=lambda numbers: lmms_cache.place(requests[numbers[0]]))
        for batch in self._batches([group], "Scoring"):
            queries = [self._query(requests[numbers[0]]) for numbers in batch]
            answers = [[self._continuation(requests[number]) for number in numbers] for numbers in batch]
            with self._memory_for(batch), torch.no_grad():
                found = self.score(queries, answers)
            for numbers, query, texts, scores in zip(batch, queries, answers, found, strict=True):
                losses = self._losses(requests[numbers[0]], query, texts, scores.log_likelihoods)
                results_of_prompt = zip(losses, scores.greedy.tolist(), strict=True)
                for number, result in zip(numbers, results_of_prompt, strict=True):
                    results[number] = result
        return results

    def _losses(self, request: Instance, query: Query, answers: list[str], scores: torch.Tensor) -> list[float]:
        if self.calibrations is None:
            return (-scores).tolist()
        _, _, _, document, task, _ = request.args
        where = f"task {task!r}, document {document}"
        if query.task is None:
            raise VITaskError(f"{where} has no labels of a task, so no calibration fits it; leave calibrated=True out")
        calibration = self.calibrations.fitting(query.task, query.prompted, answers, query.context, where)
        # The softmax of these with the sign turned is the calibrated probabilities.
        losses: list[float] = (-calibration.scaled(scores.cpu())).tolist()
        return losses

    @exit_on_bad_input
    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise VITaskError(f"{self.NAME} answers one-turn tasks only; choose a task that is not multi-round")

    def announce(self, requests: Iterable[Instance]) -> None:
        """Looks at each task that is asked about for the first time: refuses one whose label set is not the one that
        the checkpoint was trained on, and says how many of these documents get an exemplar."""
        asked: dict[tuple[str, str], set[int]] = {}
        scored: set[tuple[str, str]] = set()
        for request in requests:
            _, _, _, document, task, split = request.args
            asked.setdefault((task, split), set()).add(document)
            if request.request_type == "loglikelihood":
                scored.add((task, split))
        for place in asked.keys() - self._announced:
            data, blocks = self.task_dict[place[0]][place[1]], self._blocks(*place)
            for block in filter(None, blocks):
                self.check_labels(f"task {place[0]!r}", block["task"], block["choices"])
            self._warn(foreign(place[0], blocks, self.record))
            if self.calibrations is not None and place in scored:
                self._check_calibrated(place[0], blocks)
            if not self.any_size:
                check_images(data, place[0], self.trained())
            if self.prompting and self.rank == 0:
                line = self.prompting.summary(place[0], [blocks[number] for number in asked[place]])
                logger.info(line + f" (process 0 of {self.world_size})" * (self.world_size > 1))
            self._announced.add(place)

    def _warn_of_unread(self, requests: Sequence[Instance], answers: Sequence[str]) -> None:
        given: dict[tuple[str, str], dict[int, str]] = {}
        for request, answer in zip(requests, answers, strict=True):
            _, _, _, document, *place = request.args
            given.setdefault(tuple(place), {})[document] = answer
        for place, own in given.items():
            blocks = self._blocks(*place)
            self._warn(unread(place[0], [blocks[document] for document in own], list(own.values()), self.record))

    def _blocks(self, task: str, split: str) -> list[Any]:
        """The `vitask` block of each document, None where there is none."""
        data = self.task_dict[task][split]
        # By column: rows would decode every image.
        return list(data["vitask"]) if "vitask" in data.column_names else [None] * len(data)

    def _warn(self, sentence: str | None) -> None:
        if sentence and self.rank == 0:
            logger.warning(sentence + f" (process 0 of {self.world_size})" * (self.world_size > 1))

    def _check_calibrated(self, task: str, blocks: Iterable[Any]) -> None:
        """Refuses a task without a calibration before any of it is scored."""
        for block in blocks:
            if block is None:
                raise VITaskError(
                    f"task {task!r} has no labels that a calibration could be of; leave calibrated=True out"
                )
            self.calibrations.needed(block["task"], self.prompting is not None and self.prompting.covers(block))

    def _memory_for(self, batch: list[Any]) -> AbstractContextManager[None]:
        return memory_error_as(
            f"out of memory on {self.device} with {len(batch)} prompts in a batch; give a --batch_size below "
            f"{self.batch_size}, dtype=bfloat16 in --model_args, or tasks with shorter prompts"
        )

    def _batches(self, groups: Iterable[list[Any]], title: str) -> Iterator[list[Any]]:
        groups = list(groups)
        with tqdm(total=sum(map(len, groups)), desc=title, disable=self.rank != 0) as progress:
            for group in groups:
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    yield batch
                    progress.update(len(batch))

    def _query(self, request: Instance) -> Query:
        context, _, doc_to_visual, number, task, split = request.args
        document, visuals = read_document(self.task_dict[task][split], number, doc_to_visual, task)
        named = context.count(IMAGE_TOKEN)
        if named not in (0, len(visuals)):
            raise VITaskError(
                f"task {task!r}, document {number}: the prompt names {IMAGE_TOKEN} {named} times for "
                f"{len(visuals)} images; name it once per image or not at all"
            )
        block = document.get("vitask") if isinstance(document, dict) else None
        prompted = self.prompting is not None and len(visuals) == 1 and self.prompting.covers(block)
        return Query(context, visuals, block["task"] if block else None, prompted)

    def _continuation(self, request: Instance) -> str:
        _, continuation, _, number, task, split = request.args
        return continuation(self.task_dict[task][split][number]) if callable(continuation) else continuation
