"""Where to compute: `auto`, or any device name of torch; and how a device or the host says that it is full."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from vitask_plugin.errors import VITaskError


def as_device(name: str) -> torch.device:
    """`auto` -> the GPU if there is one, else the CPU.

    Raises:
        VITaskError: if the device does not exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise VITaskError(f"--device {name} is not usable here ({reason}); use auto or cpu") from None
    return device


_FULL = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "can't allocate memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host has no memory left."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or any(words in str(error) for words in _FULL)
    )


@contextmanager
def memory_error_as(sentence: str) -> Iterator[None]:
    """Where memory runs out inside, the error is a `VITaskError` with this sentence."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise VITaskError(sentence) from error
