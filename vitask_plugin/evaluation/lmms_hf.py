"""The lmms-eval model `vitask_hf`: any VLM in HF format, of VITask or not, batched, with exemplars or without.

    lmms-eval --model vitask_hf --model_args pretrained=DIR[,model_base=BASE][,tsm=DIR][,ep=True|False|all] ...

Without a VITask checkpoint it is free text as stock `generate` gives it, and the exact likelihood of labels. Before the
first answer the model's own forward is compared with what it would be asked here, see `lmms_selftest`.
"""

from pathlib import Path
from typing import Any

import torch
from loguru import logger

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.lmms_base import VITaskModel
from vitask_plugin.evaluation.lmms_decoding import Decoding
from vitask_plugin.evaluation.lmms_exemplars import Query
from vitask_plugin.evaluation.lmms_prompts import beginnings, continued
from vitask_plugin.evaluation.lmms_selftest import Asked, choose
from vitask_plugin.hf import loading
from vitask_plugin.hf.batch import PlainBatches
from vitask_plugin.hf.generation import Answering, generate
from vitask_plugin.hf.prompting import Prompter, Question, as_inputs
from vitask_plugin.inference.scoring import LabelScores, label_log_likelihoods, label_prompts
from vitask_plugin.method.branches import IGNORE, Document, Layout, Packed, Prompts
from vitask_plugin.method.layout import Row, cut_row
from vitask_plugin.training.batches import pad_of


