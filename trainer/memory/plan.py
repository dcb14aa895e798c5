"""memory.recompute=auto: of each layer what costs least time, so that every rank fits. No torch.

A rank's layers of one kind stand together, whatever its stages. Each has a handful of choices (`LayerTimes.handful`);
those that keep less come first, for the first layers are kept longest. Ranks fit or not by themselves, and a step
takes no longer if one of them takes less time: so each rank's cheapest assignment is looked for alone, exactly, with
the memory model that `pentad check` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import comb, inf

from ...configs import Config
from ...configs.tables.layer_parts import LAYER_PARTS
from ...configs.tables.schedules import SCHEDULES
from ...models.costs.activations import Choice, layer_rows
from ...models.costs.times import LayerTimes, Rates
from ...parallel.pipeline.communication import is_lowered
from ...parallel.pipeline.lower import lower
from ...parallel.pipeline.program import Program
from ..pipeline.programs import Pipeline, compute_program
from .estimate import GIB, Memory, enough, per_rank
from .stages import bench_of, ways_of

MARGIN = 0.95
"""Share of the device's memory that is planned with: the memory model is within a twentieth."""
_ALL = 600
"""Assignments of one group of layers up to which all are looked at; of more layers those with two choices at most."""


@dataclass(frozen=True)
class Assignment:
    """What like layers of a rank make again.

    Args:
        seconds: that it costs for a microbatch.
        ranks: which of the handful each layer has, a larger number keeping less.
        choices: of each layer.
    """

    seconds: float
    levels: tuple[int, ...]
    choices: tuple[Choice, ...]

    def needs_more(self, other: Assignment) -> bool:
        """Whether each layer keeps at least as much as in another assignment; a layer that runs again as a whole is
        there as a whole for a moment, which others need not be."""
        pairs = zip(self.levels, other.levels, other.choices, strict=True)
        return all(mine == theirs or (mine < theirs and choice != "full") for mine, theirs, choice in pairs)


@dataclass(frozen=True)
class Group:
    """Like layers of a rank.

    Args:
        layers: their indices.
        assignments: in the order of time.
    """

    layers: tuple[int, ...]
    assignments: tuple[Assignment, ...]

    @staticmethod
    def of(layers: Sequence[int], times: LayerTimes) -> Group:
        """All assignments that are looked at."""
        handful = times.handful(layers[0], list(LAYER_PARTS))
        seconds = [times.again(layers[0], choice) for choice in handful]
        found = [
            Assignment(sum(seconds[level] for level in levels), levels, tuple(handful[level] for level in levels))
            for levels in _levels(len(layers), len(handful))
        ]
        return Group(tuple(layers), tuple(sorted(found, key=lambda each: each.seconds)))


def _levels(layers: int, choices: int) -> Iterator[tuple[int, ...]]:
    """Which of its choices each layer has, those that keep least first."""
    if comb(layers + choices - 1, layers) <= _ALL:
        yield from combinations_with_replacement(range(choices - 1, -1, -1), layers)
        return
    for more in range(choices):
        yield (more,) * layers
        for less in range(more + 1, choices):
            yield from ((less,) * count + (more,) * (layers - count) for count in range(1, layers))


def groups_of(cfg: Config, pipeline: Pipeline, rank: int) -> list[Group]:
    """The layers of a rank of the pipeline axis, by kind."""
    m = cfg.model
    work = bench_of(cfg, ways_of(cfg)).work
    rates = Rates.of(cfg.hardware, cfg.train.dtype)
    times = LayerTimes(model=m, work=work, length=cfg.train.seq_len, rates=rates)
    stages = pipeline.stages_of(rank)
    layers = [layer for stage in stages for layer in pipeline.split.layers[stage]]
    if len(pipeline.split.layers) - 1 in stages:
        layers += range(m.layers, m.layers + m.mtp)
    kinds: dict[object, list[int]] = {}
    for layer in layers:
        kind = tuple(layer_rows(m, layer, work)), times.again(layer, "full")
        kinds.setdefault(kind, []).append(layer)
    return [Group.of(mine, times) for mine in kinds.values()]


def cheapest(groups: Sequence[Group], fits: Callable[[Mapping[int, Choice]], bool]) -> dict[int, Choice] | None:
    """The assignment of all groups that takes least time of those that fit; none: no one fits.

    Args:
        groups: the layers.
        fits: whether layers with these choices do.
    """
    search = _Search(sorted(groups, key=lambda group: len(group.assignments)), fits)
    search.go(0, 0.0, {})
    return search.best


