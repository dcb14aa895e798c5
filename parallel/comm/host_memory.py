"""Memory of the host that copy engines of GPUs read and write by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

PAGE = 4096
"""Bytes; of which host memory begins and ends at a multiple, as disks that read and write it themselves demand."""


def whole_pages(nbytes: int) -> int:
    """The bytes, rounded up to pages."""
    return -(-nbytes // PAGE) * PAGE


def _driver() -> Any:
    return torch.cuda.cudart()


class HostMemory:
    """Bytes of the host, of exactly the size that was asked for, in pages of their own.

    torch's allocator of pinned memory rounds up to powers of two, up to twice the bytes; here ordinary memory is
    registered with the driver instead.

    Args:
        nbytes: how many.
        pinned: registered with CUDA, so that copies run beside the compute.

    Raises:
        MemoryError: the host has no such memory, or the driver cannot register it.
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.nbytes = nbytes
        whole = whole_pages(nbytes)
        try:
            # Not a tensor of torch's: on a CPU it would be counted among those that are on the device.
            memory = np.empty(whole + PAGE * (whole > 0), np.uint8)
        except MemoryError as error:
            raise MemoryError(f"the host has no {nbytes} bytes left") from error
        start = -memory.ctypes.data % PAGE
        self.pages: Tensor = torch.from_numpy(memory[start : start + whole])
        """(≥ nbytes,) whole pages."""
        self.tensor = self.pages[:nbytes]
        self._pinned = pinned and nbytes > 0
        if self._pinned:
            found = _driver().cudaHostRegister(self.pages.data_ptr(), whole, 0)
            if int(found) != 0:
                raise MemoryError(f"CUDA cannot register {nbytes} bytes of the host (error {int(found)})")

    def close(self) -> None:
        """Gives it back; nothing may use it any more."""
        if self._pinned:
            torch.cuda.synchronize()  # copies that are under way read or write it
            _driver().cudaHostUnregister(self.pages.data_ptr())
            self._pinned = False
        self.tensor = self.pages = torch.empty(0, dtype=torch.uint8)
        self.nbytes = 0
