"""Names that look equal: how a name is written down, when two of them look alike, and how to show what the eye misses.

A folder name comes from a file system that may decompose its accents (NFD), a CSV cell from a program that may add
spaces or characters without width. Left as they are, two such spellings of one class are two classes.
"""

import re
import unicodedata
from collections.abc import Sequence
from decimal import Context, Decimal
from functools import lru_cache

_JOINERS = "\u200c\u200d"  # without width, yet they shape the letters of some scripts
# Fillers and variation selectors: seen as nothing, though not of the category Cf.
_BLANKS = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
_MARKS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\u02d7\ufe63\uff0d\u00ad", "-"),
        **dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4\u0060", "'"),
        **dict.fromkeys("\u201c\u201d\u2033", '"'),
    }
)
_DASHES = str.maketrans(dict.fromkeys("\u2014\u2015_", "-"))
# Greek and Cyrillic letters that are drawn as a Latin one is, capitals and small ones.
_TWINS = str.maketrans(
    "\u0391\u0392\u0395\u0396\u0397\u0399\u039a\u039c\u039d\u039f\u03a1\u03a4\u03a5\u03a7\u03bf"
    "\u0410\u0412\u0415\u041a\u041c\u041d\u041e\u0420\u0421\u0422\u0423\u0425\u0406\u0408\u0405"
    "\u0430\u0435\u043e\u0440\u0441\u0443\u0445\u0456\u0458\u0455",
    "ABEZHIKMNOPTYXo" + "ABEKMHOPCTYXIJS" + "aeopcyxijs",
)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)")
_BETWEEN_WORDS = re.compile(r"(?<=\w)[-\s]+(?=\w)")


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """The name as it is written down: accents composed (NFC), single plain spaces, nothing that has no width.

    Two names with the same plain form differ in nothing that can be seen: they are one name.
    """
    if name.isascii() and name.isprintable():  # nothing to compose or to leave out; most names of a million are so
        return " ".join(name.split())
    composed = unicodedata.normalize("NFC", name)
    seen = [char for place, char in enumerate(composed) if not _invisible(composed, place)]
    # Composed once more: what stood between a letter and its accent may be gone.
    return unicodedata.normalize("NFC", " ".join("".join(seen).split()))


def _invisible(text: str, place: int) -> bool:
    char = text[place]
    if char in _JOINERS:
        neighbours = text[max(0, place - 1) : place] + text[place + 1 : place + 2]
        return len(neighbours) < 2 or any(ord(other) < 0x0590 for other in neighbours)
    if char in _BLANKS or unicodedata.category(char) == "Cf":
        return True
    return unicodedata.category(char) == "Cc" and not char.isspace()


def readable(text: str) -> str:
    """`text` in the characters that a reader of answers knows: compatibility forms (NFKC), plain hyphens and quotes.

    "\uff26\uff4c\uff41\uff54" -> "Flat". Line breaks stay.
    """
    seen = "".join(char for place, char in enumerate(text) if char.isspace() or not _invisible(text, place))
    return unicodedata.normalize("NFKC", seen.translate(_MARKS))


def look(name: str) -> str:
    """The same for two names that a reader could take for one: in any letter case, width, kind of hyphen, spelling of a
    number ("1", "01", "1.0") or alphabet that the letters are drawn alike in."""
    text = readable(" ".join(plain(name).split())).translate(_TWINS).casefold().translate(_TWINS)
    text = "".join(char for char in unicodedata.normalize("NFKC", text) if char not in _JOINERS)
    words = _BETWEEN_WORDS.sub(" ", text.translate(_DASHES)).split()
    return " ".join(_number(word) if _NUMBER.fullmatch(word) else word for word in words)


def _number(word: str) -> str:
    exact = Context(prec=len(word))  # long ids have more digits than arithmetic keeps
    return str(exact.add(exact.normalize(Decimal(word)), 0))


def same_names(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two lists of names differ in nothing that can be seen."""
    return len(left) == len(right) and all(
        a == b or (isinstance(a, str) and isinstance(b, str) and plain(a) == plain(b))
        for a, b in zip(left, right, strict=True)
    )


def shown(name: str) -> str:
    """The name in quotes; where there is more to it than plain letters, also with that escaped."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"


def told_apart(names: Sequence[str], others: Sequence[str]) -> str:
    """A list of names as it is shown beside `others`: escaped where the two would read the same."""
    return ascii(list(names)) if same_names(names, others) else repr(list(names))
