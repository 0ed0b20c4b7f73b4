"""Upstream's LlavaLlamaForCausalLM with a VITask step: documents from a batch, branches through the decoder, losses.

Shapes: B samples, R rows of the batch (the samples, then the images drawn from the data set as negatives), T tokens of
a row, D hidden width, E exemplar tokens, F TSM feature width, n response tokens, V vocabulary.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from llava.constants import IGNORE_INDEX
from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import ModelOutput

from vitask_plugin import objective
from vitask_plugin.arguments import VITaskArguments
from vitask_plugin.branches import RUN, Continuation, Document, targets
from vitask_plugin.connector import ExemplarConnector
from vitask_plugin.llava.reading import readable

logger = logging.getLogger(__name__)


@dataclass
class Row:
    """One row of a batch after upstream expanded its image tokens, cut behind the last of them.

    Attributes:
        prefix: [P, D]; empty for a text-only row.
        is_image: [P] bool, which prefix positions are image tokens.
        continuation: [C, D] the text that follows.
        labels: [C] int64, `IGNORE` where no loss is taken.
    """

    prefix: Tensor
    is_image: Tensor
    continuation: Tensor
    labels: Tensor

    def replaced(self, exemplar: Tensor) -> Tensor:
        """The prefix with the exemplar [E, D] in place of the image tokens (the paper's `replace` control)."""
        last = int(self.is_image.nonzero()[-1])
        return torch.cat([self.prefix[:last][~self.is_image[:last]], exemplar])


@dataclass
class VITaskOutput(ModelOutput):
    """The loss of one step, and the sums behind the log: `{name: scalar}` (see `VITaskTrainer.log`)."""

    loss: Tensor | None = None
    sums: dict[str, Tensor] | None = None


class VITaskLlavaLlamaForCausalLM(LlavaLlamaForCausalLM):
    """LLaVA with an exemplar connector. Without a `vitask` batch its forward is upstream's."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vitask_connector: ExemplarConnector | None = None
        self.vitask_arguments: VITaskArguments | None = None

    @classmethod
    def from_pretrained(cls, *args: Any, attn_implementation: str | None = None, **kwargs: Any) -> Any:
        """As upstream, but sdpa for the FlashAttention that `train_mem.py` asks for: it takes no shared-prefix mask."""
        if attn_implementation and attn_implementation.startswith("flash_attention"):
            logger.warning("attention: sdpa instead of %s, which takes no shared-prefix mask", attn_implementation)
            attn_implementation = "sdpa"
        with readable("model", args[0]):
            return super().from_pretrained(*args, attn_implementation=attn_implementation, **kwargs)

    @functools.wraps(LlavaLlamaForCausalLM.forward)
    def forward(self, *args: Any, vitask: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
        if vitask is None:
            return super().forward(*args, **kwargs)
        # PEFT's wrapper hands on every argument it knows, most of them None.
        return self._vitask_step(**vitask, **{name: value for name, value in kwargs.items() if value is not None})

    # Rows and documents ------------------------------------------------------------------------------------------

    def vitask_rows(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Any,
        image_sizes: Any = None,
        labels: Tensor | None = None,
    ) -> list[Row]:
        """Upstream's own expansion of image tokens, called once, then cut behind the last image token.

        Token numbers travel through it in place of the labels, so that each expanded position says which token it came
        from, or that it is an image token.

        Args:
            input_ids: [R, T]. attention_mask: [R, T], 0 on pads. images: as upstream. labels: [R, T] or None.
        """
        numbers = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        _, _, mask, _, embeds, sources = self.prepare_inputs_labels_for_multimodal(
            input_ids, None, attention_mask, None, numbers, images, image_sizes
        )
        if embeds is None:  # no image anywhere in the batch
            embeds, sources, mask = self.get_model().embed_tokens(input_ids), numbers, attention_mask
        rows = []
        for number in range(len(input_ids)):
            valid = mask[number].bool()
            source, embed = sources[number][valid], embeds[number][valid]
            is_image = source == IGNORE_INDEX
            row_labels = torch.full_like(source, IGNORE_INDEX)
            if labels is not None:
                row_labels[~is_image] = labels[number][source[~is_image]]
            places = is_image.nonzero()
            cut = int(places[-1]) + 1 if len(places) else 0
            if (row_labels[:cut] != IGNORE_INDEX).any():
                cut = 0  # an answer before the image: general data only, which shares its prefix with nobody
            rows.append(Row(embed[:cut], is_image[:cut], embed[cut:], row_labels[cut:]))
        return rows

    def vitask_documents(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Any,
        image_sizes: Any = None,
        labels: Tensor | None = None,
        tsm_features: Tensor | None = None,
        tsm_lengths: Tensor | None = None,
    ) -> list[Document]:
        """One document per sample for generation and scoring: prefix, and the text after it as the one continuation.

        With TSM features the exemplar tokens stand after the image tokens, before the instruction; for a checkpoint
        trained with `replace`, in place of the image tokens.
        """
        rows = self.vitask_rows(input_ids, attention_mask, images, image_sizes, labels)
        if tsm_features is None:
            return [Document(row.prefix, [Continuation(row.continuation, row.labels)]) for row in rows]
        tokens = self.vitask_connector(tsm_features).to(rows[0].continuation.dtype)
        exemplars = _cut_exemplars(tokens, tsm_lengths)
        return [self._exemplar_document(row, exemplar) for row, exemplar in zip(rows, exemplars, strict=True)]

    def _exemplar_document(self, row: Row, exemplar: Tensor) -> Document:
        if self.vitask_arguments.vitask_ep == "replace":
            return Document(row.replaced(exemplar), [Continuation(row.continuation, row.labels)])
        return Document(row.prefix, [_prompted(row, exemplar)])

    # Training ----------------------------------------------------------------------------------------------------

    def _decode(self, inputs_embeds: Tensor, attention_mask: Tensor, position_ids: Tensor) -> Tensor:
        return self.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
        ).last_hidden_state

    def vitask_label_logits(self, documents: list[Document], engine: str = "packed") -> list[list[Tensor]]:
        """Logits [n, V] of the labelled tokens (see `branches.targets`) of every continuation, logits nowhere else."""
        states = RUN[engine](self._decode, documents)
        flat = [state for row in states for state in row]
        logits = self.lm_head(torch.cat(flat)).split([len(state) for state in flat])
        pieces = iter(logits)
        return [[next(pieces) for _ in row] for row in states]

    def _vitask_step(
        self,
        *,
        negative_rows: Tensor,
        denominator: Tensor,
        features: Tensor | None = None,
        lengths: Tensor | None = None,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        images: Any = None,
        image_sizes: Any = None,
    ) -> VITaskOutput:
        """All branches of a batch in one forward, and the stage's loss.

        Args:
            negative_rows: [B] int64, the row whose image is the negative of sample k; -1: none.
            denominator: scalar, response tokens of the whole accumulation step over all ranks.
            features: [B, E, F] TSM features, padded. lengths: [B], exemplar tokens of each sample, 0 for none.
            input_ids, attention_mask, labels: [R, T], R >= B; rows past B hold the prefix of an extra negative image.
        """
        arguments = self.vitask_arguments
        rows = self.vitask_rows(input_ids, attention_mask, images, image_sizes, labels)
        negatives = negative_rows.tolist()
        samples = len(negatives)
        plain = [Continuation(row.continuation, row.labels) for row in rows]
        documents = [
            Document(row.prefix, [plain[number]] if number < samples else []) for number, row in enumerate(rows)
        ]

        prompted: dict[int, tuple[int, int]] = {}  # sample -> (document, continuation)
        if features is not None:
            tokens = self.vitask_connector(features).to(rows[0].continuation.dtype)
            for number, exemplar in enumerate(_cut_exemplars(tokens, lengths)):
                if len(exemplar) == 0:
                    continue
                if arguments.vitask_ep == "replace":
                    documents.append(self._exemplar_document(rows[number], exemplar))
                    prompted[number] = (len(documents) - 1, 0)
                else:
                    documents[number].continuations.append(_prompted(rows[number], exemplar))
                    prompted[number] = (number, 1)
        contrasted: dict[int, tuple[int, int]] = {}
        for number, row in enumerate(negatives):
            if row >= 0:
                documents[row].continuations.append(plain[number])
                contrasted[number] = (row, len(documents[row].continuations) - 1)

        logits = self.vitask_label_logits(documents, arguments.vitask_engine)
        answers = [targets(documents[number], plain[number]) for number in range(samples)]
        sums = _sums(logits, answers, prompted, contrasted)
        sums["samples"] = negative_rows.new_tensor(samples)
        sums["unanswered"] = negative_rows.new_tensor(sum(len(answer) == 0 for answer in answers))
        sums["negatives"] = negative_rows.ge(0).sum()
        sums["in_batch_negatives"] = (negative_rows.ge(0) & negative_rows.lt(samples)).sum()
        loss = objective.total(
            sums,
            stage=arguments.vitask_stage,
            rda_weight=arguments.vitask_rda_weight,
            crt_weight=arguments.vitask_crt_weight,
            denominator=denominator,
        )
        if features is not None and not prompted:
            # Every rank's connector takes part in every step: DDP and ZeRO wait for each other's gradients.
            loss = loss + 0.0 * tokens.sum()
        return VITaskOutput(loss=loss, sums={name: value.detach() for name, value in sums.items()})

    # Inference ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def vitask_generate(self, documents: list[Document], **kwargs: Any) -> Tensor:
        """Generated token ids [B, new tokens] after prefix + first continuation of each document, padded on the left.

        Left padding with an attention mask gives each sample the answer it would get alone.
        """
        prompts = [torch.cat([document.prefix, document.continuations[0].embeds]) for document in documents]
        embeds = pad_sequence([prompt.flip(0) for prompt in prompts], batch_first=True).flip(1)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=embeds.device)
        index = torch.arange(embeds.shape[1], device=embeds.device)
        mask = (index >= embeds.shape[1] - lengths[:, None]).long()
        # Past upstream's generate, which takes token ids and images only.
        return super(LlavaLlamaForCausalLM, self).generate(inputs_embeds=embeds, attention_mask=mask, **kwargs)


def _cut_exemplars(tokens: Tensor, lengths: Tensor) -> list[Tensor]:
    """Exemplar tokens [e_i, D] of each sample from padded ones [B, E, D]; e_i = `lengths[i]`, 0 for none."""
    return [tokens[number, :length] for number, length in enumerate(lengths.tolist())]


def _sums(
    logits: list[list[Tensor]],
    answers: list[Tensor],
    prompted: dict[int, tuple[int, int]],
    contrasted: dict[int, tuple[int, int]],
) -> dict[str, Tensor]:
    """Each term's sum over response tokens, the number of those tokens, and how many are predicted right.

    Args:
        logits: per document, per continuation, [n, V]; sample k's plain branch is `logits[k][0]`.
        answers: per sample, [n] int64.
        prompted, contrasted: sample -> (document, continuation) of its exemplar-prompted and its negative branch.
    """
    none = logits[0][0][:0]

    def branch(places: dict[int, tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        plain = torch.cat([none, *(logits[sample][0] for sample in places)])
        other = torch.cat([none, *(logits[document][number] for document, number in places.values())])
        return plain, other, torch.cat([answers[0][:0], *(answers[sample] for sample in places)])

    plain, _, answer = branch({sample: (sample, 0) for sample in range(len(answers))})
    plain_of_prompted, exemplar, prompted_answer = branch(prompted)
    positive, negative, contrasted_answer = branch(contrasted)
    return {
        "vanilla": objective.negative_log_likelihood(plain, answer).sum(),
        "ep": objective.negative_log_likelihood(exemplar, prompted_answer).sum(),
        "rda": objective.response_distribution_alignment(plain_of_prompted, exemplar).sum(),
        "crt": objective.contrastive_response_tuning(positive, negative, contrasted_answer).sum(),
        "vanilla_tokens": answer.new_tensor(len(answer)),
        "ep_tokens": answer.new_tensor(len(prompted_answer)),
        "crt_tokens": answer.new_tensor(len(contrasted_answer)),
        "correct": (plain.argmax(dim=-1) == answer).sum(),
        "correct_ep": (exemplar.argmax(dim=-1) == prompted_answer).sum(),
    }


def _prompted(row: Row, exemplar: Tensor) -> Continuation:
    """The exemplar-prompted continuation: exemplar tokens [e, D], which carry no loss, then the row's text."""
    blank = row.labels.new_full((len(exemplar),), IGNORE_INDEX)
    return Continuation(torch.cat([exemplar, row.continuation]), torch.cat([blank, row.labels]))
