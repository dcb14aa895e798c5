"""Peak arithmetic rate of a device: the denominator of MFU."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...configs.schema import HardwareConfig
from ...configs.strict_json import JsonError, read_json

# Dense TFLOP/s by pattern of torch.cuda.get_device_name: bf16 (fp32 sums), tf32, fp32 without tensor cores, fp64 with
# them. bf16 as in torchtitan's get_peak_flops and the makers' data sheets; None: not published, or not known to us.
_PEAKS: tuple[tuple[str, float | None, float | None, float | None, float | None], ...] = (
    (r"H200 NVL|H100 NVL", 835, 417.5, 60, 60),
    (r"H100 PCIe|H800 PCIe", 756, 378, 51, None),
    (r"H800", 989, 494.5, 67, 1),
    (r"H100|H200|GH200", 989, 494.5, 67, 67),
    (r"H20", 148, 74, 44, 1),
    (r"A100", 312, 156, 19.5, 19.5),
    (r"A800", 312, 156, 19.5, 9.7),
    (r"GB200|GB300", 2500, None, None, None),
    (r"B200|B300", 2250, None, None, None),
    (r"MI300X|MI325X", 1300, None, 163.4, 163.4),
    (r"MI355X", 2500, None, None, None),
    (r"MI250X", 191.5, None, None, None),
    (r"L40S", 362, 183, 91.6, None),
    (r"RTX A6000", 154.85, 77.4, 38.7, None),
)
_WITHOUT_FP8 = re.compile(r"\b(?:A100|A800|MI250X|RTX A6000)\b")
"""Of the devices above; the others multiply 8-bit matrices at twice the rate of bf16."""
# A slice of a device (MIG, vGPU), or a mobile part of the same name, does not have the device's peak.
_NOT_THE_WHOLE = re.compile(r"\b(?:MIG|GRID)\b|Laptop|Max-Q", re.IGNORECASE)


@dataclass(frozen=True)
class Peak:
    """Peak dense TFLOP/s of one device, None where it is not known, and where the number comes from.

    Args:
        ceiling: what the device reaches in the model's own products; None where that was not measured.
        fp8: peak for products in 8 bits.
    """

    tflops: float | None
    source: str
    ceiling: float | None = None
    fp8: float | None = None


def peak_tflops(
    cfg: HardwareConfig,
    device: torch.device,
    dtype: torch.dtype,
    barrier: Callable[[], object] = lambda: None,
) -> Peak:
    """Peak of `device` for matrix products in `dtype`: the config's, else the table's, else on a CPU a measurement.

    barrier: waits for all ranks of the node, which must all call this; used on a CPU only.
    """
    if cfg.peak_tflops is not None:
        return Peak(cfg.peak_tflops, "hardware.peak_tflops")
    if device.type == "cpu":
        return Peak(measure_cpu_peak(dtype, barrier), "measured")
    if device.type == "cuda":
        tf32 = torch.get_float32_matmul_precision() != "highest"
        return peak_of(torch.cuda.get_device_name(device), dtype, tf32=tf32)
    return Peak(None, "unknown device")


def peak_of(device_name: str, dtype: torch.dtype, *, tf32: bool) -> Peak:
    """Table row of a device name; tf32: fp32 products run on tensor cores in TF32."""
    if not _NOT_THE_WHOLE.search(device_name):
        for pattern, bf16, tf32_peak, fp32, fp64 in _PEAKS:
            if not re.search(rf"\b(?:{pattern})\b", device_name):
                continue
            if dtype == torch.float32:
                peak, kind = (tf32_peak, "tf32") if tf32 else (fp32, "fp32")
            else:
                peak = {torch.bfloat16: bf16, torch.float16: bf16, torch.float64: fp64}.get(dtype)
                kind = str(dtype).removeprefix("torch.")
            if peak is None:
                return Peak(None, f"unknown {kind} peak of {device_name}")
            return Peak(float(peak), f"{device_name}, dense {kind}")
    return Peak(None, "unknown device")


def fp8_peak_tflops(cfg: HardwareConfig, device: torch.device) -> float | None:
    """Peak of a device for products in 8 bits: the config's, else twice its listed one in bf16; none: not known."""
    if cfg.peak_fp8_tflops is not None or device.type != "cuda":
        return cfg.peak_fp8_tflops
    name = torch.cuda.get_device_name(device)
    listed = None if _WITHOUT_FP8.search(name) else peak_of(name, torch.bfloat16, tf32=False).tflops
    return None if listed is None else 2 * listed


def measure_cpu_peak(dtype: torch.dtype, barrier: Callable[[], object], seconds: float = 0.5) -> float:
    """TFLOP/s of matrix products in `dtype` on this rank's own threads, while the node's other ranks do the same.

    For each of two sizes all ranks start together (barrier) and multiply for `seconds`; the result is the better of the
    two rates. Ranks that share cores so get their share, as they do in training.
    """
    best = 0.0
    for size in (1024, 2048):
        a = torch.randn(size, size).to(dtype)
        b = torch.randn(size, size).to(dtype)
        out = torch.empty(size, size, dtype=dtype)
        torch.mm(a, b.t(), out=out)
        barrier()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            torch.mm(a, b.t(), out=out)
            count += 1
        best = max(best, 2 * size**3 * count / (time.perf_counter() - begin) / 1e12)
    barrier()
    return best


class MeasuredPeaks:
    """What was measured before, in a file of a run or of a host: a number for each kind of measurement.

    What a measurement depends on is its key: the processor, the type, the number of ranks and of each one's threads.

    Args:
        file: may be absent.
        days: how old it may be; none: any age.
    """

    def __init__(self, file: Path, days: float | None = None) -> None:
        self._file, self._days = file, days

    def find(self, dtype: str, ranks: int) -> float | None:
        """TFLOP/s of one rank; none where nothing fitting was kept, or the file is not what `keep` wrote."""
        value = self._read().get(_measurement(dtype, ranks))
        return value if isinstance(value, float) and value > 0 else None

    def keep(self, dtype: str, ranks: int, tflops: float) -> None:
        """Adds a measurement. A folder that cannot be written fails elsewhere, with the key to set."""
        values = {**self._read(), _measurement(dtype, ranks): tflops}
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(values, indent=1) + "\n")
        os.replace(partial, self._file)

    def _read(self) -> dict[str, object]:
        try:
            if self._days is not None and time.time() - self._file.stat().st_mtime > self._days * 86400:
                return {}
            values = read_json(self._file)
        except (OSError, JsonError):
            return {}
        return values if isinstance(values, dict) else {}


def _measurement(dtype: str, ranks: int) -> str:
    return f"{processor_name()}, {dtype}, {ranks} ranks of {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The model of this machine's processors."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1) if found else platform.machine()
