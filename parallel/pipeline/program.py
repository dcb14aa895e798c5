"""The program: everything each rank does in a training step, as lists made before the step runs.

    rank 0   F0@0 SF0@0 F1@0 SF1@0 RB0@0#0 BW0@0 RB1@0#1 BW1@0 RG0 NORM OPT0 AG0
    rank 1   RF0@1#0 F0@1 BW0@1 SB0@1 RF1@1#0 F1@1 BW1@1 SB1@1 RG0 NORM OPT0 AG0

A token is a kind (`needs.py`) and what it acts on: `F3@2` is the forward pass of microbatch 3 at stage 2, `RF3@2#1`
the receive of its input into buffer slot 1, `OPT0` the update of bucket 0. Generators write compute only; passes add
the rest (`vocabulary.py`, `lower.py`). The same program is checked, simulated, drawn and executed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import cached_property

from ...configs.fields import short
from ...configs.reading.program_file import parse_frame
from .kind import Kind
from .needs import Kinds, kind_of

OUTSTANDING_SENDS = 2
"""Sends under way per directed channel; a further one waits until the oldest is complete, so outputs cannot pile up."""

_TOKEN = re.compile(r"([A-Z]+)(\d*)(?:@(\d+))?(?:#(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Op:
    """One operation.

    Args:
        kind: what it does.
        index: the microbatch, or the bucket of an update; -1 for NORM.
        stage: the stage that computes, sends or receives; -1 where there is none.
        slot: the buffer of a receive, counted per stage and direction, or the host's slab or the disk's file of a copy,
            counted per rank; -1 where none is assigned.
    """

    kind: Kind
    index: int = -1
    stage: int = -1
    slot: int = -1

    def __str__(self) -> str:
        index = "" if self.index < 0 else str(self.index)
        stage = "" if self.stage < 0 else f"@{self.stage}"
        slot = "" if self.slot < 0 else f"#{self.slot}"
        return f"{self.kind.token}{index}{stage}{slot}"

    @staticmethod
    def parse(token: str) -> Op:
        """The operation that a token names.

        Raises:
            ValueError: no such operation.
        """
        match = _TOKEN.fullmatch(token)
        if match is None:
            raise ValueError(f"{short(token)} is not an operation")
        kind, *numbers = match.groups()
        return Op(kind_of(kind), *(-1 if not number else int(number) for number in numbers))


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
        frame = parse_frame(text.encode())
        ranks = tuple(tuple(map(Op.parse, tokens)) for tokens in frame.ranks)
        for op in (op for ops in ranks for op in ops):
            if op.stage >= len(frame.placement):
                raise ValueError(f"{op} is at stage {op.stage} of {len(frame.placement)}")
        return Program(frame.microbatches, frame.placement, ranks, frame.vocab_barriers)

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits, the same on every rank and in every run."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def update(buckets: int) -> Ops:
    """The end of a rank's step: its buckets are reduced, optimized and gathered."""
    ops = [Op(Kinds.REDUCE, i) for i in range(buckets)]
    ops += [Op(Kinds.NORM)]
    ops += [op for i in range(buckets) for op in (Op(Kinds.OPTIMIZE, i), Op(Kinds.GATHER, i))]
    return tuple(ops)
