"""Strings that a conversation template or a tokenizer gives a meaning: in the words of a sample they cut it in pieces.

Upstream finds the answers of a conversation by splitting its text at the template's own strings. A sample that holds
one of them as text, or an answer of no words, is learnt in part, wrongly, or not at all.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitask_plugin.data.names import plain
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)

# Of every template and of the usual tokenizers; what one template alone uses ("###", "Human:") is asked of that one.
COMMON = (
    *("<s>", "</s>", "<unk>", "<pad>", "[PAD]", "USER:", "ASSISTANT:"),
    *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"),
    *("<im_patch>", "<im_start>", "<im_end>"),
)
IN_NAMES = (*COMMON, "###", "Human:", "Assistant:")  # what no class name and no modality needs


def reserved_in(text: str, strings: Iterable[str] = COMMON) -> str | None:
    """The first of `strings` that `text` holds, None = none."""
    return next((string for string in strings if string in text), None)


def turn_problem(turns: Sequence[Mapping[str, Any]], strings: Sequence[str] = COMMON) -> str | None:
    """What keeps a conversation from being learnt as it is written, as the rest of a sentence; None = nothing.

    Args:
        turns: upstream's `conversations`: `from` ("human" or "gpt") and `value`.
    """
    for number, turn in enumerate(turns):
        what = f"turn {number}, {'an answer' if turn['from'] == 'gpt' else 'a question'},"
        # What is long is hardly all unseen, and a million answers are many characters to look at.
        if not turn["value"].strip() or (len(turn["value"]) < 20 and not plain(turn["value"])):
            return f"{what} is empty; write it, or remove the sample"
        try:
            turn["value"].encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            return f"{what} holds half a character ({half!a}), which no tokenizer reads; correct it"
        found = reserved_in(turn["value"], strings)
        if found is not None:
            return (
                f"{what} holds {found!r}, which separates the turns of a conversation or is a special token; "
                "word it otherwise"
            )
    return None


def check_turns(samples: Sequence[Mapping[str, Any]], strings: Sequence[str], data_path: str) -> None:
    """Refuses task samples that could not be learnt as they are written; of other samples says how many there are.

    A conversation is split at these strings to find its answers. General instruction data are trained as the host
    would, so there they are counted and named once.

    Raises:
        VITaskError: naming file, sample, turn and string.
    """
    general = []
    for index, sample in enumerate(samples):
        problem = turn_problem(sample["conversations"], strings)
        if problem is None:
            continue
        where = f"sample {index}" + (f" (id {sample['id']!r})" if "id" in sample else "")
        if "vitask" in sample:
            raise VITaskError(f"data file {data_path!r}, {where}: {problem}")
        general.append(f"{where}: {problem}")
    if general:
        logger.warning(
            "%d of %d samples of %r, none with a 'vitask' block, are not learnt as they are written, the first: %s",
            *(len(general), len(samples), data_path, general[0]),
        )
