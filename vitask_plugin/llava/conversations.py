"""Words that the run's conversation template or tokenizer would take for its own."""

from typing import Any

from llava import conversation

_INSTRUCTION_MARKS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")  # which upstream's LLAMA_2 style writes itself


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
