"""What a step reports: one `StepMetrics`, its `metrics.jsonl` object and its console line."""

from __future__ import annotations

import math
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, Any

import torch

from .peak import Peak


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of one optimizer step over all devices, forward and backward.

    causal counts unmasked attention pairs only, full the whole square, hardware the causal ones and recomputation,
    sparse what S-MFU counts in models with experts (`moe_metrics.sparse_flops`).
    """

    causal: float
    full: float
    hardware: float
    sparse: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One step. Times in seconds, memory in GiB, mfu and hfu fractions of 1; None: not known (not zero)."""

    step: int
    """Optimizer steps done, this one included."""
    loss: float
    """Mean over all valid tokens of the global batch, in nats."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    tokens: int
    """Since the start of training."""
    step_time_s: float
    tokens_per_s: float
    tokens_per_s_per_device: float
    mfu: float | None
    """Model FLOPs with unmasked attention over peak."""
    mfu_full: float | None
    """Model FLOPs with the full attention square over peak."""
    hfu: float | None
    """FLOPs with unmasked attention and recomputation over peak."""
    tflops_per_device: float
    """Model TFLOP/s with unmasked attention."""
    peak_tflops: float | None
    memory_gib: float
    """Peak of one device."""
    data_s: float
    """Waiting for the loader, within step_time_s."""
    skipped: int
    """Steps skipped for a NaN or infinite gradient, since the start of training."""
    waterfall: Mapping[str, float] | None = None
    straggler: Mapping[str, Any] | None = None
    moe: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The `metrics.jsonl` object: NaN and infinity, which JSON lacks, become None."""
        # fmt: off
        keys = ("step", "loss", "grad_norm", "lr", "tokens", "step_time_s", "tokens_per_s", "tokens_per_s_per_device",
                "mfu", "mfu_full", "hfu", "tflops_per_device", "peak_tflops", "memory_gib", "data_s", "waterfall",
                "straggler", "moe", "skipped")
        # fmt: on
        return {key: finite(getattr(self, key)) for key in keys}


def finite(value: Any) -> Any:
    """The value with every NaN and infinity in it replaced by None: what JSON can hold."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Builds each step's metrics; carries the counts that run since the start of training (tokens, skipped)."""

    def __init__(self, *, devices: int, peak: Peak, tokens: int = 0, skipped: int = 0) -> None:
        """devices: ranks of the job; peak: of one of them; tokens, skipped: where a resumed run stands."""
        self.devices, self.peak = devices, peak
        self.tokens, self.skipped = tokens, skipped

    def step(
        self,
        *,
        step: int,
        loss: float,
        grad_norm: float,
        lr: float,
        tokens: int,
        step_time_s: float,
        data_s: float,
        memory_gib: float,
        flops: StepFlops,
        skipped: bool = False,
        moe: Mapping[str, Any] | None = None,
    ) -> StepMetrics:
        """Counts one step.

        Args:
            tokens: of this step's global batch.
            flops: of this step, which with packed documents differ per step.
            moe: what its routers did (`moe_metrics.summarize`); `s_mfu` is added to it.
        """
        self.tokens += tokens
        self.skipped += skipped
        step_time_s = max(step_time_s, 1e-9)
        rate = 1.0 / (step_time_s * self.devices)
        per_peak = rate / (self.peak.tflops * 1e12) if self.peak.tflops else None
        return StepMetrics(
            step=step,
            loss=loss,
            grad_norm=grad_norm,
            lr=lr,
            tokens=self.tokens,
            step_time_s=step_time_s,
            tokens_per_s=tokens / step_time_s,
            tokens_per_s_per_device=tokens * rate,
            mfu=None if per_peak is None else flops.causal * per_peak,
            mfu_full=None if per_peak is None else flops.full * per_peak,
            hfu=None if per_peak is None else flops.hardware * per_peak,
            tflops_per_device=flops.causal * rate / 1e12,
            peak_tflops=self.peak.tflops,
            memory_gib=memory_gib,
            data_s=data_s,
            skipped=self.skipped,
            moe=None if moe is None else {**moe, "s_mfu": _product(flops.sparse, per_peak)},
        )


