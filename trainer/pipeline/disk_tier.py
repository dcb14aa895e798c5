"""Which activations stay on the host, and which go on to a disk: what the host may hold. No torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from ...configs.errors import Problem, UserError
from ...configs.schema import Config
from ...parallel.pipeline.memory import ActivationBytes, slot_bytes
from ...parallel.pipeline.offload import Pass, offload, windows
from ...parallel.pipeline.program import Program
from ...parallel.pipeline.times import Times

GIB = 2**30
_NOTHING = (0.0,)


class HostRoom:
    """What the host may hold of the activations of a job (`memory.host_gib`).

    Args:
        cfg: the job.
        program: of a step, without offloads.
        kept: bytes of each stage.
    """

    def __init__(self, cfg: Config, program: Program, kept: Sequence[float]) -> None:
        self._cfg, self._program = cfg, program
        self._sizes = ActivationBytes(activation=tuple(kept))
        self._room = None if cfg.memory.host_gib is None else cfg.memory.host_gib * GIB

    def held(self, chosen: Collection[Pass], times: Times) -> frozenset[Pass]:
        """Those of some activations that the host has room for, on each rank the longest-lived; with a disk all.

        Args:
            chosen: what may be offloaded.
            times: of the passes and copies.
        """
        if self._room is None or self._cfg.memory.offload_disk is not None:
            return frozenset(chosen)
        lived = self._lived(chosen, times)

        def without(counts: Sequence[int]) -> frozenset[Pass]:
            return _of(lived, [len(mine) - count for mine, count in zip(lived, counts, strict=True)])

        return without(_least(lived, lambda counts: self._fits(self._slabs(without(counts), (), times))))

    def stored(self, chosen: Collection[Pass], times: Times) -> tuple[frozenset[Pass], Times]:
        """Those of the offloaded activations that go on to the disk, and the times that places are chosen for.

        On each rank as few as keep its slabs within the limit, those that live longest first. Where copies are too slow
        for that, they are placed as if they took no time, and the step waits for them: whether a job fits must not
        depend on what is measured when it starts.

        Args:
            chosen: what is offloaded.
            times: of the passes and copies.

        Raises:
            UserError: the host may not even hold what is on its way to the disk, or there is none.
        """
        if self._room is None or not chosen:
            return frozenset(), times
        most = self._slabs(chosen, (), times)
        if max(most) <= self._room:
            return frozenset(), times
        if self._cfg.memory.offload_disk is None:
            raise UserError(self._problem(most, "offloaded", "set memory.offload_disk to a folder for the rest"))
        lived = self._lived(chosen, times)
        at_once = replace(times, store=_NOTHING, fetch=_NOTHING)
        for placed in (times, at_once, replace(at_once, offload=_NOTHING, reload=_NOTHING)):
            most = self._slabs(chosen, chosen, placed)
            if max(most) <= self._room:

                def fits(counts: Sequence[int], placed: Times = placed) -> list[bool]:
                    return self._fits(self._slabs(chosen, _of(lived, counts), placed))

                least = _least(lived, fits)
                return (_of(lived, least) if all(fits(least)) else frozenset(chosen)), placed
        raise UserError(self._problem(most, "on their way to the disk", "set a smaller memory.group"))

    def _lived(self, chosen: Collection[Pass], times: Times) -> list[list[Pass]]:
        """By rank, the longest-lived first."""
        wanted = set(chosen)
        return [[each.pass_ for each in mine if each.pass_ in wanted] for mine in windows(self._program, times)]

    def _slabs(self, chosen: Collection[Pass], away: Collection[Pass], times: Times) -> tuple[float, ...]:
        return slot_bytes(offload(self._program, chosen, times, stored=away), self._sizes, "slab")

    def _fits(self, nbytes: Sequence[float]) -> list[bool]:
        return [self._room is None or each <= self._room for each in nbytes]

    def _problem(self, most: Sequence[float], when: str, advice: str) -> Problem:
        rank, needed = most.index(max(most)), max(most) / GIB
        return Problem(
            "memory.host_gib",
            f"{self._cfg.memory.host_gib:g}, but activations of rank {rank} of the pipeline take {needed:.4g} GiB of "
            f"the host when they are {when}; {advice}, or memory.host_gib={1.001 * needed:.3g}",
        )


def _of(lived: Sequence[Sequence[Pass]], counts: Sequence[int]) -> frozenset[Pass]:
    """So many of each rank's, the first ones."""
    return frozenset(each for mine, count in zip(lived, counts, strict=True) for each in mine[:count])


def _least(lived: Sequence[Sequence[Pass]], fits: Callable[[Sequence[int]], Sequence[bool]]) -> list[int]:
    """The smallest number for each rank with which it fits, all if none does; they do not depend on each other."""
    low, high = [0] * len(lived), [len(mine) for mine in lived]
    while low != high:
        middle = [(a + b) // 2 for a, b in zip(low, high, strict=True)]
        for rank, enough in enumerate(fits(middle)):
            if low[rank] < high[rank]:
                low[rank], high[rank] = (low[rank], middle[rank]) if enough else (middle[rank] + 1, high[rank])
    return high
