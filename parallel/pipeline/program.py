"""The program: everything one rank does in a training step, as a list made before the step runs.

    F0 BW0 F1 BW1 RG0 RG1 NORM OPT0 AG0 OPT1 AG1        (one stage, two micro-batches, two buckets)

A token is the kind and what it acts on: a micro-batch for compute, a bucket of parameters for the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What an operation does."""

    FORWARD = "F"
    """Forward pass of a micro-batch."""
    BACKWARD = "BW"
    """Backward pass of a micro-batch: input and weight gradients."""
    REDUCE = "RG"
    """The gradients of a bucket are final: sum them over the replicas. Waits for the sum, which may run since."""
    NORM = "NORM"
    """Global gradient norm, loss, and whether the step is skipped."""
    OPTIMIZE = "OPT"
    """Update this rank's share of a bucket."""
    GATHER = "AG"
    """Start handing the updated shares of a bucket to all replicas."""


@dataclass(frozen=True, slots=True)
class Op:
    """One operation. `index` is a micro-batch (F, BW) or a bucket (RG, OPT, AG); NORM has none."""

    kind: Kind
    index: int = -1

    def __str__(self) -> str:
        return self.kind.value if self.index < 0 else f"{self.kind.value}{self.index}"

    @staticmethod
    def parse(token: str) -> Op:
        """The operation that a token names.

        Raises:
            ValueError: no such operation.
        """
        match = re.fullmatch(r"([A-Z]+)(\d*)", token)
        if match is None:
            raise ValueError(f"{token!r} is not an operation")
        return Op(Kind(match[1]), int(match[2]) if match[2] else -1)


@dataclass(frozen=True)
class Program:
    """The operations of each rank of the pipeline axis, in order."""

    microbatches: int
    ranks: tuple[tuple[Op, ...], ...]

    def to_json(self) -> str:
        """Text that `from_json` reads back."""
        ranks = [[str(op) for op in ops] for ops in self.ranks]
        return json.dumps({"microbatches": self.microbatches, "ranks": ranks})

    @staticmethod
    def from_json(text: str) -> Program:
        """The program that `to_json` wrote."""
        data = json.loads(text)
        ranks = tuple(tuple(Op.parse(token) for token in ops) for ops in data["ranks"])
        return Program(data["microbatches"], ranks)

    @property
    def hash(self) -> str:
        """16 hexadecimal digits, the same on every rank and in every run."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def single_stage(microbatches: int, buckets: int) -> Program:
    """The program of a step without a pipeline: all micro-batches in turn, then the update bucket by bucket."""
    ops = [op for i in range(microbatches) for op in (Op(Kind.FORWARD, i), Op(Kind.BACKWARD, i))]
    ops += [Op(Kind.REDUCE, i) for i in range(buckets)]
    ops += [Op(Kind.NORM)]
    ops += [op for i in range(buckets) for op in (Op(Kind.OPTIMIZE, i), Op(Kind.GATHER, i))]
    return Program(microbatches, (tuple(ops),))
