"""Checksums of raw bits: exact, the same in any order of adding up, and another one after any single bit has changed.

A checksum is the sum of a tensor's 64-bit words modulo 2⁶⁴. One bit that flips changes its word, and so the sum, by a
power of two below 2⁶⁴, which is never zero. Several changes can cancel (two words that change places, opposite
flips of the same bit in two words); what a faulty device or memory does at random does so once in 2⁶⁴ times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 8
"""Bytes."""


def words(x: Tensor) -> tuple[Tensor, ...]:
    """A contiguous tensor's memory as integers, nothing copied: 64-bit words, and bytes before and behind them where it
    does not begin or end with one."""
    raw = x.detach().view(-1).view(torch.uint8)
    head = min(-raw.storage_offset() % _WORD, raw.numel())
    body = head + (raw.numel() - head) // _WORD * _WORD
    whole = raw[head:body].view(torch.int64) if body > head else raw[:0]
    return tuple(part for part in (raw[:head], whole, raw[body:]) if part.numel()) or (raw,)


def sum_words(parts: Sequence[Tensor]) -> Tensor:
    """The checksum, int64 (), of what `words` gave."""
    if len(parts) == 1:
        return parts[0].sum()
    return torch.stack([part.sum() for part in parts]).sum()


def checksum(x: Tensor) -> Tensor:
    """The checksum of a tensor (…) in any memory, int64 (): equal for equal bits."""
    held = x.detach().contiguous()
    return sum_words(words(held.clone() if held.storage_offset() * held.element_size() % _WORD else held))


@dataclass(frozen=True)
class ParameterMemory:
    """Memory in which a part of a parameter, or of what belongs to it, lies.

    Args:
        what: of the parameter: "parameter", "gradient", "master", or the state's name.
        name: of the parameter.
        memory: contiguous; the same as long as the place is used.
    """

    what: str
    name: str
    memory: Tensor


class ChecksumWindow:
    """A time in which nobody may change the memory of some places: opened for each, or for all, then checked, once or
    more often, then closed.

    Args:
        places: all on one device.
        device: where `changed` is.
    """

    def __init__(self, places: Sequence[ParameterMemory], device: torch.device) -> None:
        self.places = tuple(places)
        self._words = [words(place.memory) for place in self.places]
        self._sums: list[Tensor | None] = [None for _ in self.places]
        self.changed = torch.zeros(len(self.places), dtype=torch.bool, device=device)
        """(places,) whether a check found other bits than there were at the opening."""

    def open(self, number: int | None = None) -> None:
        """From now on the bits of a place, or of all, stay as they are."""
        for i in range(len(self.places)) if number is None else (number,):
            self._sums[i] = sum_words(self._words[i])

    def check(self) -> None:
        """Compares what is open, and leaves it open."""
        found = {i: kept for i, kept in enumerate(self._sums) if kept is not None}
        if not found:
            return
        now = torch.stack([sum_words(self._words[i]) for i in found])
        differs = (now != torch.stack(list(found.values()))).to(self.changed.device)
        if len(found) == len(self.places):
            self.changed |= differs
        else:
            self.changed[list(found)] |= differs

    def close(self) -> None:
        """From now on all may change."""
        self._sums = [None for _ in self.places]
