"""Upstream's conversation templates as chat templates (Jinja), for tokenizers that find the same tokens in them.

Upstream tokenizes the text before and after an image by itself, and each piece begins as a text does: sentencepiece
puts a space before it. A chat template is one text, in which the image is a token among others. Whether a tokenizer
sees a beginning behind a special token depends on how it was made, so a space is written there where that is needed,
which is found by trying.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import Conversation
from llava.mm_utils import tokenizer_image_token

from vitask_plugin.errors import VITaskError

# What a question may begin and end with, and what tokenizers are known to differ in.
_TRIED = ("What is this?", " Two  spaces, ä 漢字 🙂.\nA: 12.5 %\n", "a", "\tIs it (b)? Answer with one word.\n\nYes/No")


@dataclass(frozen=True)
class _Turns:
    """The texts of a template between the words of user and assistant."""

    begin: str  # before the first question
    asked: str  # behind a question that an answer follows
    open: str  # behind a question that is to be answered
    between: str  # behind an answer, up to the next question
    end: str  # behind the last answer


def prompt(conversation: Conversation, *words: str | None) -> str:
    """Upstream's prompt for questions and answers by turns; None = an answer that is still to come."""
    conversation = conversation.copy()
    for number, each in enumerate(words):
        conversation.append_message(conversation.roles[number % 2], each)
    return conversation.get_prompt()


def question(text: str, images: int, *, start_end: bool) -> str:
    """A question's text as upstream's evaluation writes it: `images` placeholders first, a line each."""
    token = DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN if start_end else DEFAULT_IMAGE_TOKEN
    return f"{token}\n" * images + text


def chat_template(conversation: Conversation, own: Any, fast: Any, *, start_end: bool) -> str:
    """The chat template under which `fast` gives the tokens that upstream gives, whatever is asked in one turn.

    Args:
        conversation: upstream's template.
        own: the checkpoint's tokenizer. fast: the one to be written, which has `<image>` as a token.
        start_end: whether images stand between tokens of their own (`mm_use_im_start_end`).

    Raises:
        VITaskError: there is none.
    """
    image = fast.convert_tokens_to_ids(DEFAULT_IMAGE_TOKEN)
    bos = bool(own.bos_token_id is not None and own("a").input_ids[:1] == [own.bos_token_id])
    turns = _turns(conversation)

    def same(template: str) -> bool:
        return all(
            fast.apply_chat_template(message(text, images), chat_template=template, **_RENDERED)
            == upstream_ids(conversation, own, question(text, images, start_end=start_end), image)
            for text in _TRIED
            for images in (0, 1, 2)
        )

    for behind_bos, behind_image in itertools.product(("", " "), repeat=2):
        found = _jinja(conversation, turns, bos, behind_bos, behind_image, start_end)
        if same(found):
            return found
    raise VITaskError(
        f"no chat template gives the tokenizer of this checkpoint ({type(own).__name__}) the tokens that upstream's "
        f"template {conversation.version!r} gives; export a checkpoint with the tokenizer of Llama or Vicuna"
    )


_RENDERED = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}


def message(text: str, images: Sequence[Any] | int) -> list[dict[str, Any]]:
    """A question as the chat of one turn; images themselves, or how many placeholders."""
    given = [{"type": "image"}] * images if isinstance(images, int) else [{"type": "image", "image": i} for i in images]
    return [{"role": "user", "content": [*given, {"type": "text", "text": text}]}]


def upstream_ids(conversation: Conversation, tokenizer: Any, asked: str, image: int, answer: str | None = None) -> list:
    """Upstream's token ids of a turn, with `image` for each image."""
    ids = tokenizer_image_token(prompt(conversation, asked, answer), tokenizer)
    return [image if token < 0 else token for token in ids]


def _turns(conversation: Conversation) -> _Turns:
    """Read off upstream's own prompts, whatever their style.

    Raises:
        VITaskError: its turns are not all alike.
    """
    marks = [f"\x01{number}\x02" for number in range(4)]

    def pieces(*words: str | None) -> list[str]:
        rest, found = prompt(conversation, *words), []
        for word in filter(None, words):
            piece, _, rest = rest.partition(word)
            found.append(piece)
        return [*found, rest]

    begin, opened = pieces(marks[0], None)
    again, asked, between, asked_again, end = pieces(*marks)
    *_, opened_again = pieces(*marks[:3], None)
    if (begin, asked, opened) != (again, asked_again, opened_again):
        raise VITaskError(
            f"the turns of the conversation template {conversation.version!r} are unlike each other, which no chat "
            "template can say; export a checkpoint of another --version"
        )
    return _Turns(begin, asked, opened, between, end)


def _jinja(
    conversation: Conversation, turns: _Turns, bos: bool, behind_bos: str, behind_image: str, start_end: bool
) -> str:
    quoted: Callable[[str], str] = json.dumps  # Jinja reads the escapes of JSON
    begin = f"{{{{- bos_token + {quoted(behind_bos)} -}}}}" if bos else ""
    image = question("", 1, start_end=start_end).replace("\n", behind_image + "\n")
    if conversation.system:
        before, _, after = turns.begin.partition(conversation.system)
        given = f"{{{{- {quoted(before)} + text(messages[0]) + {quoted(after)} -}}}}"
    else:
        given = '{{- raise_exception("this conversation template has no place for a system message") -}}'
    # Servers look for these two loops to tell that images are given as parts of a message.
    return "\n".join(
        (
            "{%- macro text(message) -%}",
            "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}",
            "{%- for part in message['content'] if part['type'] in ('image', 'image_url') -%}",
            f"{{{{- {quoted(image)} -}}}}{{%- endfor -%}}",
            "{%- for part in message['content'] if part['type'] == 'text' -%}{{- part['text'] -}}{%- endfor -%}",
            "{%- endif -%}{%- endmacro -%}",
            "{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}",
            begin,
            f"{{%- if first -%}}{given}{{%- else -%}}{{{{- {quoted(turns.begin)} -}}}}{{%- endif -%}}",
            "{%- for message in messages -%}{%- if loop.index0 >= first -%}",
            "{%- set answers = (loop.index0 - first) % 2 == 1 -%}",
            "{%- if message['role'] != ('assistant' if answers else 'user') -%}",
            '{{- raise_exception("questions and answers must alternate, a question first") -}}{%- endif -%}',
            f"{{%- if answers -%}}{{{{- {quoted(turns.asked)} -}}}}",
            f"{{%- elif loop.index0 > first -%}}{{{{- {quoted(turns.between)} -}}}}{{%- endif -%}}",
            "{{- text(message) -}}",
            f"{{%- if loop.last and answers -%}}{{{{- {quoted(turns.end)} -}}}}{{%- endif -%}}",
            "{%- endif -%}{%- endfor -%}",
            f"{{%- if add_generation_prompt -%}}{{{{- {quoted(turns.open)} -}}}}{{%- endif -%}}",
        )
    )
