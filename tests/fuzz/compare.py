"""What a run leaves behind, and how far two runs of the same training are apart."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pentad.configs.schema import ModelConfig
from pentad.trainer.checkpoint.checkpointer import read_full

TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5, "bf16": 3e-2}
"""Relative differences that need no explanation."""
DIGITS = 2e-5
"""Metrics of the experts are written with six digits."""
SLACK = 10.0
"""A difference may be so many times what one unit in the last place of the first parameters makes."""
_OF_A_LAYOUT = ("layers", "ep_load_max")
"""Metrics of the experts that are names, or of the ranks that share them."""


@dataclass(frozen=True)
class Trained:
    """What a run left.

    Args:
        curve: `loss of step 3` → value; grad norms and held-out losses alike.
        rows: `load_max of step 3` → values of the layers; `text after 'line' of step 3` → token ids.
        tensors: name → whole tensor of the last checkpoint.
    """

    curve: dict[str, float]
    rows: dict[str, list[float | None]]
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """How far one value is from what it should be, relatively."""

    what: str
    kind: str
    size: float
    allowed: float


def read_run(folder: Path, since: int, until: int) -> Trained:
    """A run's numbers of the steps after `since` up to `until`, and its checkpoint of that one."""
    curve, rows = dict[str, float](), dict[str, list[float | None]]()
    for row in _lines(folder / "metrics.jsonl"):
        step = row["step"]
        if not since < step <= until:
            continue
        for key in ("loss", "grad_norm"):
            curve[f"{key} of step {step}"] = _number(row[key])
        for key, values in (row["moe"] or {}).items():
            if isinstance(values, list) and key not in _OF_A_LAYOUT:
                rows[f"{key} of step {step}"] = values
    for row in _lines(folder / "events.jsonl"):
        if row["event"] == "evaluation" and since < row["step"] <= until:
            curve[f"held-out loss of step {row['step']}"] = _number(row["loss"])
        if row["event"] == "sample" and since < row["step"] <= until:
            rows[f"text after {row['prompt']!r} of step {row['step']}"] = row["tokens"]
    tensors, _ = read_full(folder / "checkpoints" / f"step-{until:08d}")
    return Trained(curve, rows, tensors)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def undetermined(model: ModelConfig) -> re.Pattern[str] | None:
    """Names of the parameters whose gradient is mathematically zero, so that rounding alone moves them.

    A bias that all keys share moves all scores of a query alike, which a softmax does not see: unless keys are turned,
    normalised, or compete with a sink.
    """
    plain = model.position == "learned" and not (model.qk_norm or model.sinks or model.mla.kv_rank)
    return re.compile(r".*\.attention\.k\.bias") if plain and model.qkv_bias else None


def differences(mine: Trained, expected: Trained, dtype: str, free: re.Pattern[str] | None) -> list[Difference]:
    """How far two runs are apart, in all that is compared: in bf16 only the losses.

    Args:
        free: names of tensors that are not compared.
    """
    allowed = TOLERANCE[dtype]
    found = [
        Difference(what, "curve", size, allowed)
        for what, size in _compared(mine.curve, expected.curve, lambda a, b: abs(a - b) / max(abs(b), 1e-30)).items()
        if dtype != "bf16" or "norm" not in what
    ]
    if dtype != "bf16":
        metrics = _compared(mine.rows, expected.rows, _worst)
        found += [Difference(what, "rows", size, DIGITS) for what, size in metrics.items()]
        sizes = _compared(mine.tensors, expected.tensors, _distance)
        found += [
            Difference(what, "tensors", size, allowed)
            for what, size in sizes.items()
            if free is None or not free.fullmatch(what)
        ]
    return found


def beyond(found: list[Difference]) -> list[Difference]:
    """Those beyond the tolerance, largest first."""
    return sorted((d for d in found if not d.size <= d.allowed), key=lambda d: -_rank(d.size))


def _rank(size: float) -> float:
    return math.inf if math.isnan(size) else size


def _compared(mine: Mapping[str, Any], expected: Mapping[str, Any], distance: Callable[[Any, Any], float]) -> dict:
    lacking = {key: math.inf for key in mine.keys() ^ expected.keys()}
    return lacking | {key: distance(mine[key], expected[key]) for key in mine.keys() & expected.keys()}


def _worst(mine: list[float | None], expected: list[float | None]) -> float:
    if [v is None for v in mine] != [v is None for v in expected]:
        return math.inf
    pairs = [(a, b) for a, b in zip(mine, expected, strict=True) if a is not None and b is not None]
    return max((abs(a - b) / max(abs(b), 1.0) for a, b in pairs), default=0.0)


def _distance(mine: torch.Tensor, expected: torch.Tensor) -> float:
    if mine.shape != expected.shape or mine.dtype != expected.dtype:
        return math.inf
    far = torch.linalg.vector_norm(mine.double() - expected.double()).item()
    size = torch.linalg.vector_norm(expected.double()).item()
    return 0.0 if far == 0 else far / max(size, 1e-30)


def unexplained(found: list[Difference], nudged: list[list[Difference]]) -> list[Difference]:
    """The differences beyond the tolerance that are larger than rounding makes them, largest first.

    Args:
        found: between the layout and one process.
        nudged: between one process and itself from first parameters that differ in the last place.
    """
    size: dict[str, float] = {}
    for d in (d for run in nudged for d in run):
        size[_source(d)] = max(size.get(_source(d), 0.0), _rank(d.size))
    return [d for d in beyond(found) if not d.size <= SLACK * size.get(_source(d), 0.0)]


def _source(d: Difference) -> str:
    """What explains a difference: a step's loss may by chance not move where its neighbours do, so the curve is one."""
    return d.kind if d.kind == "curve" else d.what