def _product(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a * b


class Pace:
    """Time to the end, from the mean step time without the first steps, which compile and warm up."""

    WARMUP_STEPS = 3

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._seen, self._seconds = 0, 0.0

    def eta_s(self, m: StepMetrics) -> float | None:
        """Seconds left after this step; None during the first three of this process. Called once a step."""
        self._seen += 1
        counted = self._seen - self.WARMUP_STEPS
        if counted <= 0:
            return None
        self._seconds += m.step_time_s
        return max(0, self.total_steps - m.step) * self._seconds / counted


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: allocated on its GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


_COLUMNS = (
    ("loss", 8, "33"),
    ("gnorm", 8, "36"),
    ("lr", 8, "90"),
    ("tok/s", 6, "34"),
    ("MFU", 6, "32"),
    ("TFLOP/s", 7, "35"),
    ("mem", 6, "36"),
    ("data%", 5, "90"),
    ("step_s", 7, "34"),
    ("slowest", 15, "31"),
    ("eta", 6, "90"),
)
_LOAD = ("load", 4, "33")
_STEP_WIDTH = 17
_ALERT = "1;31"


def console_header(total_steps: int, moe: bool = False) -> str:
    """Column titles over `console_line`; moe: of a model with experts."""
    step_width = _step_width(total_steps)
    return " ".join(["step/total".rjust(step_width), *(name.rjust(width) for name, width, _ in _columns(moe))])


def _columns(moe: bool) -> tuple[tuple[str, int, str], ...]:
    return (*_COLUMNS[:-2], _LOAD, *_COLUMNS[-2:]) if moe else _COLUMNS


def console_line(
    m: StepMetrics,
    total_steps: int,
    *,
    eta_s: float | None = None,
    skipped: bool = False,
    color: bool = False,
) -> str:
    """One step in fixed columns, at most 120 of them without the colours.

    With experts there is one column more: the load of the busiest expert, over the mean one, of the worst layer.
    skipped: this very step was skipped; the line then ends in SKIP. eta_s: None is shown as '-'.
    """
    position = f"{m.step}/{total_steps}"
    if len(position) > _STEP_WIDTH:
        position = f"{_si(m.step)}/{_si(total_steps)}"
    bad_loss = not math.isfinite(m.loss)
    texts = (
        _number(m.loss, 8, 4),
        _number(m.grad_norm, 8, 3),
        f"{m.lr:.2e}" if len(f"{m.lr:.2e}") <= 8 else f"{m.lr:.1e}",
        _si(m.tokens_per_s),
        "n/a" if m.mfu is None else _number(100 * m.mfu, 5, 2) + "%",
        _number(m.tflops_per_device, 7, 3),
        _number(m.memory_gib, 5, 2) + "G",
        _number(100 * m.data_s / m.step_time_s, 5, 1),
        _number(m.step_time_s, 7, 3),
        *(() if m.moe is None else (_load(m.moe),)),
        _slowest(m.straggler),
        "-" if eta_s is None else duration(eta_s),
    )
    alerts = {"loss": bad_loss, "gnorm": not math.isfinite(m.grad_norm)}
    cells = [position.rjust(_step_width(total_steps))]
    for (name, width, code), text in zip(_columns(m.moe is not None), texts, strict=True):
        code = _ALERT if alerts.get(name) else code
        cells.append(_paint(text.rjust(width), code, color and text != "-"))
    if skipped:
        cells.append(_paint("SKIP", _ALERT, color))
    return " ".join(cells)


def use_color(stream: IO[str], environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to colour: a terminal, and NO_COLOR (no-color.org) is unset or empty."""
    return stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """At most 6 characters: 42s, 3m07s, 2h05m, 4d03h, 120d, >9999d."""
    if not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    days = whole // 86400
    if days < 100:
        return f"{days}d{whole % 86400 // 3600:02d}h"
    return f"{days}d" if days < 10000 else ">9999d"


def _step_width(total_steps: int) -> int:
    return max(len("step/total"), min(_STEP_WIDTH, 2 * len(str(total_steps)) + 1))


def _number(value: float, width: int, digits: int) -> str:
    """Fixed point with up to `digits` decimals, else scientific, that fits into `width`."""
    if not math.isfinite(value):
        return str(float(value))
    tiny = 0 < abs(value) < 10 ** (2 - width)
    # A laptop's 0.0043 TFLOP/s is not 0.004: small numbers get the decimals that the column has room for.
    if 0 < abs(value) < 10 ** (1 - digits):
        digits = max(digits, width - 2)
    for decimals in range(digits, -1, -1):
        text = f"{value:.{decimals}f}"
        if len(text) <= width and not tiny:
            return text
    for decimals in range(3, -1, -1):
        text = f"{value:.{decimals}e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
        if len(text) <= width:
            return text
    return "big"


def _si(value: float) -> str:
    """At most 6 characters with a decimal prefix: 950, 12.3K, 4.56M."""
    if not math.isfinite(value):
        return str(float(value))
    if 0 < abs(value) < 0.01:
        return f"{value:.0e}"
    steps = ((1, ""), (1e3, "K"), (1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))
    factor, suffix = next((pair for pair in steps if abs(value) < 999.5 * pair[0]), (0, ""))
    return f"{value / factor:.3g}{suffix}" if factor else "big"


def _load(moe: Mapping[str, Any]) -> str:
    value = moe["worst"]["load_max"][0]
    return "-" if value is None else _number(value, 4, 2)


def _slowest(straggler: Mapping[str, Any] | None) -> str:
    """`r12@node3 +8%`: score is the peers' median time over this rank's (1: as fast as they are)."""
    if not straggler or straggler.get("rank") is None:
        return "-"
    score = straggler.get("score")
    excess = f" {100 * (1 / score - 1):+.0f}%" if score else ""
    host = f"@{straggler['host']}" if straggler.get("host") else ""
    rank = f"r{straggler['rank']}"
    return rank + host[: 15 - len(rank) - len(excess)] + excess


def _paint(text: str, code: str, color: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if color else text
