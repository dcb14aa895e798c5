"""Fingerprints of what parts of a forward pass save and return, compared with those of their second runs.

A part that runs again from the same inputs makes the same bits. If it does not, one of the two runs was wrong, and it
is known which tensor was the first to differ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from .checksum import checksum
from .record.ring import Recorder


@dataclass(frozen=True)
class RerunMismatch:
    """A tensor that a second run made in another way.

    Args:
        part: what ran again: a layer, or a part of one.
        number: of the tensor among those of the part, in the order in which they are made.
        tensor: the same in words.
        microbatch: of the rank.
    """

    part: str
    number: int
    tensor: str
    microbatch: int


class Fingerprints:
    """Those of one rank, of the last two steps: of a step on a device the host hears a step late.

    Args:
        recorder: knows the microbatch that is under way.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._steps: dict[int, list[tuple[RerunMismatch, Tensor]]] = {}
        self._compared: list[tuple[RerunMismatch, Tensor]] = []

    def begin(self, step: int) -> None:
        """A step begins."""
        self._compared = []
        self._steps = {old: found for old, found in self._steps.items() if old == step - 1} | {step: self._compared}

    def compare(self, part: str, number: int, tensor: str, first: Tensor, second: Tensor) -> None:
        """Of the tensors' checksums in the two runs; waits for no device."""
        self._compared.append((RerunMismatch(part, number, tensor, self._recorder.micro_batch), first != second))

    @property
    def differing(self) -> Tensor | int:
        """How many tensors of the step differ, a scalar on their device."""
        return torch.stack([bad for _, bad in self._compared]).sum() if self._compared else 0

    def mismatches(self, step: int) -> list[RerunMismatch]:
        """The tensors of a step that differ, first the one that was compared first; waits for the device."""
        compared = self._steps.get(step)
        if not compared:
            return []
        bad = torch.stack([each for _, each in compared]).tolist()
        return [what for (what, _), differs in zip(compared, bad, strict=True) if differs]


_TAKEN: ContextVar[Fingerprints | None] = ContextVar("taken", default=None)


@contextmanager
def fingerprinting(prints: Fingerprints | None) -> Iterator[None]:
    """Parts that run for the first time inside this block are compared with their second runs; none: they are not."""
    token = _TAKEN.set(prints)
    try:
        yield
    finally:
        _TAKEN.reset(token)


class PartPrints:
    """Those of one part, of its first run, and what they are compared with.

    Args:
        prints: of the step.
        part: its name.
    """

    def __init__(self, prints: Fingerprints, part: str) -> None:
        self._prints, self._part = prints, part
        self._saved: list[Tensor] = []
        self._returned: list[Tensor] = []

    @staticmethod
    def begin(part: str) -> PartPrints | None:
        """For a part that begins its first run; none where nothing is compared."""
        prints = _TAKEN.get()
        return None if prints is None else PartPrints(prints, part)

    def save(self, tensor: Tensor) -> None:
        """The first run saves a tensor (…)."""
        self._saved.append(checksum(tensor))

    def give(self, outputs: Sequence[Tensor]) -> None:
        """The first run returns these (…)."""
        self._returned = [checksum(y) for y in outputs]

    def saved_again(self, index: int, tensor: Tensor) -> None:
        """The second run saves its `index`-th tensor (…)."""
        what = f"saved tensor {index} {_described(tensor)}"
        self._prints.compare(self._part, index, what, self._saved[index], checksum(tensor))

    def given_again(self, outputs: Sequence[Tensor]) -> None:
        """The second run returns these (…)."""
        for index, (first, y) in enumerate(zip(self._returned, outputs, strict=True)):
            what, number = f"output {index} {_described(y)}", len(self._saved) + index
            self._prints.compare(self._part, number, what, first, checksum(y))


def _described(x: Tensor) -> str:
    return f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}"
