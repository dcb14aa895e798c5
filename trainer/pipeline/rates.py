"""How fast this job's devices compute and copy: as the job says, or measured when it starts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from ...configs.schema import Config
from ...models.costs.times import Rates
from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.disk import open_disk
from ...parallel.comm.host_memory import HostMemory
from ...parallel.comm.mesh import Mesh
from ..metrics.notices import warn
from ..metrics.peak import Peak
from ..setup import DTYPES

_SECONDS = 0.02
"""For each measurement: what is decided from it turns on factors, not on percents."""
_COPIED = {"cpu": 8 << 20, "cuda": 64 << 20}
_MULTIPLIED = {"cpu": 256, "cuda": 4096}
_STEPS = 4
"""Measured rates are rounded to so many values for each doubling, so that runs and restarts decide alike."""


def agreed_rates(cfg: Config, mesh: Mesh, device: torch.device, peak: Peak | None) -> Rates:
    """The rates that all ranks decide from: the job's keys, or the slowest rank's measurement.

    Args:
        cfg: the job, the same on all ranks, which call this together.
        mesh: their mesh.
        device: of this rank.
        peak: of a device, where it is known.

    Raises:
        UserError: the disk of `memory.offload_disk` cannot be written.
    """
    hardware, folder = cfg.hardware, cfg.memory.offload_disk if cfg.memory.host_gib is not None else None
    if hardware.peak_tflops is not None and hardware.host_gib_s is not None and folder is None:
        return Rates.of(hardware, cfg.train.dtype)
    # Where masters and moments go there too, who made their place has said it.
    says = mesh.is_first and cfg.memory.offload_optimizer != "disk"
    flops = hardware.peak_tflops or (peak.tflops if peak is not None else None)
    mine = (
        product_rate(device, DTYPES[cfg.train.dtype]) if flops is None else flops * 1e12,
        copy_rate(device) if hardware.host_gib_s is None else hardware.host_gib_s * 2**30,
        *(() if folder is None else disk_rate(folder, says=says)),
    )
    rates = torch.tensor(mine, dtype=torch.float64, device=device)
    found = all_reduce(rates, mesh.axis("world"), "min").wait().tolist()
    flops, host, *disk = map(_rounded, found)
    return Rates(flops, host, "measured", *disk)


def copy_rate(device: torch.device) -> float:
    """Bytes a second from this device to its host, or back, whichever is slower; on a CPU from memory to memory."""
    nbytes = _COPIED[device.type]
    here = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    host = HostMemory(nbytes, pinned=device.type == "cuda")
    try:
        ways = ((host.tensor, here), (here, host.tensor))
        return nbytes / max(_seconds(lambda to=to, of=of: to.copy_(of, non_blocking=True), device) for to, of in ways)
    finally:
        host.close()


def disk_rate(folder: str, *, says: bool) -> tuple[float, float]:
    """Bytes a second that are written to a disk, and read from it.

    Args:
        folder: on it.
        says: where it is reached through the page cache, in one line.

    Raises:
        UserError: it cannot be written.
    """
    disk = open_disk(folder)
    if disk.note and says:
        warn(disk.note)
    return disk.measure()


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of matrix products on this device."""
    size = _MULTIPLIED[device.type]
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return 2.0 * size**3 / _seconds(lambda: torch.mm(a, a, out=out), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of some runs."""
    best, until = math.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < until or best == math.inf:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def _rounded(rate: float) -> float:
    return 2.0 ** (round(math.log2(rate) * _STEPS) / _STEPS)
