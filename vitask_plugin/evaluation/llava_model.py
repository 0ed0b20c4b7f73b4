"""A LLaVA or VITask checkpoint, asked in batches, with exemplars or without."""

from typing import Any

import torch

from vitask_plugin.errors import VITaskError
from vitask_plugin.evaluation.asked_model import AskedModel
from vitask_plugin.evaluation.decoding import Decoding
from vitask_plugin.evaluation.model_args import check_contrast
from vitask_plugin.inference.asking import Query
from vitask_plugin.inference.contrast import ContrastLogits, ContrastModel, blind_prompts, both, without_image
from vitask_plugin.inference.scoring import LabelScores, label_log_likelihoods, label_prompts
from vitask_plugin.llava import compat, loading
from vitask_plugin.llava.flags import one_view
from vitask_plugin.method.branches import Prompts


class LlavaModel(AskedModel):
    """See the module.

    Args:
        contrast: weight of contrastive decoding (see `contrast`), for greedy answers and label likelihoods; 0 = off.
        conv_template: name of the conversation template; by default that of the training run (`--version`) as far as
            the checkpoint records it, else vicuna_v1.
    """

    HOST = "llava"

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
        from vitask_plugin.llava.asking import LlavaAsker

        loaded = loading.load(pretrained, base, **words)
        self.model, self.tokenizer, self.image_processor = loaded.model, loaded.tokenizer, loaded.image_processor
        self.record = loaded.record
        if loaded.source not in self.folders:  # of an adapter: its base, though nobody named it
            self.folders.append(loaded.source)
        if self.record is not None:
            one_view(vars(self.model.config), pretrained)  # such a checkpoint was trained on one
        version = (self.record or {}).get("version")
        trained, given = prompting.trained_template(version), self._template_given
        self.template = prompting.TEMPLATES[given or trained]
        self.asker = LlavaAsker(self.model, self.tokenizer, self.image_processor, self.template)
        if version is not None and self.template is not prompting.TEMPLATES[trained]:
            self.log.warning(
                f"conv_template={given!r} is not the template of training ({trained!r}, from --version {version}); "
                "leave conv_template out unless that is meant"
            )

    def _prompts(self, queries: list[Query], ids: list[list[int]]) -> Prompts:
        return self.asker.prompts(queries, ids, self.exemplars_of(queries))

    # Answers -----------------------------------------------------------------------------------------------------

    def answer(self, queries: list[Query], decoding: Decoding) -> torch.Tensor:
        ids = [self.asker.prompt_ids(query) for query in queries]
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
        scored = self.asker.scored(queries, answers, self.exemplars_of(queries))
        if not self.contrast:
            return label_log_likelihoods(self.model, scored)
        ids, answered = [self.asker.prompt_ids(query) for query in queries], self.asker.answered_ids(queries, answers)
        embed = self.model.get_model().embed_tokens
        texts = [[without_image(answer) for answer in answers] for answers in answered]
        blind = blind_prompts(ids, scored.pool, embed)
        blind = label_prompts(blind, [without_image(prompt) for prompt in ids], texts, embed)
        return label_log_likelihoods(ContrastModel(self.model, blind, self.contrast), scored)
