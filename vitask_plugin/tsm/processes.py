"""The processes of one launch (`accelerate launch`, torchrun) that train a TSM together; or the only one there is."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from vitask_plugin.errors import VITaskError
from vitask_plugin.tsm.device import as_device


class Processes:
    """This process among those of its launch.

    Attributes:
        count: of the processes. index: of this one.
        device: where this one computes.

    Raises:
        VITaskError: no such device, or one that several processes cannot share.
    """

    def __init__(self, device: str) -> None:
        self.count, self.index = 1, 0
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched == 1 or "LOCAL_RANK" not in os.environ:
            # Nothing of accelerate's, whose state is that of the whole Python process and perhaps of a Trainer in it.
            self.device = as_device(device)
            return
        from accelerate import Accelerator

        if device not in ("auto", "cpu", "cuda"):
            raise VITaskError(f"--device {device} is one device, but {launched} processes are launched; use auto")
        on_cpu = device == "cpu" or not torch.cuda.is_available()
        self._accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
        self.count, self.index = self._accelerator.num_processes, self._accelerator.process_index
        self.device = self._accelerator.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes and speaks."""
        return self.index == 0

    def together(self, network: nn.Module) -> nn.Module:
        """`network`, whose gradients become the mean over the processes."""
        return network if self.count == 1 else self._accelerator.prepare_model(network)

    def share_buffers(self, *networks: nn.Module) -> None:
        """Gives every process the first one's buffers, such as the running statistics of batch normalisation."""
        if self.count > 1:
            for network in networks:
                for buffer in network.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def gathered(self, value: Any) -> list[Any]:
        """The `value` of every process, on each of them."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        return gather_object([value])

    def wait(self) -> None:
        """Until every process is here."""
        if self.count > 1:
            self._accelerator.wait_for_everyone()

    def share(self, items: Sequence[Any], what: str) -> Sequence[Any]:
        """Every so manyth of the items.

        Raises:
            VITaskError: if there are fewer than processes.
        """
        if len(items) < self.count:
            raise VITaskError(f"the {what} has {len(items)} images for {self.count} processes; launch fewer")
        return items[self.index :: self.count]

    def end(self) -> None:
        """The last thing that they do together."""
        if self.count > 1:
            self._accelerator.state.destroy_process_group()
