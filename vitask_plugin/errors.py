"""The one exception for bad input: what is wrong, where, and what to do, in one sentence."""


class VITaskError(ValueError):
    """Bad input from outside: shown to the user as one sentence, without a traceback, with exit status 1."""
