"""What the ranks of a job agree on of their devices' peak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ...configs.schema import Config
from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Mesh
from ..metrics.notices import or_without
from ..metrics.peak import MeasuredPeaks, Peak, fp8_peak_tflops, peak_tflops
from ..metrics.products import ceiling_tflops, products_of
from ..run_folder import RunFile
from ..setup import DTYPES

_DAYS = 7
"""How long what was measured on a host holds for new runs there."""


def kept_peaks(cfg: Config, run_dir: Path) -> tuple[MeasuredPeaks, ...]:
    """Where measured peaks are kept: in the run, and on this host for other runs."""
    of_run = MeasuredPeaks(run_dir / RunFile.PEAKS)
    cache = cfg.data.cache
    return (of_run,) if cache is None else (of_run, MeasuredPeaks(Path(cache) / RunFile.PEAKS, _DAYS))


def agreed_peak(cfg: Config, device: torch.device, kept: Sequence[MeasuredPeaks], mesh: Mesh) -> Peak:
    """The peak of one device, and the ceiling of the model's products: measured unless the job names the peak itself of
    a CPU."""
    peak = replace(_peak_alone(cfg, device, kept, mesh), fp8=fp8_peak_tflops(cfg.hardware, device))
    if device.type == "cpu" and cfg.hardware.peak_tflops is not None:
        return peak
    own = ceiling_tflops(products_of(cfg), device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    total = all_reduce(torch.tensor([own], dtype=torch.float64, device=device), mesh.axis("world")).wait().item()
    return replace(peak, ceiling=total / mesh.degrees.world)


def _peak_alone(cfg: Config, device: torch.device, kept: Sequence[MeasuredPeaks], mesh: Mesh) -> Peak:
    """The peak of one device; where it is measured, the mean over the ranks, so that all compute the same MFU.

    It is measured once in a run's life on the same kind of machine: a resumed run goes on with the same denominator,
    and so does another run of the next days on this host.
    """
    world = mesh.axis("world")
    if device.type == "cpu" and cfg.hardware.peak_tflops is None:
        # The number, and where it was: each as 0 on all ranks but the first.
        found = [
            (value, float(at)) for at, each in enumerate(kept) if (value := each.find(cfg.train.dtype, world.size))
        ]
        first = found[0] if found and mesh.is_first else (0.0, 0.0)
        before, at = all_reduce(torch.tensor(first, dtype=torch.float64), world).wait().tolist()
        if before:
            _keep(kept[:1] if at and mesh.is_first else (), cfg, world.size, before)
            return Peak(before, "measured on this host before" if at else "measured when the run began")
    peak = peak_tflops(cfg.hardware, device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    if peak.source != "measured" or peak.tflops is None:
        return peak
    total = all_reduce(torch.tensor([peak.tflops], dtype=torch.float64), world).wait()
    mean = total.item() / world.size
    _keep(kept if mesh.is_first else (), cfg, world.size, mean)
    return Peak(mean, peak.source)


def _keep(places: Sequence[MeasuredPeaks], cfg: Config, ranks: int, tflops: float) -> None:
    for place in places:
        with or_without("the measured peak"):
            place.keep(cfg.train.dtype, ranks, tflops)
