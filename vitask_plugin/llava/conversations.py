"""A run's conversation template, and samples whose words it or the tokenizer would take for its own."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from llava import conversation

from vitask_plugin.data.reserved import turn_problem
from vitask_plugin.errors import VITaskError

logger = logging.getLogger(__name__)
_INSTRUCTION_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")  # which upstream's LLAMA_2 style writes itself
_DEFAULT = "vicuna_v1"


def template_name(version: str | None) -> str:
    """Upstream's template of a training run, by its name in `conv_templates`.

    Args:
        version: `--version` of the run, None if the checkpoint does not tell.
    """
    # Upstream's script takes its default for v0, v0.5 and what it does not know.
    return version if version in conversation.conv_templates and version != "v0" else _DEFAULT


def reserved_strings(tokenizer: Any) -> tuple[str, ...]:
    """Separators and roles of the template in use (upstream's `default_conversation`), and the tokenizer's special
    tokens."""
    template, style = conversation.default_conversation, conversation.SeparatorStyle
    found = [template.sep, template.sep2]
    if template.sep_style is style.LLAMA_2:
        found += _INSTRUCTION_MARKS
    elif template.sep_style is style.MPT:
        found += [role.strip() for role in template.roles]
    elif template.sep_style is not style.PLAIN:
        found += [f"{role}:" for role in template.roles]
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found += [*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)]
    return tuple(dict.fromkeys(string for string in found if string and string.strip()))


def check_turns(samples: Sequence[Mapping[str, Any]], tokenizer: Any, data_path: str) -> None:
    """Refuses task samples that could not be learnt as they are written; of other samples says how many there are.

    Upstream splits a conversation at these strings to find its answers. General instruction data are trained as
    upstream would, so there they are counted and named once.

    Raises:
        VITaskError: naming file, sample, turn and string.
    """
    strings = reserved_strings(tokenizer)
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
