"""How much is alive on a rank while its program goes on: the most, and what that is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...models.costs.tensors import Group
from ...parallel.pipeline.kind import Hold
from ...parallel.pipeline.memory import holds_of
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program import Op, Ops
from .fixed import FlatBucket
from .stages import StageBytes, VocabularyBytes


@dataclass(frozen=True)
class Moment:
    """Bytes that are alive beside what is there all the time.

    Args:
        activations: what microbatches keep between their passes.
        working: what the operation at work makes.
        communication: what collectives read their ranks' parts into.
        during: the operation.
    """

    activations: float = 0.0
    working: float = 0.0
    communication: float = 0.0
    during: str = "between two steps"

    @property
    def total(self) -> float:
        return self.activations + self.working + self.communication


@dataclass(frozen=True)
class Course:
    """Of a whole step on one rank.

    Args:
        most: when the most is alive.
        host, disk: the most that is there.
        in_flight: the most activations at once, of one microbatch at one stage each.
    """

    most: Moment
    host: float
    disk: float
    in_flight: int


class Walk:
    """Goes through a rank's operations.

    Args:
        ops: of the rank.
        stage: what a stage holds of a microbatch, by both numbers.
        buckets: of the rank's gradients.
        reduced: bytes that a bucket's reduction reads its ranks' parts into.
        vocabulary: of the rank.
        update: what the update of a bucket makes.
    """

    def __init__(
        self,
        ops: Ops,
        stage: Callable[[int, int], StageBytes],
        buckets: Sequence[FlatBucket],
        reduced: Callable[[FlatBucket], float],
        vocabulary: VocabularyBytes,
        update: float,
    ) -> None:
        self._ops, self._stage, self._buckets, self._reduced = ops, stage, buckets, reduced
        self._vocabulary, self._update = vocabulary, update
        # The last pass of a kind through a stage makes its gradients final.
        self._last = {(op.kind, op.stage): op.index for op in ops}
        self._pending = {id(bucket): set(bucket.groups) for bucket in buckets}
        self._held: dict[str, float] = {"": 0.0, "host": 0.0, "disk": 0.0}
        self._peaks = dict.fromkeys(self._held, 0.0)
        self._summing = self._partial = 0.0
        self._in_flight = self._most_in_flight = 0
        self._most, self._total = Moment(), 0.0

    def course(self) -> Course:
        """What the step needs."""
        changes = {(position, at_end): holds for position, at_end, holds in holds_of(self._ops)}
        for position, op in enumerate(self._ops):
            self._change(op, changes.get((position, 0), ()))
            self._work(op)
            self._change(op, changes.get((position, 1), ()))
        self._look(Op(Kinds.REDUCE, 0), 0.0)
        self._summing = self._partial = 0.0
        self._look(Op(Kinds.OPTIMIZE, 0), self._update)
        return Course(self._most, self._peaks["host"], self._peaks["disk"], self._most_in_flight)

    def _change(self, op: Op, holds: Sequence[Hold]) -> None:
        """What comes and goes at the start or the end of an operation."""
        for hold in holds:
            where = hold.what if hold.what in self._held else ""
            self._held[where] += hold.sign * self._size(op, hold.what)
            self._peaks[where] = max(self._peaks[where], self._held[where])
            if hold.counts and hold.what in ("activation", "deferred"):
                self._in_flight += hold.sign
                self._most_in_flight = max(self._most_in_flight, self._in_flight)

    def _size(self, op: Op, what: str) -> float:
        if what == "parameters":
            return 0.0  # counted where they lie all the time (`fixed.Held.gathered`)
        if what == "head":
            return self._vocabulary.kept
        mine = self._stage(op.stage, op.index)
        return mine.deferred if what == "deferred" else mine.kept

    def _look(self, op: Op, working: float) -> None:
        communication = self._summing + self._partial
        total = self._held[""] + working + communication
        if total > self._total:
            self._total, self._most = total, Moment(self._held[""], working, communication, str(op))

    def _work(self, op: Op) -> None:
        """What an operation makes beside what is held at its start."""
        match op.kind:
            case Kinds.FORWARD:
                mine = self._stage(op.stage, op.index)
                self._look(op, mine.forward - mine.kept)
            case Kinds.BACKWARD | Kinds.INPUT_GRAD:
                self._backward(op)
            case Kinds.WEIGHT_GRAD:
                mine = self._stage(op.stage, op.index)
                self._look(op, mine.weight)
                self._finish(op, [group for groups, _ in mine.ends for group in groups])
            case Kinds.HEAD:
                self._look(op, self._vocabulary.score)
            case Kinds.HEAD_GRAD:
                self._look(op, self._vocabulary.gradient)
                self._finish(op, [("end", 0)])
            case Kinds.EMBED | Kinds.EMBED_GRAD:
                self._look(op, self._vocabulary.embedding)
                self._held[""] += self._vocabulary.embedded * (1 if op.kind == Kinds.EMBED else -1)
                self._finish(op, [("begin", 0)] if op.kind == Kinds.EMBED_GRAD else [])
            case _:
                self._look(op, 0.0)

    def _backward(self, op: Op) -> None:
        """Half a layer after the other; with the last microbatch of a stage gradients become final and are reduced."""
        mine = self._stage(op.stage, op.index)
        for groups, most in mine.ends:
            # Those of the tables are not left for later.
            now = groups if op.kind == Kinds.BACKWARD else [each for each in groups if each[0] in ("begin", "end")]
            self._finish(op, now)
            self._look(op, most - mine.kept)

    def _finish(self, op: Op, groups: Sequence[Group]) -> None:
        """These gradients are final if this is the last pass of its kind."""
        if self._last[op.kind, op.stage] == op.index and groups:
            for group in groups:
                self._final(group)

    def _final(self, group: Group) -> None:
        for bucket in self._buckets:
            waiting = self._pending[id(bucket)]
            if waiting:
                waiting.discard(group)
                if not waiting:
                    # One after the other; partial sums, which are small, all at once.
                    if bucket.partial:
                        self._partial += self._reduced(bucket)
                    else:
                        self._summing = self._reduced(bucket)
