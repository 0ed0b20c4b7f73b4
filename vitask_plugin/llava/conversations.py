"""A run's conversation template, and samples whose words it or the tokenizer would take for its own."""

from typing import Any

from llava import conversation

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
