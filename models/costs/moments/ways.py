"""How a device computes, as far as that makes tensors of its own."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....configs import ModelConfig
from ..widths import LocalWork, Widths


@dataclass(frozen=True, kw_only=True)
class Ways:
    """Of one device.

    Args:
        rounds: products of weight gradients of half precision are made before they are added (`weight_products`).
        collects: sums over ranks read every rank's part into a tensor first, as between the processes of a host.
        at_once: elements of half precision that are held in fp32 at a time (`models.functional`).
        blocks: attention's scores are tensors, of so many queries at a time; 0: they stay inside a kernel.
        long: queries from which on attention is one kernel all the same.
        context: bytes that the device's own context takes, with the workspace of its matrix products.
    """

    rounds: bool
    collects: bool
    at_once: int
    blocks: int
    long: int = 0
    context: int = 0


CONTEXT = 600 << 20
"""Of CUDA 13 on an H200, and cuBLAS's workspace."""

CPU = Ways(rounds=True, collects=True, at_once=1 << 17, blocks=64, long=1024)
CUDA = Ways(rounds=False, collects=False, at_once=1 << 25, blocks=0, context=CONTEXT)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a layer's passes are worked out from.

    Args:
        model: resolved.
        work: the microbatch.
        ways: of the device.
        method: of context parallelism; empty: a rank has whole sequences.
        ranks: which share them.
    """

    model: ModelConfig
    work: LocalWork
    ways: Ways
    method: str = ""
    ranks: int = 1

    @property
    def w(self) -> Widths:
        return Widths.of(self.model, self.work.tp, self.work.etp)

    @property
    def stream(self) -> float:
        """Bytes of the residual stream, (n, h)."""
        return self.work.stream * self.model.hidden * self.work.width

    @property
    def whole(self) -> float:
        """Bytes of all tokens' hidden states, (N, h)."""
        return self.work.tokens * self.model.hidden * self.work.width

    @property
    def half(self) -> bool:
        """Whether elements are of half precision."""
        return self.work.width < self.work.precise

    def tokens(self, features: float) -> float:
        """Bytes of (N, features)."""
        return self.work.tokens * features * self.work.width

    def wide(self, nbytes: float) -> float:
        """Bytes of the same in fp32 at least."""
        return nbytes * self.work.precise / self.work.width

    def chunk(self, nbytes: float, copies: int = 1) -> float:
        """Bytes of fp32 copies of as much of a tensor as is worked on at once; 0 where nothing has to be converted."""
        if not self.half:
            return 0.0
        return copies * self.work.precise * min(nbytes / self.work.width, self.ways.at_once)

    def product(self, features: float, inputs: float) -> float:
        """Bytes of a weight's gradient that is made before it is added."""
        return features * inputs * self.work.width if self.half and self.ways.rounds else 0.0

    def collected(self, nbytes: float) -> float:
        """Bytes of every rank's part of a sum, where these are read first."""
        return nbytes if self.ways.collects else 0.0

    def with_rows(self, rows: int | None, sent: int | None) -> Bench:
        """With these rows of experts."""
        return replace(self, work=replace(self.work, rows=rows, sent=sent))
