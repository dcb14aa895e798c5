"""How fast a rank's device computes and copies, for what is decided from times before a step runs. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from ...configs.schema import HardwareConfig

_TFLOPS = {"bf16": 989.5, "fp32": 66.9, "fp64": 66.9}
_HOST_GIB_S = 59.6
"""Of an H100 SXM5 on PCIe 5.0, where nothing is known of the devices."""


@dataclass(frozen=True)
class Rates:
    """What one device does in a second.

    Args:
        flops: of matrix products in train.dtype.
        host_bytes: that go to its host, and as many that come from it at the same time.
        source: where the numbers are from, for people.
        stored, fetched: bytes that go to a disk, and that come from it, for what the host may not hold.
    """

    flops: float
    host_bytes: float
    source: str
    stored: float = 3e9
    fetched: float = 5e9

    @staticmethod
    def of(hardware: HardwareConfig, dtype: str) -> Rates:
        """Those of the job's keys or preset; for what they do not say, those of an H100."""
        given = {"peak_tflops": hardware.peak_tflops, "host_gib_s": hardware.host_gib_s}
        tflops = _TFLOPS[dtype] if hardware.peak_tflops is None else hardware.peak_tflops
        gib_s = _HOST_GIB_S if hardware.host_gib_s is None else hardware.host_gib_s
        missing = [f"hardware.{key}" for key, value in given.items() if value is None]
        source = f"{' and '.join(missing)} assumed, an H100's" if missing else "hardware"
        return Rates(tflops * 1e12, gib_s * 2**30, source)
