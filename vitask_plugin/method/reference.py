"""Stands in for an exemplar in a stock forward: tokens of no meaning, embedded as the exemplar is."""

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn


def unused_token(ids: Tensor) -> int:
    """The smallest token id that `ids` [T] does not hold."""
    return next(number for number in range(len(ids) + 1) if not (ids == number).any())


@contextlib.contextmanager
def embedded_as(embedding: nn.Module, token: int, exemplar: Tensor | None) -> Iterator[None]:
    """While the block runs, the places of `token` are embedded as `exemplar` [E, D], one after the other."""

    def put(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        here = args[0] == token
        if exemplar is None or not here.any():
            return None
        return output.masked_scatter(here[..., None], exemplar.to(output.dtype))

    handle = embedding.register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()
