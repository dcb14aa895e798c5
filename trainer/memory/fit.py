"""Whether a job fits into the memory of its devices, and which changes would make it fit, the cheapest first.

Parameters, gradients and optimizer states are known to the byte, the rest within a twentieth. So a job whose
certain part exceeds `hardware.memory_gib` is refused, by `pentad check` and by a run alike; one that exceeds it only
within the uncertainty is warned of and starts.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count

from ...configs import Config, Problem, resolve, validate
from ...configs.fields import value_of, with_value
from ...configs.reading.spread import dense_spread, is_flat
from .estimate import GIB, Memory, estimate
from .step_time import step_time

CERTAIN = 0.95
"""Share of the estimated activations and working memory that is needed for certain."""
_WANTED = 3
_FEWEST = 2
"""That are a choice."""
_TRIED = 40
"""Jobs that are looked at, at most, before the search goes straight down."""
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


@dataclass(frozen=True)
class Remedy:
    """Changes that together make a job fit, or as small as could be found.

    Args:
        changes: by key.
        cfg: the job with them.
        total: bytes that it needs then.
        slower: how much more time of all devices a token takes, as a share; negative: less.
    """

    changes: tuple[Change, ...]
    cfg: Config
    total: int
    slower: float

    def __str__(self) -> str:
        together, ranks = " ".join(map(str, self.changes)), self.cfg.parallel.ranks
        return f"{together} ({ranks} ranks): {self.total / GIB:.3g} GiB, device time {self.slower:+.0%}"


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
    found = remedies(cfg, available * GIB)
    if not found:
        return "nothing that could be changed lowers it; take devices with more memory or a smaller model"
    if found[0].total > available * GIB:
        return f"not even {found[0]}, is enough"
    return "set " + "; or ".join(map(str, found))


def remedies(cfg: Config, available: float, wanted: int = _WANTED) -> list[Remedy]:
    """The cheapest changes after each of which the job needs at most `available` bytes a rank, the cheapest first.

    Jobs are looked at in the order of the device time that a token takes in them, each one change away from one that
    was looked at before, until enough of them fit. Where that leads too far to find a choice of them, one way straight
    down is taken as well: the change that is enough, else the one that lowers the need most; its end is returned even
    if it does not fit, where nothing does.
    """
    now = step_time(cfg).device_seconds_per_token
    found: list[Remedy] = []
    order, seen = count(), {frozenset[str]()}
    queue = [(0.0, next(order), Remedy((), cfg, estimate(cfg).total, 0.0))]
    tried = 0
    while queue and tried < _TRIED and len(found) < wanted:
        _, _, parent = heapq.heappop(queue)
        if parent.changes and parent.total <= available:
            found.append(parent)
            continue
        for change, candidate in _candidates(parent.cfg):
            changes = _together(parent.changes, change)
            key = frozenset(map(str, changes))
            if key in seen:
                continue
            seen.add(key)
            tried += 1
            total = estimate(candidate).total
            if total < parent.total:
                slower = step_time(candidate).device_seconds_per_token / now - 1
                heapq.heappush(queue, (slower, next(order), Remedy(changes, candidate, total, slower)))
    # What was seen and not come to.
    found += [each for _, _, each in sorted(queue) if each.changes and each.total <= available]
    if len(found) >= _FEWEST:
        return _shortest(found)[:wanted]
    down = _straight_down(cfg, available, now)
    if not found:
        return down[:wanted]
    enough = [each for each in down if each.total <= available]
    return _shortest(sorted([*found, *enough], key=lambda each: each.slower))[:wanted]


def _together(changes: tuple[Change, ...], change: Change) -> tuple[Change, ...]:
    return (*(each for each in changes if each.key != change.key), change)


def _shortest(found: list[Remedy]) -> list[Remedy]:
    """Without those that change the same as another one that costs no more, or more than it."""
    kept: list[Remedy] = []
    for each in found:
        if not any(set(other.changes) <= set(each.changes) for other in kept):
            kept.append(each)
    return kept


def _straight_down(cfg: Config, available: float, now: float) -> list[Remedy]:
    """Always the change that lowers the need most, until some are enough."""
    best = Remedy((), cfg, estimate(cfg).total, 0.0)
    for _ in range(_ROUNDS):
        tried = [
            Remedy(_together(best.changes, change), candidate, estimate(candidate).total, 0.0)
            for change, candidate in _candidates(best.cfg)
        ]
        enough = [each for each in tried if each.total <= available]
        if enough:
            return sorted((_timed(each, now) for each in enough), key=lambda each: each.slower)
        lowest = min(tried, key=lambda each: each.total, default=best)
        if lowest.total >= best.total:
            break
        best = lowest
    return [_timed(best, now)] if best.changes else []


def _timed(remedy: Remedy, now: float) -> Remedy:
    return replace(remedy, slower=step_time(remedy.cfg).device_seconds_per_token / now - 1)


def _candidates(cfg: Config) -> Iterator[tuple[Change, Config]]:
    """Single changes that leave the job valid."""
    p, train = cfg.parallel, cfg.train
    changes: list[Change] = []
    if train.micro_batch > 1:
        changes.append(Change("train.micro_batch", train.micro_batch // 2))
    if is_flat(cfg) and dense_spread(cfg).copies > 1:
        key, most = ("sharding", "zero1") if p.data.states is None else ("states", "all")
        changes.append(Change(f"parallel.data.{key}", most))
    choices = {"none": ("selective", "full"), "selective": ("full",)}.get(cfg.memory.recompute, ())
    changes += [Change("memory.recompute", choice) for choice in choices]
    if cfg.memory.recompute == "selective" and isinstance(cfg.memory.token_share, float):
        changes.append(Change("memory.token_share", "none"))
    if cfg.memory.offload_activations == "none" and p.pp > 1:
        changes.append(Change("memory.offload_activations", "all"))
    if cfg.memory.offload_optimizer == "none":
        changes.append(Change("memory.offload_optimizer", "host"))
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
