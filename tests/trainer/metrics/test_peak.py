"""Peaks of devices: the table, the config's, the measured ones."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from pentad.configs.schema import HardwareConfig
from pentad.trainer.metrics.peak import MeasuredPeaks, Peak, fp8_peak_tflops, measure_cpu_peak, peak_of, peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756),
        ("NVIDIA H100 NVL", torch.bfloat16, False, 835),
        ("NVIDIA H200", torch.bfloat16, False, 989),
        ("NVIDIA H20", torch.bfloat16, False, 148),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, False, 312),
        ("NVIDIA A100-SXM4-80GB", torch.float32, True, 156),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA B200", torch.bfloat16, False, 2250),
        ("NVIDIA GB200", torch.bfloat16, False, 2500),
        ("NVIDIA B200", torch.float64, False, None),
        ("AMD Instinct MI300X", torch.bfloat16, False, 1300),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.float8_e4m3fn, False, None),
        ("NVIDIA Something New", torch.bfloat16, False, None),
    ],
)
def test_peak_table(name: str, dtype: torch.dtype, tf32: bool, expected: float | None) -> None:
    peak = peak_of(name, dtype, tf32=tf32)
    assert peak.tflops == expected
    assert ("unknown" in peak.source) == (expected is None)


def test_peak_override_and_cpu_measurement() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(HardwareConfig(peak_tflops=12.5), cpu, torch.float32) == Peak(12.5, "hardware.peak_tflops")
    calls: list[int] = []
    rate = measure_cpu_peak(torch.float32, lambda: calls.append(1), seconds=0.05)
    assert 1e-4 < rate < 1e3 and calls


def test_a_measured_peak_is_kept_for_the_same_type_and_number_of_ranks(tmp_path: Path) -> None:
    kept = MeasuredPeaks(tmp_path / "peaks.json")
    assert kept.find("fp32", 2) is None
    kept.keep("fp32", 2, 0.125)
    kept.keep("bf16", 2, 0.5)
    again = MeasuredPeaks(tmp_path / "peaks.json")
    assert (again.find("fp32", 2), again.find("bf16", 2), again.find("fp32", 4)) == (0.125, 0.5, None)


@pytest.mark.parametrize("content", ["", "[1]", '{"a": 1, "a": 2}', "{", "1e999"])
def test_a_damaged_file_of_peaks_is_measured_anew(tmp_path: Path, content: str) -> None:
    kept = MeasuredPeaks(tmp_path / "peaks.json")
    (tmp_path / "peaks.json").write_text(content)
    assert kept.find("fp32", 1) is None
    kept.keep("fp32", 1, 0.25)
    assert kept.find("fp32", 1) == 0.25


def test_what_was_measured_on_a_host_holds_for_some_days(tmp_path: Path) -> None:
    file = tmp_path / "cache" / "peaks.json"
    kept = MeasuredPeaks(file, days=7)
    kept.keep("fp32", 1, 0.25)
    assert kept.find("fp32", 1) == 0.25
    old = file.stat().st_mtime - 8 * 86400
    os.utime(file, (old, old))
    assert kept.find("fp32", 1) is None and MeasuredPeaks(file).find("fp32", 1) == 0.25
    kept.keep("fp32", 2, 0.5)
    assert (kept.find("fp32", 1), kept.find("fp32", 2)) == (None, 0.5)


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA H100 80GB HBM3", 1978.0), ("NVIDIA A100-SXM4-80GB", None), ("NVIDIA T4", None)]
)
def test_peaks_in_eight_bits(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert fp8_peak_tflops(HardwareConfig(), gpu) == peak
    assert fp8_peak_tflops(HardwareConfig(peak_fp8_tflops=3.0), gpu) == 3.0
    assert fp8_peak_tflops(HardwareConfig(peak_tflops=3.0), cpu) is None