class VITaskHF(VITaskModel):
    """See the module, and for its arguments `VITaskModel`."""

    NAME, HOST, OWN = "vitask_hf", "hf", ("contrast",)

    def prepare(self, contrast: float = 0.0) -> None:
        if contrast:
            raise VITaskError(
                f"contrast={contrast!r} is of vitask_llava only; leave it out of the --model_args of vitask_hf"
            )
        self._layouts: dict[tuple[int, bool], type[Layout]] = {}

    def load(self, pretrained: str, base: str | None, **words: Any) -> None:
        loaded = loading.load(pretrained, base, **words)
        self.model, self.record, self.tokenizer = loaded.model, loaded.record, loaded.template.tokenizer
        self.prompter = Prompter(loaded.template)
        self._answering = Answering(self.model, self.tokenizer.eos_token_id)
        source = Path(self.model.config.name_or_path)  # of an adapter: its base, though nobody named it
        if source.is_dir() and source not in self.folders:
            self.folders.append(source)

    # Prompts -----------------------------------------------------------------------------------------------------

    def _ask(self, queries: list[Query]) -> list[Question]:
        return [self.prompter.ask(query.context, query.images) for query in queries]

    def _prompts(self, queries: list[Query], questions: list[Question]) -> tuple[Prompts, torch.Tensor]:
        """What stands before the answers, with the exemplars of those queries that get one, and the token id of each
        place [N] in its pool.

        Queries that begin alike, up to what closes their images, share that beginning: its images are encoded once.
        """
        own, first = beginnings(queries, [question.prefix.tolist() for question in questions])
        begun, tokens = self._prefixes([queries[i] for i in first], [questions[i] for i in first])
        texts = [question.text for question in questions]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        embed = self.model.get_input_embeddings()
        prompts = continued(begun, own, texts, embed, limit, ", or give smaller images")
        said = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        return prompts, torch.cat([tokens, said])

    def _prefixes(self, queries: list[Query], questions: list[Question]) -> tuple[Prompts, torch.Tensor]:
        """What queries begin with, the exemplars behind it, and the token id of each place."""
        pad, image_id = pad_of(self.tokenizer), self.prompter.template.image_id
        like = torch.empty(0, device=self.device, dtype=self.model.dtype)
        batch = PlainBatches(pad)(
            [
                {"input_ids": one.prefix, "labels": torch.full_like(one.prefix, IGNORE), "inputs": one.inputs}
                for one in questions
            ]
        )
        del batch["labels"]
        ids = batch["input_ids"]
        pool, tokens, width = self.model.expand(as_inputs(batch, like)), ids.flatten(), ids.shape[1]
        rows = [
            cut_row(n * width, one.prefix, one.prefix == image_id, torch.full_like(one.prefix, IGNORE), len(one.prefix))
            for n, one in enumerate(questions)
        ]
        found = self.exemplar_inputs(queries)
        if not found:
            return Prompts(pool, [Document(row.prefix, [row.plain]) for row in rows]), tokens
        exemplars, behind = self.model.exemplars(found["tsm_features"]), len(pool)
        documents = [
            self._prompted(row, behind + number * exemplars.shape[1] + torch.arange(length))
            for number, (row, length) in enumerate(zip(rows, found["tsm_lengths"].tolist(), strict=True))
        ]
        words = found["tsm_features"].cpu().flatten() if self.record["ep"] == "text" else None
        words = torch.full((exemplars.shape[:2].numel(),), pad) if words is None else words
        return Prompts(pool.followed_by(exemplars.flatten(0, 1)), documents), torch.cat([tokens, words])

    def _prompted(self, row: Row, exemplar: torch.Tensor) -> Document:
        if not len(exemplar):
            return Document(row.prefix, [row.plain])
        if self._replaces:
            return Document(row.replaced(exemplar), [row.plain], counted=True)
        return Document(row.prefix, [row.prompted(exemplar)])

    @property
    def _replaces(self) -> bool:
        return self.record is not None and self.record["ep"] == "replace"

    # Answers -----------------------------------------------------------------------------------------------------

    def answer(self, queries: list[Query], decoding: Decoding) -> torch.Tensor:
        layout, questions = self._tried(queries), self._ask(queries)
        prompts, tokens = self._prompts(queries, questions)
        longest = max(len(one.prefix) + len(one.continuations[0].tokens) for one in prompts.documents)
        arguments = decoding.arguments(self.tokenizer, self.folders[0], start=longest)
        found = generate(self.model, self._answering, prompts, tokens, shares=layout is Packed, **arguments)
        return found[:, longest:]

    def score(self, queries: list[Query], answers: list[list[str]]) -> list[LabelScores]:
        layout = self._tried(queries)
        scored, _, _ = self._scored(queries, answers)
        return label_log_likelihoods(self.model, scored, layout)

    def _scored(
        self, queries: list[Query], answers: list[list[str]]
    ) -> tuple[Prompts, list[Question], list[list[list[int]]]]:
        """Prompts with labels, the questions, and the token ids of each question's text with each of its answers."""
        questions = self._ask(queries)
        answered = [
            [self.prompter.answered(question, text.strip()) for text in texts]
            for question, texts in zip(questions, answers, strict=True)
        ]
        prompts, _ = self._prompts(queries, questions)
        texts = [question.text for question in questions]
        return label_prompts(prompts, texts, answered, self.model.get_input_embeddings()), questions, answered

    def _tried(self, queries: list[Query]) -> type[Layout]:
        """How this model is asked: the first batch of its kind (without image, with one, with several; with exemplars
        or without) says."""
        kind = min(2, max(len(query.images) for query in queries)), any(query.prompted for query in queries)
        if kind not in self._layouts:
            most = sorted(queries, key=lambda query: (query.prompted, len(query.images)), reverse=True)
            self._layouts[kind], line = self._try(most[:2])
            if self.rank == 0:
                images = ("no image", "an image", "several images")[kind[0]]
                logger.info(f"questions with {images}{' and an exemplar' * kind[1]}: {line}")
        return self._layouts[kind]

    def _try(self, queries: list[Query]) -> tuple[type[Layout], str]:
        answers = ("Yes.", "No.")  # two that share their question: what one leaves behind must not reach the other
        scored, questions, answered = self._scored(queries, [list(answers)] * len(queries))
        like = torch.empty(0, device=self.device, dtype=self.model.dtype)
        found = self.exemplar_inputs(queries)
        exemplars: list[torch.Tensor | None] = [None] * len(queries)
        if found:
            lengths = found["tsm_lengths"].tolist()
            tokens = self.model.exemplars(found["tsm_features"])
            exemplars = [one[:length] if length else None for one, length in zip(tokens, lengths, strict=True)]
        asked = [
            Asked(question.prefix, question.end, question.text, texts, as_inputs(question.inputs, like), exemplar)
            for question, texts, exemplar in zip(questions, answered, exemplars, strict=True)
        ]
        image_id = self.prompter.template.image_id
        return choose(self.model, scored, asked, self.folders[0], image_id=image_id, replaces=self._replaces)
