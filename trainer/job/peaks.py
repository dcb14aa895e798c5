"""What the ranks of a job agree on of their devices' peak."""

from __future__ import annotations

from dataclasses import replace

import torch

from ...configs.schema import Config
from ...parallel.comm.collectives import all_reduce
from ...parallel.comm.mesh import Mesh
from ..metrics.notices import or_without
from ..metrics.peak import MeasuredPeaks, Peak, peak_tflops
from ..metrics.products import ceiling_tflops, products_of
from ..setup import DTYPES


def agreed_peak(cfg: Config, device: torch.device, kept: MeasuredPeaks, mesh: Mesh) -> Peak:
    """The peak of one device, and the ceiling of the model's products: measured unless the job names the peak itself of
    a CPU."""
    peak = _peak_alone(cfg, device, kept, mesh)
    if device.type == "cpu" and cfg.hardware.peak_tflops is not None:
        return peak
    own = ceiling_tflops(products_of(cfg), device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    total = all_reduce(torch.tensor([own], dtype=torch.float64, device=device), mesh.axis("world")).wait().item()
    return replace(peak, ceiling=total / mesh.degrees.world)


def _peak_alone(cfg: Config, device: torch.device, kept: MeasuredPeaks, mesh: Mesh) -> Peak:
    """The peak of one device; where it is measured, the mean over the ranks, so that all compute the same MFU.

    It is measured once in a run's life on the same kind of machine: a resumed run goes on with the same denominator.
    """
    world = mesh.axis("world")
    if device.type == "cpu" and cfg.hardware.peak_tflops is None:
        before = (kept.find(cfg.train.dtype, world.size) if mesh.is_first else None) or 0.0
        before = all_reduce(torch.tensor([before], dtype=torch.float64), world).wait().item()
        if before:
            return Peak(before, "measured when the run began")
    peak = peak_tflops(cfg.hardware, device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    if peak.source != "measured" or peak.tflops is None:
        return peak
    total = all_reduce(torch.tensor([peak.tflops], dtype=torch.float64), world).wait()
    mean = total.item() / world.size
    if mesh.is_first:
        with or_without("the measured peak"):
            kept.keep(cfg.train.dtype, world.size, mean)
    return Peak(mean, peak.source)
