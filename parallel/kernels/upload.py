"""What the host plans and a device needs to know, and what a device found, copied without a wait of either."""

from __future__ import annotations

import torch
from torch import Tensor


def upload(x: Tensor, device: torch.device) -> Tensor:
    """x on the device, for work that is queued there from now on.

    From page-locked memory: a copy from any other makes the host wait until the device has done all before it.
    """
    if device.type == "cpu" or x.device.type != "cpu":
        return x.to(device)
    return (x if x.is_pinned() else x.pin_memory()).to(device, non_blocking=True)


def _page_locked(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)


class Download:
    """Values on their way from a device to the host, which goes on meanwhile; of a CPU they are there at once.

    Args:
        x: of any shape, as it is after all that was queued before.
    """

    def __init__(self, x: Tensor) -> None:
        self._host, self._event = x, None
        if x.is_cuda:
            self._host, self._event = _page_locked(x).copy_(x, non_blocking=True), torch.cuda.Event()
            self._event.record()

    def landed(self) -> bool:
        """Whether they are there."""
        return self._event is None or self._event.query()

    def tolist(self) -> list[float]:
        """The values (n,); waits until they have landed."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()


class Constant:
    """A tensor of the host, and its copies on devices, each made once."""

    def __init__(self, value: Tensor) -> None:
        self.value = value
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The copy on a device."""
        if device not in self._copies:
            self._copies[device] = upload(self.value, device)
        return self._copies[device]
