"""Which tensors can be a classifier's weights: dense, with values, not quantized, every number finite."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

_INSTEAD = {
    "foreign": "the state dict has to hold tensors alone",
    "sparse": "save it dense (tensor.to_dense())",
    "empty": "save or build the network where its weights have values, such as on the CPU",
    "quantized": "give the weights from before the quantization",
    "infinite": "the training that wrote it went wrong, so take an earlier checkpoint",
}


def fault(tensors: Mapping[str, Any], own: Mapping[str, Tensor] | None = None) -> str | None:
    """What makes the first unusable one of `tensors` unusable, and what to do; None if all are as they must be.

    Args:
        own: the tensors of the network that takes them, which says where a number may be infinite (a mask) and in
            which dtype it must be finite; by default parameters may nowhere be, and buffers may.
    """
    for name, tensor in tensors.items():
        found = _fault(tensor, None if own is None else own[name])
        if found is not None:
            return f"{name} {found[0]}; {_INSTEAD[found[1]]}"
    return None


def shape_of(tensor: Any) -> tuple[int, ...] | None:
    """None for what has none, such as a tensor of several lengths, or one whose size the first forward decides."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.is_nested:
        return None
    return tuple(tensor.shape)


def _fault(tensor: Any, own: Tensor | None) -> tuple[str, str] | None:
    if not isinstance(tensor, Tensor):
        return f"is no tensor ({type(tensor).__name__})", "foreign"
    if is_lazy(tensor):
        return "is not initialised", "empty"
    if tensor.is_quantized:
        return f"is quantized ({_dtype(tensor)})", "quantized"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"is a tensor of the layout {str(tensor.layout).removeprefix('torch.')}", "sparse"
    if tensor.is_meta:
        return "is on the meta device and has no values", "empty"
    if own is not None and own.is_floating_point() and not _is_plain_float(tensor):
        return f"holds {_dtype(tensor)} in place of floating-point numbers", "quantized"
    if not tensor.is_floating_point():
        return None
    values = tensor if own is None else tensor.to(own.dtype)
    if values.sum().isfinite():  # one pass, as NaN and infinity never leave a sum; a finite sum may still overflow
        return None
    finite = values.isfinite()
    if own is not None and not own.is_meta:
        finite |= values == own.to(values.device)
    elif not isinstance(tensor, torch.nn.Parameter):
        finite |= values.isinf()
    wrong = int((~finite).sum())
    return (f"holds {wrong} of {values.numel()} values that are NaN or infinite", "infinite") if wrong else None


def _is_plain_float(tensor: Tensor) -> bool:
    # Numbers of 8 bits and less mean nothing without the scales that were stored elsewhere.
    return tensor.is_floating_point() and tensor.dtype.itemsize > 1


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
