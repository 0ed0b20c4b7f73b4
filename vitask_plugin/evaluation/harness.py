"""How bad input leaves the harness: one sentence on stderr and exit status 1."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from vitask_plugin.errors import VITaskError


def exit_on_bad_input(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, ending the program on a `VITaskError`.

    lmms-eval tries some calls five times, catches every `Exception`, prints a traceback and exits with status 0.
    It lets `SystemExit` through, at once.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except VITaskError as error:
            raise SystemExit(f"vitask: error: {error}") from None

    return call


@contextmanager
def as_error() -> Iterator[None]:
    """For a program that asks the harness' models itself: what would end it is the `VITaskError` that it was."""
    try:
        yield
    except SystemExit as end:
        if isinstance(end.__context__, VITaskError):
            raise end.__context__ from None
        raise
