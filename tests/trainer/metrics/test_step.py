"""Step metrics: the arithmetic of MFU, the JSON keys, the console line's width; peaks."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from pentad.configs.schema import HardwareConfig
from pentad.trainer.metrics.peak import MeasuredPeaks, Peak, lookup, measure_cpu_peak, peak_tflops
from pentad.trainer.metrics.step import (
    Meter,
    Pace,
    StepFlops,
    StepMetrics,
    console_header,
    console_line,
    duration,
    peak_memory_gib,
    use_color,
)

KEYS = {
    *("step", "loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "tokens_per_s_per_device", "mfu"),
    *("mfu_full", "hfu", "tflops_per_device", "peak_tflops", "memory_gib", "data_s", "waterfall", "straggler", "moe"),
    "skipped",
}


def metrics(**changes: object) -> StepMetrics:
    meter = Meter(devices=4, peak=Peak(100.0, "test"), tokens=1000, skipped=1)
    m = meter.step(
        step=7,
        loss=2.5,
        grad_norm=1.25,
        lr=3e-4,
        tokens=800,
        step_time_s=2.0,
        data_s=0.1,
        memory_gib=1.5,
        flops=StepFlops(causal=160e12, full=200e12, hardware=240e12),
    )
    return dataclasses.replace(m, **changes)  # type: ignore[arg-type]


def test_rates_and_fractions() -> None:
    m = metrics()
    assert (m.tokens, m.skipped) == (1800, 1)
    assert (m.tokens_per_s, m.tokens_per_s_per_device) == (400, 100)
    # 160 TFLOP in 2 s on 4 devices of 100 TFLOP/s: 20 TFLOP/s each
    assert m.tflops_per_device == pytest.approx(20)
    assert (m.mfu, m.mfu_full, m.hfu) == pytest.approx((0.2, 0.25, 0.3))


def test_unknown_peak_gives_no_mfu() -> None:
    meter = Meter(devices=1, peak=Peak(None, "unknown device"))
    flops = StepFlops(1e12, 1e12, 1e12)
    m = meter.step(
        step=1, loss=1.0, grad_norm=1.0, lr=0.1, tokens=1, step_time_s=1, data_s=0, memory_gib=1, flops=flops
    )
    assert (m.mfu, m.mfu_full, m.hfu, m.peak_tflops) == (None, None, None, None) and m.tflops_per_device == 1
    assert " n/a " in console_line(m, 10)


def test_skips_are_counted_and_shown() -> None:
    meter = Meter(devices=1, peak=Peak(1.0, "test"))
    common = {"lr": 0.1, "tokens": 1, "step_time_s": 1.0, "data_s": 0.0, "memory_gib": 1.0}
    flops = StepFlops(0, 0, 0)
    m = meter.step(step=1, loss=math.nan, grad_norm=math.inf, flops=flops, skipped=True, **common)
    assert m.skipped == 1
    line = console_line(m, 10, skipped=True)
    assert "nan" in line and "inf" in line and line.endswith("SKIP")
    assert meter.step(step=2, loss=1.0, grad_norm=1.0, flops=flops, **common).skipped == 1


def test_json_keys_and_strict_json() -> None:
    text = json.dumps(metrics(loss=math.nan, waterfall={"compute": math.inf}).to_dict(), allow_nan=False)
    row = json.loads(text)
    assert set(row) == KEYS and row["loss"] is None and row["waterfall"] == {"compute": None}
    assert row["straggler"] is None and row["moe"] is None


EXTREMES = (
    0.0,
    5e-324,
    1.2345e-7,
    0.012345,
    0.99995,
    9.9999996,
    999.5,
    123456.789,
    9.99e15,
    1.8e308,
    math.inf,
    math.nan,
)


def test_line_never_exceeds_120_columns() -> None:
    draw = random.Random(0)
    straggler = {"rank": 123456, "score": 0.01, "host": "a-very-long-node-name", "reason": "compute"}
    fields = ("loss", "grad_norm", "lr", "tokens_per_s", "tflops_per_device", "memory_gib", "data_s", "mfu")
    for trial in range(3000):
        total = 10 ** draw.randrange(16)
        step = draw.randrange(total + 1)
        values = {field: draw.choice(EXTREMES) for field in fields}
        m = metrics(step=step, step_time_s=max(draw.choice(EXTREMES[1:]), 1e-9), straggler=straggler, **values)
        line = console_line(m, total, eta_s=draw.choice((None, *EXTREMES)), skipped=bool(trial % 2))
        assert len(line) == len(console_header(total)) + (5 if trial % 2 else 0) <= 120, line


def test_line_has_fixed_columns() -> None:
    header = console_header(1000)
    assert " ".join(header.split()) == "step/total loss gnorm lr tok/s MFU TFLOP/s mem data% step_s slowest eta"
    line = console_line(metrics(), 1000, eta_s=3725)
    assert len(line) == len(header)
    assert " ".join(line.split()) == "7/1000 2.5000 1.250 3.00e-04 400 20.00% 20.000 1.50G 5.0 2.000 - 1h02m"
    slow = metrics(straggler={"rank": 12, "host": "node3", "score": 1 / 1.08, "reason": "compute"})
    assert " r12@node3 +8% " in console_line(slow, 1000)


def test_color_only_on_request() -> None:
    plain, colored = console_line(metrics(), 1000), console_line(metrics(), 1000, color=True)
    assert "\x1b" not in plain and "\x1b[" in colored
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == plain


class _Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_color_is_respected() -> None:
    assert use_color(_Tty(), {}) and not use_color(io.StringIO(), {})
    assert not use_color(_Tty(), {"NO_COLOR": "1"}) and use_color(_Tty(), {"NO_COLOR": ""})


def test_eta_leaves_out_the_first_three_steps() -> None:
    pace = Pace(10)
    times = [100.0, 100.0, 100.0, 2.0, 4.0]
    etas = [pace.eta_s(metrics(step=i + 1, step_time_s=t)) for i, t in enumerate(times)]
    assert etas == [None, None, None, 12.0, 15.0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (356400, "4d03h"), (1e7, "115d"), (1e12, ">9999d")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text and len(text) <= 6


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
    peak = lookup(name, dtype, tf32=tf32)
    assert peak.tflops == expected
    assert ("unknown" in peak.source) == (expected is None)


def test_peak_override_and_cpu_measurement() -> None:
    cpu = torch.device("cpu")
    assert peak_tflops(HardwareConfig(peak_tflops=12.5), cpu, torch.float32) == Peak(12.5, "hardware.peak_tflops")
    calls: list[int] = []
    rate = measure_cpu_peak(torch.float32, lambda: calls.append(1), seconds=0.05)
    assert 1e-4 < rate < 1e3 and calls
    assert 0 < peak_memory_gib(cpu) < 1e4


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
