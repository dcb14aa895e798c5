"""The program: everything each rank does in a training step, as lists made before the step runs.

    rank 0   F0@0 SF0@0 F1@0 SF1@0 RB0@0#0 BW0@0 RB1@0#1 BW1@0 RG0 NORM OPT0 AG0
    rank 1   RF0@1#0 F0@1 BW0@1 SB0@1 RF1@1#0 F1@1 BW1@1 SB1@1 RG0 NORM OPT0 AG0

A token is a kind and what it acts on: `F3@2` is the forward pass of micro-batch 3 at stage 2, `RF3@2#1` the receive of
its input into buffer slot 1, `OPT0` the update of bucket 0. Generators write compute only; passes add the rest
(`vocabulary.py`, `lower.py`). The same program is checked, simulated, drawn and executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property


class Kind(StrEnum):
    """What an operation does."""

    FORWARD = "F"
    """Forward pass of a stage."""
    BACKWARD = "BW"
    """Backward pass of a stage: input and weight gradients."""
    INPUT_GRAD = "B"
    """The part of a backward pass that other stages wait for: the gradient of the stage's input."""
    WEIGHT_GRAD = "W"
    """The rest of a backward pass: the gradients of the stage's weights."""

    HEAD = "S"
    """Balanced vocabulary: this rank's logits, softmax statistics and, with one barrier, its part of the gradient."""
    HEAD_GRAD = "T"
    """Balanced vocabulary: the head's weight gradient and, with two barriers, this rank's part of the gradient."""
    EMBED = "IF"
    """Balanced vocabulary: look up the rows that this rank holds."""
    EMBED_GRAD = "IB"
    """Balanced vocabulary: add to the gradient of the rows that this rank holds."""

    SEND_FORWARD = "SF"
    """Start sending the output of a stage to the next one."""
    RECV_FORWARD = "RF"
    """Start receiving the input of a stage into a slot; the stage's forward waits for it."""
    SEND_BACKWARD = "SB"
    """Start sending the gradient of a stage's input to the stage before it."""
    RECV_BACKWARD = "RB"
    """Start receiving the gradient of a stage's output into a slot; the stage's backward waits for it."""

    HIDDEN = "CX"
    """Start the broadcast of the last stage's output; S waits for it."""
    STATISTICS = "CS"
    """Start agreeing on the softmax and, with one barrier, summing the gradient to the last stage; T waits for it."""
    HIDDEN_GRAD = "CD"
    """Two barriers: start summing the gradient to the last stage, whose backward waits for it."""
    EMBEDDED = "CE"
    """Start summing the looked-up rows to the first stage, whose forward waits for it."""
    EMBEDDED_GRAD = "CG"
    """Start the broadcast of the gradient of the first stage's input; IB waits for it."""

    REDUCE = "RG"
    """The gradients of a bucket are final: sum them over the replicas. Waits for the sum, which may run since."""
    NORM = "NORM"
    """Global gradient norm, loss, and whether the step is skipped."""
    OPTIMIZE = "OPT"
    """Update this rank's share of a bucket."""
    GATHER = "AG"
    """Start handing the updated shares of a bucket to all replicas."""


STAGE_COMPUTE = frozenset({Kind.FORWARD, Kind.BACKWARD, Kind.INPUT_GRAD, Kind.WEIGHT_GRAD})
VOCAB_COMPUTE = frozenset({Kind.HEAD, Kind.HEAD_GRAD, Kind.EMBED, Kind.EMBED_GRAD})
COMPUTE = STAGE_COMPUTE | VOCAB_COMPUTE
"""Occupies the device's compute."""
SENDS = frozenset({Kind.SEND_FORWARD, Kind.SEND_BACKWARD})
RECEIVES = frozenset({Kind.RECV_FORWARD, Kind.RECV_BACKWARD})
HEAD_LANE = frozenset({Kind.HIDDEN, Kind.STATISTICS, Kind.HIDDEN_GRAD})
EMBED_LANE = frozenset({Kind.EMBEDDED, Kind.EMBEDDED_GRAD})
COLLECTIVES = HEAD_LANE | EMBED_LANE
"""Over all ranks of the pipeline (times tp). Each lane runs its collectives one after the other, in program order."""
UPDATE = frozenset({Kind.REDUCE, Kind.NORM, Kind.OPTIMIZE, Kind.GATHER})

OUTSTANDING_SENDS = 2
"""Sends under way per directed channel; a further one waits until the oldest is complete, so outputs cannot pile up."""

