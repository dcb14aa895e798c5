"""Memory of the host that copy engines of GPUs read and write by themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _driver() -> Any:
    return torch.cuda.cudart()


class HostMemory:
    """Bytes of the host, of exactly the size that was asked for.

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
        try:
            self.tensor: Tensor = torch.empty(nbytes, dtype=torch.uint8)
        except RuntimeError as error:  # what torch raises where malloc fails
            raise MemoryError(f"the host has no {nbytes} bytes for activations") from error
        self._pinned = pinned and nbytes > 0
        if self._pinned:
            found = _driver().cudaHostRegister(self.tensor.data_ptr(), nbytes, 0)
            if int(found) != 0:
                raise MemoryError(f"CUDA cannot register {nbytes} bytes of the host (error {int(found)})")

    def close(self) -> None:
        """Gives it back; nothing may use it any more."""
        if self._pinned:
            torch.cuda.synchronize()  # copies that are under way read or write it
            _driver().cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self.nbytes = 0
