"""What a class, a task and a kind of image may be called: what a sentence can hold, and be read back from."""

import unicodedata
from collections.abc import Sequence

from vitask_plugin.data.names import look, shown
from vitask_plugin.data.reserved import IN_NAMES, reserved_in
from vitask_plugin.errors import VITaskError
from vitask_plugin.formats.shown import short

IMAGE_TOKEN = "<image>"
NO_FINDING = "no finding"
MULTI_LABEL = "multi-label, binary-class"  # medmnist's own word for it
KINDS = ("multi-class", "binary-class", "ordinal-regression", MULTI_LABEL)


def check_choices(choices: Sequence[str], where: str) -> None:
    """Refuses class names that a list in a sentence cannot hold.

    Raises:
        VITaskError: fewer than two names, an empty or repeated one, two that look alike, one without a letter or digit,
            or one with a comma, a line break, a full stop at its end, spaces around it, or a string that separates the
            turns of a conversation; `where` opens the sentence.
    """
    if len(choices) < 2:
        raise VITaskError(f"{where}: {len(choices)} class(es) {list(choices)!r}; at least two are needed")
    seen: dict[str, str] = {}
    for position, name in enumerate(choices):
        if not isinstance(name, str) or not name or name != name.strip():
            raise VITaskError(f"{where}: class name {short(name)} is not a plain, non-empty text; rename it")
        if not any(map(str.isalnum, name)):
            raise VITaskError(
                f"{where}: class name {name!r} holds no letter or digit; an answer with it could not be read back, so "
                "rename it"
            )
        if any(mark in name for mark in (",", "\n", "\r", IMAGE_TOKEN)) or name.endswith("."):
            raise VITaskError(
                f"{where}: class name {name!r} holds a comma, a line break or {IMAGE_TOKEN}, or ends in a full "
                "stop; an answer with it could not be read back, so rename it"
            )
        if any(unicodedata.category(char) in ("Cc", "Cs") for char in name):
            raise VITaskError(f"{where}: class name {name!a} holds a character that is none to be written; rename it")
        found = reserved_in(name, IN_NAMES)
        if found is not None:
            raise VITaskError(
                f"{where}: class name {name!r} holds {found!r}, which separates the turns of a conversation or is a "
                "special token; rename it"
            )
        other = seen.setdefault(look(name), name)
        if len(seen) != position + 1:
            alike = "" if other == name else f", the other time as {shown(other)}, which looks the same"
            raise VITaskError(
                f"{where}: class name {shown(name)} is there twice{alike}; rename one, or write them alike"
            )
        if look(name) == NO_FINDING:
            raise VITaskError(f"{where}: class name {name!r} is the answer for 'no class applies'; rename it")


def check_task(task: str) -> None:
    """Refuses a name of a task that a line of a log cannot show.

    Raises:
        VITaskError: it is blank, or holds what is not seen.
    """
    if not task.strip() or not task.isprintable():
        raise VITaskError(f"task {task!r} is no name that can be shown; give one of letters, digits and '_'")


def check_modality(modality: str) -> None:
    """Refuses words for the images that an instruction cannot hold.

    Raises:
        VITaskError: they are empty, hold a control character such as a line break, or a string that separates the
            turns of a conversation.
    """
    unseen = [char for char in modality if unicodedata.category(char) in ("Cc", "Cs")]
    found = reserved_in(modality, (*IN_NAMES, IMAGE_TOKEN, *unseen))
    if not modality.strip() or found is not None:
        wrong = "is empty" if found is None else f"holds {found!a}, which a question cannot hold as text"
        raise VITaskError(f"modality {modality!r} {wrong}; say what the images are, as in 'brain MRI'")
