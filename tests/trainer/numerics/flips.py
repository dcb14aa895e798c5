"""Single bits that flip inside a training step, by seed: what, on which rank, in which step, which bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pentad.configs.schema import Config
from pentad.parallel.replicas.buckets import Bucket
from pentad.trainer.checkpoint.state import units_by_key
from pentad.trainer.numerics.findings import Corruption, conclude
from pentad.trainer.session import Session
from tests.training import Run

KINDS = ("gradient", "parameter", "master", "moment", "recomputed")
"""What has windows. "copied" is a parameter that is whole on several ranks beside the data axis."""


@dataclass(frozen=True)
class Flip:
    """One bit that flips.

    Args:
        kind: of `KINDS`, or "copied".
        rank: on which.
        step: in which, from 0 on.
        seed: of the place, the element, the bit and the moment.
    """

    kind: str
    rank: int
    step: int
    seed: int

    @staticmethod
    def draw(seed: int, kind: str, world: int, steps: int) -> Flip:
        """The flip of a seed."""
        draws = random.Random(f"{kind} {seed}")
        return Flip(kind, draws.randrange(world), draws.randrange(steps), seed)


@dataclass(frozen=True)
class Flipped:
    """What was flipped: of a parameter, and of which."""

    what: str
    name: str


@dataclass(frozen=True)
class Told:
    """What a job found.

    Args:
        step: in which, from 0 on; none: in none.
        found: what all ranks conclude.
        flipped: on the rank of the flip.
    """

    step: int | None
    found: Corruption | None
    flipped: Flipped | None


def flip_bit(memory: Tensor, draws: random.Random) -> None:
    """Flips one bit of a tensor in place."""
    raw = memory.detach().view(-1).view(torch.uint8)
    raw[draws.randrange(raw.numel())] ^= 1 << draws.randrange(8)


def train_with_flip(rank: int, world: int, cfg: Config, flip: Flip | None) -> Told:
    """Steps until bits were found changed."""
    run = Run(rank, cfg)
    flipped: list[Flipped] = []
    try:
        for step in range(cfg.train.steps):
            mine = flip is not None and (flip.rank, flip.step) == (rank, step)
            with flipping(run, flip, flipped) if flip is not None and mine else nullcontext():
                result = run.issue(step)
            if float(result.corrupted):
                assert run.stepper.guard is not None
                ranks = run.mesh.gather_objects(run.stepper.guard.findings(step))
                return Told(step, conclude(step + 1, ranks), flipped[0] if flipped else None)
        return Told(None, None, flipped[0] if flipped else None)
    finally:
        run.close()


def flipping(run: Run | Session, flip: Flip, flipped: list[Flipped]) -> AbstractContextManager[None]:
    """While it is open, one step of the rank has the flip, once."""
    draws = random.Random(flip.seed)
    if flip.kind == "gradient":
        return _before_sending(draws, flipped)
    if flip.kind == "recomputed":
        return _in_a_part(run, draws, flipped)
    return _in_the_state(type(run.parts.replicas), lambda: flip_state(run, flip.kind, draws), draws, flipped)


@contextmanager
def _before_sending(draws: random.Random, flipped: list[Flipped]) -> Iterator[None]:
    """In a gradient that is final, of some bucket, before the bucket is handed to its collective."""
    handed, launched = Bucket.handed_over, iter(range(1 << 30))
    chosen = draws.randrange(2)

    def hand_over(bucket: Bucket) -> None:
        final = [m for m, slot in zip(bucket.members, bucket.slots, strict=True) if not slot.fresh]
        if next(launched) >= chosen and not flipped and final:
            member = draws.choice(final)
            flip_bit(bucket.sums.held[member.start : member.stop], draws)
            flipped.append(Flipped("gradient", member.name))
        handed(bucket)

    with patch.object(Bucket, "handed_over", hand_over):
        yield


@contextmanager
def _in_a_part(run: Run | Session, draws: random.Random, flipped: list[Flipped]) -> Iterator[None]:
    """In what a module makes, in one of the two runs of one of the microbatches."""
    layers = run.parts.model.layers
    layer = draws.choice(list(layers))
    module = layers[layer].get_submodule(draws.choice(("attention_norm", "attention", "ffn_norm")))
    at, passes = draws.randrange(2 * run.stepper.program.microbatches), iter(range(1 << 30))

    def flip(module: nn.Module, given: object, made: Tensor) -> None:
        if next(passes) == at:
            flip_bit(made.data, draws)  # not seen by autograd, as a fault is not
            flipped.append(Flipped("recomputed", f"layer {layer}"))

    handle = module.register_forward_hook(flip)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_the_state(
    kind: type, flip: Callable[[], Flipped], draws: random.Random, flipped: list[Flipped]
) -> Iterator[None]:
    """Between a step's first microbatch and its update."""
    at = draws.choice(("begin_microbatch", "reduce"))
    then, skipped = getattr(kind, at), iter((at == "begin_microbatch",))

    def wrapped(replicas: Any, *args: int) -> None:
        if not next(skipped, False) and not flipped:
            flipped.append(flip())
        then(replicas, *args)

    with patch.object(kind, at, wrapped):
        yield


def flip_state(run: Run | Session, kind: str, draws: random.Random) -> Flipped:
    """Flips a bit of the state now."""
    if kind in ("parameter", "copied"):
        params = run.parts.model.named_parameters()
        name, param = draws.choice([(n, p) for n, p in params if kind == "parameter" or run.parts.where[n].partial])
        flip_bit(param.to_local() if isinstance(param, DTensor) else param.data, draws)
        return Flipped("parameter", name)
    units, piece = units_by_key(run.parts.replicas), draws.choice(list(run.parts.replicas.pieces()))
    part = slice(piece.at, piece.at + piece.stop - piece.start)
    if kind == "master":
        assert units[piece.unit].rounded is not None
        flip_bit(units[piece.unit].value[part], draws)
        return Flipped("master", piece.name)
    state, value = draws.choice(list(run.optimizer.states[piece.unit].items()))
    flip_bit(value[part], draws)
    return Flipped(state, piece.name)
