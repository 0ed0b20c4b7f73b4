"""Any VLM in HF format, of VITask or not, asked in batches, with exemplars or without.

Before the first answer the model's own forward is compared with what it would be asked here, see `hf_selftest`.
"""

from pathlib import Path
from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.evaluation.decoding import Decoding
from vitask_plugin.evaluation.hf_selftest import Asked, choose
from vitask_plugin.hf import loading
from vitask_plugin.hf.asking import HFAsker
from vitask_plugin.hf.generation import Answering, generate
from vitask_plugin.hf.prompting import Prompter, as_inputs
from vitask_plugin.inference.asking import Query
from vitask_plugin.inference.scoring import LabelScores, label_log_likelihoods
from vitask_plugin.method.branches import Layout, Packed


class HFModel(AskedModel):
    """See the module."""

    HOST = "hf"

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
        self.asker = HFAsker(self.model, self.prompter, self.device)
        self._answering = Answering(self.model, self.tokenizer.eos_token_id)
        source = Path(self.model.config.name_or_path)  # of an adapter: its base, though nobody named it
        if source.is_dir() and source not in self.folders:
            self.folders.append(source)

    # Answers -----------------------------------------------------------------------------------------------------

    def answer(self, queries: list[Query], decoding: Decoding) -> torch.Tensor:
        layout, questions = self._tried(queries), self.asker.questions(queries)
        prompts, tokens = self.asker.prompts(queries, questions, self.exemplars_of(queries))
        longest = max(len(one.prefix) + len(one.continuations[0].tokens) for one in prompts.documents)
        arguments = decoding.arguments(self.tokenizer, self.folders[0], start=longest)
        found = generate(self.model, self._answering, prompts, tokens, shares=layout is Packed, **arguments)
        return found[:, longest:]

    def score(self, queries: list[Query], answers: list[list[str]]) -> list[LabelScores]:
        layout = self._tried(queries)
        return label_log_likelihoods(
            self.model, self.asker.scored(queries, answers, self.exemplars_of(queries)), layout
        )

    def _tried(self, queries: list[Query]) -> type[Layout]:
        """How this model is asked: the first batch of its kind (without image, with one, with several; with exemplars
        or without) says."""
        kind = min(2, max(len(query.images) for query in queries)), any(query.prompted for query in queries)
        if kind not in self._layouts:
            most = sorted(queries, key=lambda query: (query.prompted, len(query.images)), reverse=True)
            self._layouts[kind], line = self._try(most[:2])
            if self.rank == 0:
                images = ("no image", "an image", "several images")[kind[0]]
                self.log.info(f"questions with {images}{' and an exemplar' * kind[1]}: {line}")
        return self._layouts[kind]

    def _try(self, queries: list[Query]) -> tuple[type[Layout], str]:
        answers = ("Yes.", "No.")  # two that share their question: what one leaves behind must not reach the other
        questions, exemplars = self.asker.questions(queries), self.exemplars_of(queries)
        answered = self.asker.answered(questions, [answers] * len(queries))
        scored = self.asker.scored_questions(queries, questions, answered, exemplars)
        like = torch.empty(0, device=self.device, dtype=self.model.dtype)
        tokens = [None if one is None else self.model.exemplars(one[None])[0] for one in exemplars]
        asked = [
            Asked(question.prefix, question.end, question.text, texts, as_inputs(question.inputs, like), exemplar)
            for question, texts, exemplar in zip(questions, answered, tokens, strict=True)
        ]
        image_id = self.prompter.template.image_id
        return choose(
            self.model, scored, asked, self.folders[0], image_id=image_id, replaces=self.asker.kind == "replace"
        )
