"""The lmms-eval model `vitask_llava`: a LLaVA or VITask checkpoint on any device, batched, with exemplars or without.

    lmms-eval --model vitask_llava --model_args pretrained=CKPT[,model_base=BASE][,tsm=DIR][,ep=True|False|all] ...

With exemplar prompting (EP) the task-specific model (TSM) runs beside the VLM on the same image. What an exemplar is,
the checkpoint's vitask.json says: TSM features, or in the controls a learned prefix or the TSM's prediction in words.
Which documents get one, `exemplars` says: those of a task that the checkpoint was trained on.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from loguru import logger
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from vitask_plugin.data.comparison import Seen
from vitask_plugin.data.images import pixel_hash
from vitask_plugin.data.names import same_names
from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation import lmms_cache
from vitask_plugin.evaluation.exemplars import Prompting, read_ep
from vitask_plugin.evaluation.harness import exit_on_bad_input
from vitask_plugin.evaluation.model_args import as_device, as_dtype, check_folders, check_numbers, check_prompting
from vitask_plugin.evaluation.pictures import check_images, read_document
from vitask_plugin.inference.contrast import ContrastLogits, ContrastModel, blind_prompts, both, without_image
from vitask_plugin.inference.scoring import LabelScores, label_log_likelihoods, label_prompts, with_text
from vitask_plugin.llava import compat
from vitask_plugin.method.branches import IGNORE, Continuation, Document, Prompts
from vitask_plugin.method.connector import LEARNED
from vitask_plugin.tsm.device import memory_error_as
from vitask_plugin.tsm.model import TSM, TSMOutput
from vitask_plugin.tsm.predicted import predicted_answer, task_of

exit_on_bad_input(compat.prepare)()

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN  # noqa: E402
from llava.conversation import Conversation, conv_templates  # noqa: E402
from llava.mm_utils import process_images, tokenizer_image_token  # noqa: E402

from vitask_plugin.llava import loading  # noqa: E402
from vitask_plugin.llava.conversations import template_name  # noqa: E402
from vitask_plugin.llava.flags import one_view  # noqa: E402
from vitask_plugin.record import checkpoint  # noqa: E402
from vitask_plugin.record.swap import check_tsm  # noqa: E402


@dataclass(frozen=True)
class _Query:
    """One prompt and its images, RGB; `task`: whose labels it asks for, if known; `prompted`: whether an exemplar
    stands behind its image, if there are exemplars."""

    context: str
    images: list[Image.Image]
    task: str | None = None
    prompted: bool = False

    @property
    def pixels(self) -> tuple[str, ...]:
        """Equal where both models, which see the same images, see nothing else."""
        return tuple(map(pixel_hash, self.images))


class VITaskLlava(lmms):
    """See the module. Bad input ends the program with one sentence and status 1.

    Args:
        pretrained: folder of a LLaVA or VITask checkpoint.
        model_base: folder of the model that a LoRA checkpoint was trained from.
        tsm: folder of the TSM, written by `vitask tsm`. For another one than in training (plug-and-play) see `swap`.
        connector: folder of a connector that `vitask connector align` or `fit` made for this checkpoint and that TSM.
        swap: force = take a TSM as wide as the connector's own though it is another; by default that is refused.
        trust_tsm_code: import the Python code that the TSM's tsm.json names, if it names any.
        ep: whether to prompt with exemplars; by default if there is a `tsm`. A learned prefix needs no `tsm`. Documents
            of tasks that the checkpoint was not trained on get none, unless it is "all": every one with one image.
        contrast: weight of contrastive decoding (see `contrast`), for greedy answers and label likelihoods; 0 = off.
        conv_template: name of the conversation template; by default that of the training run (`--version`) as far as
            the checkpoint records it, else vicuna_v1.
        dtype: float32, bfloat16, float16, or auto: as the weights were saved.
        batch_size: samples per forward. In float32 the answers do not depend on it.
        device: cpu, cuda or cuda:N. By default cuda where there is one; with several processes, one GPU each.
        max_new_tokens: limit for tasks that set none.
        image_size: `any` evaluates images of another size, or prepared in another way, than those of training, which
            is refused otherwise.
    """

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
        contrast: float = 0.0,
        conv_template: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        device: str | None = None,
        max_new_tokens: int = 128,
        image_size: str | None = None,
        max_batch_size: int | None = None,  # lmms-eval hands its --max_batch_size to every model; batch_size decides
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise VITaskError(
                f"--model_args {', '.join(map(repr, unknown))} unknown; vitask_llava takes pretrained, model_base, "
                "tsm, connector, swap, trust_tsm_code, ep, contrast, conv_template, dtype, batch_size, device, "
                "max_new_tokens and image_size"
            )
        check_folders({"pretrained": pretrained, "model_base": model_base, "tsm": tsm, "connector": connector})
        check_numbers(batch_size, max_new_tokens, contrast)
        check_prompting(ep, tsm, connector, swap, trust_tsm_code)
        if conv_template is not None and conv_template not in conv_templates:
            raise VITaskError(f"conv_template={conv_template!r} is unknown; choose one of {', '.join(conv_templates)}")
        if image_size not in (None, "any"):
            raise VITaskError(f"image_size={image_size!r} is unknown; leave it out, or give image_size=any")
        self.any_size = image_size == "any"
        self.contrast = float(contrast)
        self.batch_size = int(batch_size)
        self.max_new_tokens = int(max_new_tokens)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = as_device(device, self.accelerator.local_process_index)
        self.folders = [Path(folder) for folder in (pretrained, model_base, tsm, connector) if folder]
        loaded = loading.load(
            pretrained, model_base, connector=connector, dtype=as_dtype(dtype, pretrained), device=self.device
        )
        self.model, self.tokenizer, self.image_processor = loaded.model, loaded.tokenizer, loaded.image_processor
        self.record = loaded.record
        if self.record is not None:
            one_view(vars(self.model.config), pretrained)  # such a checkpoint was trained on one
        self.template = _template(conv_template, (self.record or {}).get("version"))
        self.prompting = self._prompting(tsm, ep)
        self.tsm = None
        if self.prompting and tsm is not None:
            self.tsm = TSM.load(tsm, self.device, trust_code=trust_tsm_code)
            self._check_swap(self.tsm, pretrained, connector, tsm, force=swap == "force")
        self.learned = self.prompting is not None and self.tsm is None
        self._announced: set[tuple[str, str]] = set()

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
            missing = checkpoint.CONNECTOR_FILE if self.record else checkpoint.RECORD_FILE
            raise VITaskError(
                f"checkpoint {str(self.folders[0])!r} cannot be prompted with exemplars, for it has no {missing}; "
                "evaluate it with ep=False and without tsm"
            )
        return Prompting(self.record.get("tasks", {}), everywhere)

    def _check_swap(self, tsm: TSM, pretrained: str, connector: str | None, folder: str, *, force: bool) -> None:
        """A word on plug-and-play if the TSM is not the one of training."""
        warning = check_tsm(self.record, tsm, checkpoint=pretrained, connector=connector, folder=folder, force=force)
        fitted = self.record.get("fitted")
        if warning:
            logger.warning(warning)
        elif fitted:
            how = "aligned" if fitted.get("aligned") else "refitted"
            logger.info(
                f"plug-and-play: TSM {tsm.hash[:12]} through a connector {how} to it on the frozen VLM, which was "
                f"trained with TSM {fitted['tsm'][:12]}"
            )
        elif tsm.hash != self.record["tsm"]["hash"]:
            logger.info(
                f"plug-and-play: words of TSM {tsm.hash[:12]} in place of TSM {self.record['tsm']['hash'][:12]}"
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
            with self._memory_for(batch):
                found = self._generate(queries, requests[batch[0]].args[1])
            for number, answer in zip(batch, found, strict=True):
                answers[number] = answer
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
            with self._memory_for(batch):
                found = self._score(queries, answers)
            for numbers, scores in zip(batch, found, strict=True):
                losses = (-scores.log_likelihoods).tolist()
                results_of_prompt = zip(losses, scores.greedy.tolist(), strict=True)
                for number, result in zip(numbers, results_of_prompt, strict=True):
                    results[number] = result
        return results

    @exit_on_bad_input
    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise VITaskError("vitask_llava answers one-turn tasks only; choose a task that is not multi-round")

    def announce(self, requests: Iterable[Instance]) -> None:
        """Looks at each task that is asked about for the first time: refuses one whose label set is not the one that
        the checkpoint was trained on, and says how many of these documents get an exemplar."""
        asked: dict[tuple[str, str], set[int]] = {}
        for request in requests:
            _, _, _, document, task, split = request.args
            asked.setdefault((task, split), set()).add(document)
        for place in asked.keys() - self._announced:
            data = self.task_dict[place[0]][place[1]]
            # By column: rows would decode every image.
            blocks = list(data["vitask"]) if "vitask" in data.column_names else [None] * len(data)
            self._check_label_sets(place[0], blocks)
            if not self.any_size:
                check_images(data, place[0], self._trained())
            if self.prompting and self.rank == 0:
                line = self.prompting.summary(place[0], [blocks[number] for number in asked[place]])
                logger.info(line + f" (process 0 of {self.world_size})" * (self.world_size > 1))
            self._announced.add(place)

    def _check_label_sets(self, task: str, blocks: Iterable[Any]) -> None:
        trained = (self.record or {}).get("tasks", {})
        for block in filter(None, blocks):
            known = trained.get(block["task"], block["choices"])
            if not same_names(block["choices"], known):
                raise VITaskError(
                    f"task {task!r} has the label set {list(block['choices'])!r}, but checkpoint "
                    f"{str(self.folders[0])!r} was trained on {known!r} for {block['task']!r}; "
                    "evaluate it with the labels of its training data"
                )

    def _trained(self) -> list[Seen]:
        """The training images of the checkpoint, if it is one of VITask, and of the TSM."""
        found = [] if self.record is None else [checkpoint.trained_on(self.record, self.folders[0])]
        return found if self.tsm is None else [*found, self.tsm.trained_on]

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

    def _query(self, request: Instance) -> _Query:
        context, _, doc_to_visual, number, task, split = request.args
        document, visuals = read_document(self.task_dict[task][split], number, doc_to_visual, task)
        named = context.count(DEFAULT_IMAGE_TOKEN)
        if named not in (0, len(visuals)):
            raise VITaskError(
                f"task {task!r}, document {number}: the prompt names {DEFAULT_IMAGE_TOKEN} {named} times for "
                f"{len(visuals)} images; name it once per image or not at all"
            )
        block = document.get("vitask") if isinstance(document, dict) else None
        prompted = self.prompting is not None and len(visuals) == 1 and self.prompting.covers(block)
        return _Query(context, visuals, block["task"] if block else None, prompted)

    def _continuation(self, request: Instance) -> str:
        _, continuation, _, number, task, split = request.args
        return continuation(self.task_dict[task][split][number]) if callable(continuation) else continuation

    # The model ---------------------------------------------------------------------------------------------------

    def _prompt_ids(self, query: _Query, answer: str | None = None) -> list[int]:
        """Token ids of the conversation, up to where the answer starts, or with `answer` and its end token.

        The images come first, unless the prompt itself says where.
        """
        text, token = query.context, DEFAULT_IMAGE_TOKEN
        if token not in text:
            text = f"{token}\n" * len(query.images) + text
        if getattr(self.model.config, "mm_use_im_start_end", False):
            text = text.replace(token, DEFAULT_IM_START_TOKEN + token + DEFAULT_IM_END_TOKEN)
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], text)
        conversation.append_message(conversation.roles[1], answer)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer)

    def _prompts(self, queries: list[_Query], prompts: list[list[int]]) -> Prompts:
        """What stands before the answers, with the exemplars of those queries that get one.

        Queries that begin alike, up to their last image (without one: up to the last token), share that beginning: its
        images are encoded once.
        """
        cuts = [1 + max((i for i, token in enumerate(each) if token < 0), default=len(each) - 2) for each in prompts]
        numbers: dict[tuple, int] = {}
        own = [
            numbers.setdefault((query.pixels, query.task, query.prompted, *prompt[:cut]), len(numbers))
            for query, prompt, cut in zip(queries, prompts, cuts, strict=True)
        ]
        first = [own.index(number) for number in range(len(numbers))]
        prefixes = self._prefixes([queries[i] for i in first], [prompts[i][: cuts[i]] for i in first])
        texts = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        pool, places = with_text(prefixes.pool, texts, self.model.get_model().embed_tokens)
        limit = getattr(self.model.config, "tokenizer_model_max_length", None)
        documents = []
        for number, prompt, text in zip(own, prompts, places, strict=True):
            begin = prefixes.documents[number]
            question = torch.cat([begin.continuations[0].tokens, text])
            # Where upstream cut the beginning, that alone is as long as the limit.
            if limit is not None and len(begin.prefix) + len(question) > limit:
                raise VITaskError(
                    f"a prompt of {len(prompt)} tokens and its image are longer than the model's {limit} tokens; "
                    "shorten the question"
                )
            documents.append(Document(begin.prefix, [Continuation(question, torch.full_like(question, IGNORE))]))
        return Prompts(pool, documents)

    def _prefixes(self, queries: list[_Query], ids: list[list[int]]) -> Prompts:
        """What queries begin with, up to the last image, and the exemplars after it."""
        # Upstream's code takes an image for a text-only row too, and leaves it out.
        images = [image for query in queries for image in query.images or [Image.new("RGB", (32, 32))]]
        pixels = process_images(images, self.image_processor, self.model.config)
        if isinstance(pixels, list):
            pixels = [image.to(self.device, self.model.dtype) for image in pixels]
        else:
            pixels = pixels.to(self.device, self.model.dtype)
        rows = [torch.tensor(prefix) for prefix in ids]
        return self.model.vitask_prompts(
            pad_sequence(rows, batch_first=True).to(self.device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device),
            pixels,
            image_sizes=[image.size for image in images],
            **self._exemplars(queries),
        )

    def _exemplars(self, queries: list[_Query]) -> dict[str, torch.Tensor]:
        """TSM features [B, E, F] (or token ids [B, E]) and how many of them each query has; nothing without EP."""
        numbers = [number for number, query in enumerate(queries) if query.prompted]
        if (self.tsm is None and not self.learned) or not numbers:
            return {}
        prompted = [queries[number] for number in numbers]
        if self.learned:
            found = [torch.zeros(1, 0, device=self.device)] * len(prompted)
        elif self.record["ep"] == "text":
            found = [torch.tensor(ids, device=self.device) for ids in self._predicted_words(prompted)]
        else:
            found = list(self._exemplar_tokens([query.images[0] for query in prompted]))
        tokens = pad_sequence(found, batch_first=True)
        features = tokens.new_zeros(len(queries), *tokens.shape[1:])
        features[numbers] = tokens
        lengths = torch.zeros(len(queries), dtype=torch.int64)
        lengths[numbers] = torch.tensor([len(each) for each in found])
        return {"tsm_features": features, "tsm_lengths": lengths}

    def _exemplar_tokens(self, images: list[Image.Image]) -> torch.Tensor:
        """TSM features [B, E, F] of the images."""
        return self.tsm.tokens(self._see(images), self.model.vitask_arguments.exemplar_tokens)

    def _predicted_words(self, queries: list[_Query]) -> list[list[int]]:
        """Token ids of what the TSM itself predicts for each query's image."""
        tasks, logits = self.tsm.record["tasks"], self._see([query.images[0] for query in queries]).logits
        words = [
            predicted_answer(tasks, own, task_of(tasks, query.task)) for own, query in zip(logits, queries, strict=True)
        ]
        return [self.tokenizer(text, add_special_tokens=False).input_ids for text in words]

    def _see(self, images: list[Image.Image]) -> TSMOutput:
        return self.tsm(torch.stack([self.tsm.preprocess(image) for image in images]).to(self.device))

    @torch.no_grad()
    def _generate(self, queries: list[_Query], settings: dict[str, Any]) -> list[str]:
        ids = [self._prompt_ids(query) for query in queries]
        prompts = self._prompts(queries, ids)
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else list(stops)
        temperature = float(settings.get("temperature") or 0)
        sample = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
        beams, processors = int(settings.get("num_beams") or 1), LogitsProcessorList([_Numbers(self.folders[0])])
        if self.contrast:
            if sample or beams > 1:
                raise VITaskError(
                    f"contrast={self.contrast} goes with greedy answers only; the task asks for temperature "
                    f"{temperature} and {beams} beam(s): set temperature=0,num_beams=1 in --gen_kwargs"
                )
            prompts = both(prompts, blind_prompts(ids, prompts.pool, self.model.get_model().embed_tokens))
            processors.append(ContrastLogits(self.contrast))
        found = self.model.vitask_generate(
            prompts,
            max_new_tokens=int(settings.get("max_new_tokens") or self.max_new_tokens),
            do_sample=sample,
            temperature=temperature if sample else None,
            top_p=settings.get("top_p") if sample else None,
            top_k=settings.get("top_k") if sample else None,
            num_beams=beams,
            pad_token_id=self._pad,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_StopAt(stops, self.tokenizer)]) if stops else None,
        )
        texts = self.tokenizer.batch_decode(found[: len(queries)], skip_special_tokens=True)
        return [_cut(text, stops).strip() for text in texts]

    @property
    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @torch.no_grad()
    def _score(self, queries: list[_Query], answers: list[list[str]]) -> list[LabelScores]:
        ids = [self._prompt_ids(query) for query in queries]
        answered = [
            [self._prompt_ids(query, text.strip()) for text in texts]
            for query, texts in zip(queries, answers, strict=True)
        ]
        embed = self.model.get_model().embed_tokens
        prompts = self._prompts(queries, ids)
        scored = label_prompts(prompts, ids, answered, embed)
        if not self.contrast:
            return label_log_likelihoods(self.model, scored)
        texts = [[without_image(answer) for answer in answers] for answers in answered]
        blind = blind_prompts(ids, prompts.pool, embed)
        blind = label_prompts(blind, [without_image(prompt) for prompt in ids], texts, embed)
        return label_log_likelihoods(ContrastModel(self.model, blind, self.contrast), scored)


