"""Strings that a conversation template or a tokenizer gives a meaning: in the words of a sample they cut it in pieces.

Upstream finds the answers of a conversation by splitting its text at the template's own strings. A sample that holds
one of them as text, or an answer of no words, is learnt in part, wrongly, or not at all.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vitask_plugin.data.names import plain

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
            return f"{what} holds half a character ({half!a}), which no tokenizer reads; mend it"
        found = reserved_in(turn["value"], strings)
        if found is not None:
            return (
                f"{what} holds {found!r}, which separates the turns of a conversation or is a special token; "
                "word it otherwise"
            )
    return None
