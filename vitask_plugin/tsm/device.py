"""Where to compute: `auto`, or any device name of torch."""

import torch

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
