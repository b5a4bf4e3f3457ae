"""Figures on their way from the device to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A small tensor copied to the host while the device goes on; asking for it waits for the copy alone.

    Args:
        tensor: of the device's present work.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._values = tensor.detach().clone()

    def tolist(self) -> list[float]:
        """The values."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()
