"""The one exception for bad input: what is wrong, where, and what to do, in one sentence."""

from collections.abc import Iterator


class VITaskError(ValueError):
    """Bad input from outside: shown to the user as one sentence, without a traceback, with exit status 1."""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that, ...; each once, since they may form a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
