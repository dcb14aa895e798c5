"""memory.recompute=auto and memory.token_share=auto: of each layer what costs least time, so that every rank fits.
No torch.

A rank's layers of one kind stand together, whatever its stages. Each has a handful of choices (`LayerTimes.handful`);
those that keep less come first, for the first layers are kept longest. Ranks fit or not by themselves, and a step
takes no longer if one of them takes less time: so each rank's cheapest assignment is looked for alone, exactly, with
the memory model that `pentad check` shows.

Of the parts that a layer makes again, the first tokens may be kept. For their share a few values are looked at, the
same for all layers of a rank; where activations are offloaded, a layer has no larger one than that with which its
copies hide behind its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations_with_replacement
from math import comb, inf
from typing import Literal

from ...configs import Config, UserError
from ...configs.tables.layer_parts import LAYER_PARTS
from ...configs.tables.schedules import SCHEDULES
from ...models.costs.activations import layer_rows
from ...models.costs.kept import Choice, SomeTokens, some_tokens
from ...models.costs.times import LayerTimes, Rates
from ...parallel.pipeline.communication import is_lowered
from ...parallel.pipeline.lower import lower
from ...parallel.pipeline.program import Program
from ..pipeline.programs import Pipeline, compute_program, offloads, token_block
from .copies import hidden_tokens
from .estimate import GIB, Memory, enough, per_rank
from .stages import bench_of, ways_of

MARGIN = 0.95
"""Share of the device's memory that is planned with: the memory model is within a twentieth."""
_SHARES = 8
"""Parts of the tokens, so many of which are kept, that are looked at."""
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
        there as a whole for a moment, and one that does for some tokens has these twice, which others need not be."""
        pairs = zip(self.levels, other.levels, other.choices, strict=True)
        return all(
            mine == theirs or (mine < theirs and choice != "full" and not isinstance(choice, SomeTokens))
            for mine, theirs, choice in pairs
        )


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
    def of(layers: Sequence[int], times: LayerTimes, handful: Sequence[Choice]) -> Group:
        """All assignments of these choices that are looked at; those that keep most come first."""
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


def groups_of(cfg: Config, pipeline: Pipeline, rank: int, share: float = 0.0) -> list[Group]:
    """The layers of a rank of the pipeline axis, by kind.

    Args:
        cfg: the job.
        pipeline: its pipeline.
        rank: on the pipeline axis.
        share: of tokens, of which parts are kept after all.
    """
    m = cfg.model
    work = bench_of(cfg, ways_of(cfg)).work
    rates = Rates.of(cfg.hardware, cfg.train.dtype)
    times = LayerTimes(model=m, work=work, length=cfg.train.seq_len, rates=rates)
    given, choice_of = _given_parts(cfg, pipeline), _Cut(cfg, share, rates)
    kinds: dict[object, list[int]] = {}
    for layer in _layers_of(cfg, pipeline, rank):
        kind = (
            tuple(layer_rows(m, layer, work)),
            times.again(layer, "full"),
            None if given is None else given.get(layer),
        )
        kinds.setdefault(kind, []).append(layer)
    groups = []
    for mine in kinds.values():
        if given is None:
            handful = times.handful(mine[0], list(LAYER_PARTS), partial(choice_of, mine[0]))
        else:
            handful = (choice_of(mine[0], given[mine[0]]) if mine[0] in given else "none",)
        groups.append(Group.of(mine, times, handful))
    return groups


def _layers_of(cfg: Config, pipeline: Pipeline, rank: int) -> list[int]:
    m, stages = cfg.model, pipeline.stages_of(rank)
    layers = [layer for stage in stages for layer in pipeline.split.layers[stage]]
    return [*layers, *range(m.layers, m.layers + m.mtp)] if len(pipeline.split.layers) - 1 in stages else layers


def _given_parts(cfg: Config, pipeline: Pipeline) -> dict[int, frozenset[str]] | None:
    """The parts that layers make again, where the job says so; none: it does not."""
    if cfg.memory.recompute == "auto":
        return None
    memory = replace(cfg.memory, token_share="none", plan=None)
    found = Pipeline.of(replace(cfg, memory=memory)).remade
    return {layer: frozenset(memory.recompute_parts) for layer in found}


@dataclass(frozen=True)
class _Cut:
    """Parts of a layer as a choice: those of which the first tokens are kept.

    Args:
        cfg: the job.
        share: of the tokens, at most.
        rates: of a device.
    """

    cfg: Config
    share: float
    rates: Rates

    def __call__(self, layer: int, parts: frozenset[str]) -> Choice:
        share = self.share
        if share and self.cfg.memory.token_share == "auto" and offloads(self.cfg):
            share = min(share, hidden_tokens(self.cfg, layer, parts, self.rates))
        return some_tokens(parts, token_block(self.cfg), share)


def shares_of(cfg: Config) -> tuple[float, ...]:
    """The shares of tokens that are looked at, the largest first."""
    share = cfg.memory.token_share
    if share == "auto":
        return tuple(part / _SHARES for part in range(_SHARES, -1, -1))
    return (share if isinstance(share, float) else 0.0,)


def cheapest(ways: Sequence[Sequence[Group]], fits: Callable[[Mapping[int, Choice]], bool]) -> dict[int, Choice] | None:
    """The assignment of all groups that takes least time of those that fit; none: no one fits.

    Args:
        ways: the layers in groups, under each share of tokens.
        fits: whether layers with these choices do.
    """
    best, seconds = None, inf
    for groups in ways:
        search = _Search(sorted(groups, key=lambda group: len(group.assignments)), fits, seconds)
        search.go(0, 0.0, {})
        if search.best is not None:
            best, seconds = search.best, search.seconds
    return best


class _Search:
    """All but the largest group one after the other; of that one the first in time that fits."""

    def __init__(self, groups: Sequence[Group], fits: Callable[[Mapping[int, Choice]], bool], seconds: float) -> None:
        self._groups, self._fits = groups, fits
        self.best: dict[int, Choice] | None = None
        self.seconds = seconds
        """That the best one takes, and that is known to be possible before."""

    def go(self, at: int, seconds: float, chosen: dict[int, Choice]) -> None:
        if at == len(self._groups):
            if seconds < self.seconds and self._fits(chosen):
                self.best, self.seconds = chosen, seconds
            return
        group = self._groups[at]
        if at == len(self._groups) - 1:
            self._last(group, seconds, chosen)
            return
        for each in group.assignments:
            if seconds + each.seconds < self.seconds:
                self.go(at + 1, seconds + each.seconds, chosen | dict(zip(group.layers, each.choices, strict=True)))

    def _last(self, group: Group, seconds: float, chosen: dict[int, Choice]) -> None:
        """Halving finds some that fits; of those before it only a few can, as what keeps more of every layer than one
        that is too large is too large."""
        some = [each for each in group.assignments if seconds + each.seconds < self.seconds]
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
                self.seconds = seconds + each.seconds
                self.best = chosen | dict(zip(group.layers, each.choices, strict=True))
                return
            large.append(each)


def planned(cfg: Config, choices: Mapping[int, Choice]) -> Config:
    """The job with these choices of its layers."""
    plan = tuple((layer, *_written(choice)) for layer, choice in sorted(choices.items()) if choice != "none")
    return replace(cfg, memory=replace(cfg.memory, plan=plan))


def _written(choice: Choice) -> tuple[Literal["full"] | tuple[str, ...], float]:
    if choice == "full":
        return "full", 0.0
    if isinstance(choice, SomeTokens):
        return _ordered(choice.parts), choice.blocks.kept / choice.blocks.size
    return _ordered(choice), 0.0


def _ordered(parts: Collection[str]) -> tuple[str, ...]:
    return tuple(part for part in LAYER_PARTS if part in parts)


def decided(cfg: Config) -> Config:
    """The job with what its layers make again, where it leaves that to us; where nothing fits, with as little memory as
    can be (which `memory_findings` then reports)."""
    if not cfg.memory.recompute_is_planned or cfg.memory.plan is not None:
        return cfg
    pipeline = Pipeline.of(planned(cfg, {}))
    program, ranks = _program(cfg, pipeline), range(cfg.parallel.pp)
    ways = [[groups_of(cfg, pipeline, rank, share) for share in shares_of(cfg)] for rank in ranks]
    chosen: dict[int, Choice] = {}
    if cfg.memory.token_share == "auto":
        # What others keep can be too much for the host too, whatever this rank keeps.
        chosen = {layer: choice for groups in ways for layer, choice in _least(groups[-1]).items()}
    for rank in ranks:
        chosen |= _of_rank(cfg, rank, ways[rank], chosen, program)
    return planned(cfg, chosen)


def _of_rank(
    cfg: Config, rank: int, ways: Sequence[Sequence[Group]], others: Mapping[int, Choice], program: Program | None
) -> dict[int, Choice]:
    """What the layers of one rank make again, beside those of others."""
    limit = inf if cfg.hardware.memory_gib is None else MARGIN * GIB * cfg.hardware.memory_gib

    def need(choices: Mapping[int, Choice]) -> Memory | None:
        try:
            return per_rank(planned(cfg, {**others, **choices}), program=program, ranks=(rank,))[0]
        except UserError:  # what is offloaded is too much for the host
            return None

    def fits(choices: Mapping[int, Choice]) -> bool:
        found = need(choices)
        return found is not None and found.total <= limit

    least = _least(ways[-1])
    at_least = need(least)
    if at_least is None or at_least.fixed > limit:
        return least
    return cheapest(ways, fits) or least


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