class _Numbers(LogitsProcessor):
    """Refuses scores that are no numbers: the answers would be empty, and count as wrong ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise VITaskError(
                f"checkpoint {str(self.folder)!r} gives NaN in place of scores: its training has diverged, or float16 "
                "is too narrow for it; look at its losses, or give dtype=bfloat16 or float32"
            )
        return scores


class _StopAt(StoppingCriteria):
    """Ends a row once its text holds one of `stops`."""

    def __init__(self, stops: list[str], tokenizer: Any) -> None:
        self.stops, self.tokenizer = stops, tokenizer

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        return torch.tensor([_cut(text, self.stops) != text for text in texts], device=input_ids.device)


def _cut(text: str, stops: list[str]) -> str:
    """`text` up to the first of `stops`."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def _template(name: str | None, version: str | None) -> Conversation:
    """The conversation template called `name`; by default that of the training run.

    Args:
        version: `--version` of the training run, None if the checkpoint does not tell.
    """
    trained = template_name(version)
    if name is None:
        return conv_templates[trained]
    if version is not None and conv_templates[name] is not conv_templates[trained]:
        logger.warning(
            f"conv_template={name!r} is not the template of training ({trained!r}, from --version {version}); leave "
            "conv_template out unless that is meant"
        )
    return conv_templates[name]


lmms_cache.install(VITaskLlava)
