"""Whether a job fits into the memory of its devices, and which changes would make it fit.

Parameters, gradients and optimizer states are known to the byte, what backward keeps within a tenth. So a job whose
certain part exceeds `hardware.memory_gib` is refused, by `pentad check` and by a run alike; one that exceeds it only
within the uncertainty is warned of and starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ...configs import Config, Problem, resolve, validate
from ...configs.fields import value_of, with_value
from .estimate import GIB, Memory, estimate

CERTAIN = 0.9
"""Share of the estimated activations and working memory that is needed for certain."""
_ROUNDS = 16
_WIDEST_TP = 8
"""Devices of one node; tensor parallelism beyond it is no advice."""
_KEY = "hardware.memory_gib"


@dataclass(frozen=True)
class Change:
    """One key and its better value."""

    key: str
    value: int | str

    def __str__(self) -> str:
        return f"{self.key}={self.value}"


def memory_findings(cfg: Config) -> tuple[list[Problem], list[Problem]]:
    """What is wrong, and what may be, with the memory of a resolved and valid job; nothing where none is given."""
    available = cfg.hardware.memory_gib
    if available is None:
        return [], []
    memory = estimate(cfg)
    if memory.total <= available * GIB:
        return [], []
    certain = _certain(memory)
    about = f"about {memory.total / GIB:.3g} GiB per rank are needed"
    if certain > available * GIB:
        return [Problem(_KEY, f"{available:g}, but {about}, {certain / GIB:.3g} for certain; {_advice(cfg)}")], []
    return [], [Problem(_KEY, f"{available:g}, and {about}, a few per cent more or less; {_advice(cfg)}")]


def _certain(memory: Memory) -> float:
    uncertain = memory.activations + memory.working
    return memory.total - (1 - CERTAIN) * uncertain


def _advice(cfg: Config) -> str:
    """The changes to make, each tried: the job stays valid, and its estimate falls."""
    available = cfg.hardware.memory_gib or 0.0
    changes, changed = fitting_changes(cfg, available * GIB)
    if not changes:
        return "nothing that could be changed lowers it; take devices with more memory or a smaller model"
    needed, p = estimate(changed).total / GIB, changed.parallel
    ranks = p.ranks
    latest = {change.key: change for change in changes}
    together = f"{' '.join(map(str, latest.values()))} ({ranks} ranks): {needed:.3g} GiB"
    return f"set {together}" if needed <= available else f"not even {together}, is enough"


def fitting_changes(cfg: Config, available: float) -> tuple[list[Change], Config]:
    """Changes after which the job needs at most `available` bytes per rank, or as little as could be found.

    Step by step the cheapest change that is enough, else the one that lowers the need most.
    """
    changes: list[Change] = []
    needed = estimate(cfg).total
    for _ in range(_ROUNDS):
        tried = [(change, candidate, estimate(candidate).total) for change, candidate in _candidates(cfg)]
        lower = [t for t in tried if t[2] < needed]
        if needed <= available or not lower:
            break
        change, cfg, needed = next((t for t in lower if t[2] <= available), min(lower, key=lambda t: t[2]))
        changes.append(change)
    return changes, cfg


def _candidates(cfg: Config) -> Iterator[tuple[Change, Config]]:
    """Single changes that leave the job valid, the cheapest in speed first."""
    p, train = cfg.parallel, cfg.train
    changes: list[Change] = []
    if train.micro_batch > 1:
        changes.append(Change("train.micro_batch", train.micro_batch // 2))
    if p.data.sharding == "ddp":
        changes.append(Change("parallel.data.sharding", "zero1"))
    if cfg.memory.recompute == "none":
        changes.append(Change("memory.recompute", "full"))
    if p.data.sharding == "zero1":
        changes.append(Change("parallel.data.sharding", "fsdp"))
    degrees = ["ep"] * (cfg.model.moe.experts > 0) + ["tp"] * (p.tp < _WIDEST_TP) + ["pp", "dp", "cp"]
    changes += [Change(f"parallel.{axis}", 2 * (value_of(cfg, f"parallel.{axis}") or 1)) for axis in degrees]
    for change in changes:
        candidate = with_value(cfg, change.key, change.value)
        if change.key == "parallel.pp":
            candidate = with_value(candidate, "parallel.pipeline.group", None)
        candidate = resolve(candidate)
        stages = candidate.parallel.pp * candidate.parallel.pipeline.chunks
        if stages <= max(candidate.model.layers, p.pp) and not validate(candidate):
            yield change, candidate
