"""Questions in upstream's conversation template, put to a LLaVA."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from llava.conversation import Conversation
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.inference.asking import Asker, Exemplars, Query, alike, continued, with_exemplars
from vitask_plugin.inference.scoring import label_prompts
from vitask_plugin.llava.prompting import pixels_of, prompt_ids
from vitask_plugin.method.branches import Prompts
from vitask_plugin.method.layout import Row

KNOWN = 1024  # texts whose tokens are kept


class LlavaAsker(Asker):
    """See the module.

    Args:
        model: a `VITaskLlavaLlamaForCausalLM`. template: of its training.
    """

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any, template: Conversation) -> None:
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.template = template
        # The samples of a set ask one question and have the same answers.
        self._known = functools.lru_cache(KNOWN)(self._ids)

    def prompt_ids(self, query: Query, answer: str | None = None) -> list[int]:
        """Token ids up to where the answer starts, or with `answer` and its end token."""
        return list(self._known(query.context, len(query.images), answer))

    def _ids(self, text: str, images: int, answer: str | None) -> list[int]:
        marked = getattr(self.model.config, "mm_use_im_start_end", False)
        return prompt_ids(self.template, self.tokenizer, text, images=images, answer=answer, marked=marked)

    def answered_ids(self, queries: Sequence[Query], answers: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """`prompt_ids` of each query with each of its answers."""
        return [
            [self.prompt_ids(query, text.strip()) for text in texts]
            for query, texts in zip(queries, answers, strict=True)
        ]

    def scored(self, queries: Sequence[Query], answers: Sequence[Sequence[str]], exemplars: Exemplars) -> Prompts:
        ids = [self.prompt_ids(query) for query in queries]
        prompts = self.prompts(queries, ids, exemplars)
        return label_prompts(prompts, ids, self.answered_ids(queries, answers), self.model.get_model().embed_tokens)

    def prompts(self, queries: Sequence[Query], ids: Sequence[list[int]], exemplars: Exemplars) -> Prompts:
        """What stands before the answers.

        Queries that begin alike, up to their last image (without one: up to the last token), share that beginning: its
        images are encoded once.

        Args:
            ids: `prompt_ids` of each query.

        Raises:
            VITaskError: a prompt is longer than the model's limit.
        """
        cuts = [1 + max((i for i, token in enumerate(each) if token < 0), default=len(each) - 2) for each in ids]
        own, first = alike(
            [(query.pixels, *prompt[:cut]) for query, prompt, cut in zip(queries, ids, cuts, strict=True)]
        )
        pool, rows = self._rows([queries[i] for i in first], [ids[i][: cuts[i]] for i in first])
        replaces = self.model.vitask_arguments is not None and self.model.vitask_arguments.vitask_ep == "replace"
        pool, begun, _ = with_exemplars(
            pool, [rows[number] for number in own], exemplars, self.model.exemplars, replaces=replaces
        )
        texts = [prompt[cut:] for prompt, cut in zip(ids, cuts, strict=True)]
        # Where upstream cut the beginning, that alone is as long as the limit.
        limit = getattr(self.model.config, "tokenizer_model_max_length", None)
        return continued(pool, begun, texts, self.model.get_model().embed_tokens, limit)

    def _rows(self, queries: Sequence[Query], ids: Sequence[list[int]]) -> tuple[torch.Tensor, list[Row]]:
        """The pool of what queries begin with, up to the last image, and their rows in it."""
        # Upstream's code takes an image for a text-only row too, and leaves it out.
        images = [image for query in queries for image in query.images or [Image.new("RGB", (32, 32))]]
        rows = [torch.tensor(prefix) for prefix in ids]
        device = self.model.get_model().embed_tokens.weight.device
        like = torch.empty(0, device=device, dtype=self.model.dtype)
        return self.model.vitask_rows(
            pad_sequence(rows, batch_first=True).to(device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(device),
            pixels_of(images, self.image_processor, self.model.config, like),
            image_sizes=[image.size for image in images],
        )