class _Search:
    """All but the largest group one after the other; of that one the first in time that fits."""

    def __init__(self, groups: Sequence[Group], fits: Callable[[Mapping[int, Choice]], bool]) -> None:
        self._groups, self._fits = groups, fits
        self.best: dict[int, Choice] | None = None
        self._seconds = inf

    def go(self, at: int, seconds: float, chosen: dict[int, Choice]) -> None:
        if at == len(self._groups):
            if seconds < self._seconds and self._fits(chosen):
                self.best, self._seconds = chosen, seconds
            return
        group = self._groups[at]
        if at == len(self._groups) - 1:
            self._last(group, seconds, chosen)
            return
        for each in group.assignments:
            if seconds + each.seconds < self._seconds:
                self.go(at + 1, seconds + each.seconds, chosen | dict(zip(group.layers, each.choices, strict=True)))

    def _last(self, group: Group, seconds: float, chosen: dict[int, Choice]) -> None:
        """Halving finds some that fits; of those before it only a few can, as what keeps more of every layer than one
        that is too large is too large."""
        some = [each for each in group.assignments if seconds + each.seconds < self._seconds]
        known: dict[int, bool] = {}

        def fits(index: int) -> bool:
            if index not in known:
                known[index] = self._fits(chosen | dict(zip(group.layers, some[index].choices, strict=True)))
            return known[index]

        low, high = -1, len(some)
        while low + 1 < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        large = [some[index] for index, well in known.items() if not well]
        for index, each in enumerate(some):
            if not known.get(index) and any(each.needs_more(other) for other in large):
                continue
            if fits(index):
                self._seconds = seconds + each.seconds
                self.best = chosen | dict(zip(group.layers, each.choices, strict=True))
                return
            large.append(each)


def planned(cfg: Config, choices: Mapping[int, Choice]) -> Config:
    """The job with these choices of its layers."""
    plan = tuple(
        (layer, "full" if choice == "full" else tuple(part for part in LAYER_PARTS if part in choice))
        for layer, choice in sorted(choices.items())
        if choice != "none"
    )
    return replace(cfg, memory=replace(cfg.memory, plan=plan))


def decided(cfg: Config) -> Config:
    """The job with what its layers make again, where it leaves that to us; where nothing fits, with as little memory as
    can be (which `memory_findings` then reports)."""
    if cfg.memory.recompute != "auto" or cfg.memory.plan is not None:
        return cfg
    limit = MARGIN * GIB * (cfg.hardware.memory_gib or 0.0)
    chosen: dict[int, Choice] = {}
    pipeline = Pipeline.of(planned(cfg, {}))
    program = _program(cfg, pipeline)
    for rank in range(cfg.parallel.pp):

        def need(choices: Mapping[int, Choice], rank: int = rank, others: Mapping[int, Choice] = chosen) -> Memory:
            return per_rank(planned(cfg, {**others, **choices}), program=program, ranks=(rank,))[0]

        def fits(choices: Mapping[int, Choice], need: Callable[[Mapping[int, Choice]], Memory] = need) -> bool:
            return need(choices).total <= limit

        groups = groups_of(cfg, pipeline, rank)
        least = _least(groups)
        hopeless = need(least).fixed > limit
        chosen = chosen | ((None if hopeless else cheapest(groups, fits)) or least)
    return planned(cfg, chosen)


def _least(groups: Sequence[Group]) -> dict[int, Choice]:
    """What keeps least."""
    least = [(group, max(group.assignments, key=lambda each: sum(each.levels))) for group in groups]
    return {layer: choice for group, each in least for layer, choice in zip(group.layers, each.choices, strict=True)}


def _program(cfg: Config, pipeline: Pipeline) -> Program | None:
    """The program by which memory is counted, whatever is chosen; none: what is offloaded depends on it."""
    row = SCHEDULES.get(cfg.parallel.pipeline_in_use.schedule or "")
    if cfg.memory.offload_activations != "none" or (row is not None and row.offloads):
        return None
    microbatches = max(1, cfg.train.global_batch // (cfg.train.micro_batch * cfg.parallel.dp))
    program = compute_program(cfg, pipeline, enough(cfg, microbatches))
    return program if is_lowered(program) else lower(program, times=pipeline.times)
