"""Questions in the model's own chat template and processor, put to any HF vision-language model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitask_plugin.hf.batch import PlainBatches
from vitask_plugin.hf.prompting import Prompter, Question, as_inputs
from vitask_plugin.inference.asking import Asker, Exemplars, Query, alike, continued, with_exemplars
from vitask_plugin.inference.scoring import label_prompts
from vitask_plugin.method.branches import IGNORE, Prompts
from vitask_plugin.method.layout import Row, cut_row
from vitask_plugin.training.batches import pad_of


class HFAsker(Asker):
    """See the module.

    Args:
        model: of `with_vitask`. prompter: of its template. device: of the model.
    """

    def __init__(self, model: Any, prompter: Prompter, device: torch.device) -> None:
        self.model, self.prompter, self.device = model, prompter, device

    @property
    def kind(self) -> str | None:
        """`--vitask_ep` of the model's training, None where it is no checkpoint of VITask."""
        return None if self.model.vitask_arguments is None else self.model.vitask_arguments.vitask_ep

    def questions(self, queries: Sequence[Query]) -> list[Question]:
        asked: dict[tuple, Question] = {}  # with an exemplar and without, it is one question about one image
        for query in queries:
            key = (query.context, *map(id, query.images))
            if key not in asked:
                asked[key] = self.prompter.ask(query.context, query.images)
        return [asked[(query.context, *map(id, query.images))] for query in queries]

    def answered(self, questions: Sequence[Question], answers: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of each question's text with each of its answers."""
        known: dict[tuple, list[int]] = {}  # the questions of a set differ in their images alone
        found = []
        for question, texts in zip(questions, answers, strict=True):
            said = question.turn["value"], tuple(question.begins)
            for text in texts:
                if (*said, text) not in known:
                    known[(*said, text)] = self.prompter.answered(question, text.strip())
            found.append([known[(*said, text)] for text in texts])
        return found

    def scored(self, queries: Sequence[Query], answers: Sequence[Sequence[str]], exemplars: Exemplars) -> Prompts:
        questions = self.questions(queries)
        return self.scored_questions(queries, questions, self.answered(questions, answers), exemplars)

    def scored_questions(
        self,
        queries: Sequence[Query],
        questions: Sequence[Question],
        answered: Sequence[Sequence[Sequence[int]]],
        exemplars: Exemplars,
    ) -> Prompts:
        """`scored`, of what is in tokens already."""
        prompts, _ = self.prompts(queries, questions, exemplars)
        texts = [question.text for question in questions]
        return label_prompts(prompts, texts, answered, self.model.get_input_embeddings())

    def prompts(
        self, queries: Sequence[Query], questions: Sequence[Question], exemplars: Exemplars
    ) -> tuple[Prompts, Tensor]:
        """What stands before the answers, and the token id of each place [N] in its pool.

        Queries that begin alike, up to what closes their images, share that beginning: its images are encoded once.

        Raises:
            VITaskError: a prompt is longer than the model's positions.
        """
        own, first = alike(
            [(query.pixels, *question.prefix.tolist()) for query, question in zip(queries, questions, strict=True)]
        )
        pool, rows, tokens = self._rows([questions[i] for i in first])
        pool, begun, padded = with_exemplars(
            pool,
            [rows[number] for number in own],
            exemplars,
            self.model.exemplars,
            replaces=self.kind == "replace",
        )
        if padded is not None:
            words = torch.full((padded.shape[:2].numel(),), pad_of(self.prompter.template.tokenizer))
            tokens = torch.cat([tokens, padded.cpu().flatten() if self.kind == "text" else words])
        texts = [question.text for question in questions]
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        embed = self.model.get_input_embeddings()
        prompts = continued(pool, begun, texts, embed, limit, ", or give smaller images")
        said = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
        return prompts, torch.cat([tokens, said])

    def _rows(self, questions: Sequence[Question]) -> tuple[Any, list[Row], Tensor]:
        """The pool of what questions begin with, their rows in it, and the token id of each place."""
        pad, image_id = pad_of(self.prompter.template.tokenizer), self.prompter.template.image_id
        like = torch.empty(0, device=self.device, dtype=self.model.dtype)
        batch = PlainBatches(pad)(
            [
                {"input_ids": one.prefix, "labels": torch.full_like(one.prefix, IGNORE), "inputs": one.inputs}
                for one in questions
            ]
        )
        del batch["labels"]
        ids = batch["input_ids"]
        pool, width = self.model.expand(as_inputs(batch, like)), ids.shape[1]
        rows = [
            cut_row(n * width, one.prefix, one.prefix == image_id, torch.full_like(one.prefix, IGNORE), len(one.prefix))
            for n, one in enumerate(questions)
        ]
        return pool, rows, ids.flatten()
