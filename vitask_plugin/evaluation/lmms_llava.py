"""The lmms-eval model `vitask_llava`: a LLaVA or VITask checkpoint on any device, batched, with exemplars or without.

lmms-eval --model vitask_llava --model_args pretrained=CKPT[,model_base=BASE][,tsm=DIR][,ep=True|False|all] ...
"""

from typing import Any

import torch
from loguru import logger
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.lmms_base import VITaskModel
from vitask_plugin.evaluation.lmms_decoding import Decoding
from vitask_plugin.evaluation.lmms_exemplars import Query
from vitask_plugin.evaluation.lmms_prompts import beginnings, continued
from vitask_plugin.evaluation.model_args import check_contrast
from vitask_plugin.inference.contrast import ContrastLogits, ContrastModel, blind_prompts, both, without_image
from vitask_plugin.inference.scoring import LabelScores, label_log_likelihoods, label_prompts
from vitask_plugin.llava import compat, loading
from vitask_plugin.llava.flags import one_view
from vitask_plugin.method.branches import Prompts


class VITaskLlava(VITaskModel):
    """See the module, and for its arguments `VITaskModel`.

    Args:
        contrast: weight of contrastive decoding (see `contrast`), for greedy answers and label likelihoods; 0 = off.
        conv_template: name of the conversation template; by default that of the training run (`--version`) as far as
            the checkpoint records it, else vicuna_v1.
    """

    NAME, HOST, OWN = "vitask_llava", "llava", ("contrast", "conv_template")

    def prepare(self, contrast: float = 0.0, conv_template: str | None = None) -> None:
        check_contrast(contrast)
        compat.prepare()
        from vitask_plugin.llava import prompting

        if conv_template is not None and conv_template not in prompting.TEMPLATES:
            raise VITaskError(
                f"conv_template={conv_template!r} is unknown; choose one of {', '.join(prompting.TEMPLATES)}"
            )
        self.contrast = float(contrast)
        self._template_given = conv_template

    def load(self, pretrained: str, base: str | None, **words: Any) -> None:
        from vitask_plugin.llava import prompting

        loaded = loading.load(pretrained, base, **words)
        self.model, self.tokenizer, self.image_processor = loaded.model, loaded.tokenizer, loaded.image_processor
        self.record = loaded.record
        if self.record is not None:
            one_view(vars(self.model.config), pretrained)  # such a checkpoint was trained on one
        version = (self.record or {}).get("version")
        trained, given = prompting.trained_template(version), self._template_given
        self.template = prompting.TEMPLATES[given or trained]
        if version is not None and self.template is not prompting.TEMPLATES[trained]:
            logger.warning(
                f"conv_template={given!r} is not the template of training ({trained!r}, from --version {version}); "
                "leave conv_template out unless that is meant"
            )

    # Prompts -----------------------------------------------------------------------------------------------------

    def _prompt_ids(self, query: Query, answer: str | None = None) -> list[int]:
        from vitask_plugin.llava.prompting import prompt_ids

        marked = getattr(self.model.config, "mm_use_im_start_end", False)
        words = {"images": len(query.images), "answer": answer, "marked": marked}
        return prompt_ids(self.template, self.tokenizer, query.context, **words)

    def _prompts(self, queries: list[Query], prompts: list[list[int]]) -> Prompts:
        """What stands before the answers, with the exemplars of those queries that get one.

        Queries that begin alike, up to their last image (without one: up to the last token), share that beginning: its
        images are encoded once.
        """
        cuts = [1 + max((i for i, token in enumerate(each) if token < 0), default=len(each) - 2) for each in prompts]
        begins = [prompt[:cut] for prompt, cut in zip(prompts, cuts, strict=True)]
        own, first = beginnings(queries, begins)
        begun = self._prefixes([queries[i] for i in first], [begins[i] for i in first])
        texts = [prompt[cut:] for prompt, cut in zip(prompts, cuts, strict=True)]
        # Where upstream cut the beginning, that alone is as long as the limit.
        limit = getattr(self.model.config, "tokenizer_model_max_length", None)
        return continued(begun, own, texts, self.model.get_model().embed_tokens, limit, "")

    def _prefixes(self, queries: list[Query], ids: list[list[int]]) -> Prompts:
        """What queries begin with, up to the last image, and the exemplars after it."""
        from vitask_plugin.llava.prompting import pixels_of

        # Upstream's code takes an image for a text-only row too, and leaves it out.
        images = [image for query in queries for image in query.images or [Image.new("RGB", (32, 32))]]
        rows = [torch.tensor(prefix) for prefix in ids]
        like = torch.empty(0, device=self.device, dtype=self.model.dtype)
        return self.model.vitask_prompts(
            pad_sequence(rows, batch_first=True).to(self.device),
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True).to(self.device),
            pixels_of(images, self.image_processor, self.model.config, like),
            image_sizes=[image.size for image in images],
            **self.exemplar_inputs(queries),
        )

    # Answers -----------------------------------------------------------------------------------------------------

    def answer(self, queries: list[Query], decoding: Decoding) -> torch.Tensor:
        ids = [self._prompt_ids(query) for query in queries]
        prompts, processors = self._prompts(queries, ids), []
        if self.contrast:
            if decoding.samples or decoding.beams > 1:
                raise VITaskError(
                    f"contrast={self.contrast} goes with greedy answers only; the task asks for temperature "
                    f"{decoding.temperature} and {decoding.beams} beam(s): set temperature=0,num_beams=1 in "
                    "--gen_kwargs"
                )
            prompts = both(prompts, blind_prompts(ids, prompts.pool, self.model.get_model().embed_tokens))
            processors.append(ContrastLogits(self.contrast))
        arguments = decoding.arguments(self.tokenizer, self.folders[0], processors=processors)
        return self.model.vitask_generate(prompts, **arguments)[: len(queries)]

    def score(self, queries: list[Query], answers: list[list[str]]) -> list[LabelScores]:
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
