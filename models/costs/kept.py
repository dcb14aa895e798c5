"""What a layer can make again in place of keeping it, and what is kept then (`activations` has the rows). No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from ...configs.tables.layer_parts import TOKEN_WISE
from ...parallel.token_blocks import TokenBlocks

INPUT = "input"
"""The name of a layer's input."""


@dataclass(frozen=True)
class Kept:
    """A tensor that is kept.

    Args:
        name: of the tensor.
        elements: how many.
        width: bytes of each.
        parts: any of these makes it again; none: only the whole layer does.
        flops: of the matrix products that make it again.
        read: elements that backward reads, where it keeps more than these: views hold all that they were cut from.
    """

    name: str
    elements: int
    width: int
    parts: tuple[str, ...] = ()
    flops: float = 0.0
    read: int | None = None

    @property
    def nbytes(self) -> int:
        return self.elements * self.width


@dataclass(frozen=True)
class SomeTokens:
    """Parts that are made again, those whose rows are tokens for some tokens alone.

    Args:
        parts: of a layer.
        blocks: which tokens these are.
    """

    parts: frozenset[str]
    blocks: TokenBlocks

    @property
    def cut(self) -> frozenset[str]:
        """The parts of which the first tokens are kept."""
        return self.parts & TOKEN_WISE


Choice = Literal["none", "full"] | Collection[str] | SomeTokens
"""Nothing is made again, everything from the layer's input, or these parts."""


def some_tokens(parts: Collection[str], size: int, share: float) -> Choice:
    """These parts made again, where the first tokens of each block, this share of them at most, are kept.

    Args:
        parts: of a layer.
        size: tokens of a block.
        share: 0 to 1.
    """
    parts, kept = frozenset(parts), int(share * size + 1e-9)
    if not kept or not parts & TOKEN_WISE:
        return parts
    if kept >= size:
        return parts - TOKEN_WISE or "none"
    return SomeTokens(parts, TokenBlocks(size, kept))


def kept_bytes(rows: Iterable[Kept], choice: Choice = "none") -> int:
    """Bytes of the rows that are kept under a choice."""
    return sum(row.nbytes for row in kept_rows(rows, choice))


def kept_rows(rows: Iterable[Kept], choice: Choice = "none") -> list[Kept]:
    """The rows that are kept under a choice; of a layer under `full`, its input."""
    if choice == "none":
        return list(rows)
    if choice == "full":
        return [row for row in rows if row.name == INPUT]
    if isinstance(choice, SomeTokens):
        return _kept_of_some(rows, choice)
    return [row for row in rows if not set(row.parts).intersection(choice)]


def _kept_of_some(rows: Iterable[Kept], choice: SomeTokens) -> list[Kept]:
    """What is not made again, and of what is made again for some tokens the rows of the others."""
    found, blocks = [], choice.blocks
    for row in rows:
        made = choice.parts.intersection(row.parts)
        if not made:
            found.append(row)
        elif made & choice.cut:
            elements = row.elements if row.read is None else row.read
            found.append(replace(row, elements=elements * blocks.kept // blocks.size))
    return found


def share_again(row: Kept, choice: Choice) -> float:
    """The share of a row's tokens that is made again."""
    if choice in ("none", "full"):
        return float(choice == "full" and row.name != INPUT)
    if isinstance(choice, SomeTokens):
        made = choice.parts.intersection(row.parts)
        return choice.blocks.again if made & choice.cut else float(bool(made))
    return float(bool(set(row.parts).intersection(choice)))


def flops_of_again(rows: Iterable[Kept], choice: Choice) -> float:
    """FLOPs of making again what these parts make."""
    return sum(row.flops * share_again(row, choice) for row in rows)