_TOKEN = re.compile(r"([A-Z]+)(\d*)(?:@(\d+))?(?:#(\d+))?")


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Args:
        kind: what it does.
        index: the micro-batch, or the bucket of an update; -1 for NORM.
        stage: the stage that computes, sends or receives; -1 where there is none.
        slot: the buffer of a receive, counted per stage and direction; -1 where none is assigned.
    """

    kind: Kind
    index: int = -1
    stage: int = -1
    slot: int = -1

    def __str__(self) -> str:
        index = "" if self.index < 0 else str(self.index)
        stage = "" if self.stage < 0 else f"@{self.stage}"
        slot = "" if self.slot < 0 else f"#{self.slot}"
        return f"{self.kind.value}{index}{stage}{slot}"

    @staticmethod
    def parse(token: str) -> Op:
        """The operation that a token names.

        Raises:
            ValueError: no such operation.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"{token!r} is not an operation")
        kind, *numbers = match.groups()
        return Op(Kind(kind), *(-1 if not number else int(number) for number in numbers))


Ops = tuple[Op, ...]


@dataclass(frozen=True)
class Program:
    """The operations of each rank of the pipeline axis, in order.

    Args:
        microbatches: per step, m.
        placement: the rank that holds each stage; stage 0 embeds, the last stage makes the loss.
        ranks: one list of operations per rank.
        vocab_barriers: 0 where embedding and head are at the ends; else they are balanced over all ranks, and the
            head's gradient needs this many barriers (1 or 2).
    """

    microbatches: int
    placement: tuple[int, ...]
    ranks: tuple[Ops, ...]
    vocab_barriers: int = 0

    @property
    def stages(self) -> int:
        return len(self.placement)

    @cached_property
    def chunks(self) -> int:
        """Stages per rank (the most of any rank)."""
        return max(self.placement.count(rank) for rank in range(len(self.ranks)))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank holds, in order."""
        return tuple(stage for stage, where in enumerate(self.placement) if where == rank)

    def to_json(self) -> str:
        """Text that `from_json` reads back."""
        return json.dumps(
            {
                "microbatches": self.microbatches,
                "placement": self.placement,
                "vocab_barriers": self.vocab_barriers,
                "ranks": [[str(op) for op in ops] for ops in self.ranks],
            }
        )

    @staticmethod
    def from_json(text: str) -> Program:
        """The program that `to_json` wrote.

        Raises:
            ValueError: the text is not a program.
        """
        data = json.loads(text)
        try:
            ranks = tuple(tuple(Op.parse(token) for token in ops) for ops in data["ranks"])
            return Program(data["microbatches"], tuple(data["placement"]), ranks, data["vocab_barriers"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a program: {error!r}") from None

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits, the same on every rank and in every run."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def update(buckets: int) -> Ops:
    """The end of a rank's step: its buckets are reduced, optimized and gathered."""
    ops = [Op(Kind.REDUCE, i) for i in range(buckets)]
    ops += [Op(Kind.NORM)]
    ops += [op for i in range(buckets) for op in (Op(Kind.OPTIMIZE, i), Op(Kind.GATHER, i))]
    return tuple(ops)


def data_needs(program: Program, op: Op) -> tuple[tuple[int, Op], ...]:
    """What must be finished before a compute operation can start: (rank, compute operation), on whatever rank.

    A need for a backward pass is stated as B; a program that does not split backward answers it with BW.
    """
    i, s, last = op.index, op.stage, program.stages - 1
    everyone = range(len(program.ranks))
    where = program.placement
    match op.kind:
        case Kind.FORWARD if s > 0:
            return ((where[s - 1], Op(Kind.FORWARD, i, s - 1)),)
        case Kind.FORWARD if program.vocab_barriers:
            return tuple((rank, Op(Kind.EMBED, i)) for rank in everyone)
        case Kind.BACKWARD | Kind.INPUT_GRAD:
            own = (where[s], Op(Kind.FORWARD, i, s))
            if s < last:
                return (own, (where[s + 1], Op(Kind.INPUT_GRAD, i, s + 1)))
            head = {0: None, 1: Kind.HEAD, 2: Kind.HEAD_GRAD}[program.vocab_barriers]
            return (own, *((rank, Op(head, i)) for rank in everyone if head))
        case Kind.WEIGHT_GRAD:
            return ((where[s], Op(Kind.INPUT_GRAD, i, s)),)
        case Kind.HEAD:
            return ((where[last], Op(Kind.FORWARD, i, last)),)
        case Kind.HEAD_GRAD:
            return tuple((rank, Op(Kind.HEAD, i)) for rank in everyone)
        case Kind.EMBED_GRAD:
            return ((where[0], Op(Kind.INPUT_GRAD, i, 0)),)
    return ()
