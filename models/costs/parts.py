"""Which parts of the model a rank has, and how the stages of a pipeline share its layers. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """What one instance holds of the whole model.

    Args:
        layers: indices of its layers.
        begins: it adds learned positions to the embedding.
        ends: it has the last norm.
        embeds, predicts: it has (part of) the embedding, the head.
    """

    layers: tuple[int, ...]
    begins: bool = True
    ends: bool = True
    embeds: bool = True
    predicts: bool = True


@dataclass(frozen=True)
class StageSplit:
    """How the model is split.

    Args:
        layers: indices of the layers of each stage.
        balanced: embedding, head and loss belong to no stage: the program runs them on all ranks.
        shared: the last stage uses the first one's embedding too, which then is of neither.
    """

    layers: tuple[tuple[int, ...], ...]
    balanced: bool = False
    shared: bool = False

    @staticmethod
    def of(counts: Sequence[int], *, balanced: bool = False, shared: bool = False) -> StageSplit:
        """Consecutive layers, so many per stage."""
        starts = [sum(counts[:stage]) for stage in range(len(counts))]
        layers = tuple(tuple(range(start, start + count)) for start, count in zip(starts, counts, strict=True))
        return StageSplit(layers, balanced, shared)

    def stage_of(self, name: str) -> int:
        """The stage whose passes read a parameter, by its name; −1: those of several, or of none."""
        section, _, rest = name.partition(".")
        if section in ("embed", "head") and (self.balanced or (self.shared and section == "embed")):
            return -1
        if section != "layers":
            return 0 if section in ("embed", "positions") else len(self.layers) - 1
        layer = int(rest.partition(".")[0])
        return next(stage for stage, layers in enumerate(self.layers) if layer in layers)

    def part(self, stages: Sequence[int]) -> Part:
        """What a rank with these stages holds."""
        begins, ends = 0 in stages, len(self.layers) - 1 in stages
        layers = tuple(i for stage in stages for i in self.layers[stage])
        return Part(layers, begins, ends, begins or self.balanced, ends or self.balanced)
