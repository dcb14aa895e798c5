"""What the host plans and a device needs to know, copied there without a wait of the host for the device."""

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
