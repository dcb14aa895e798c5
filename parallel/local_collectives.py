"""The collectives of `collectives.py` between processes that can read each other's memory (`local.py`).

Nothing moves before `finish`: the waiting rank copies what it needs, so no thread competes with the compute. Sums run
in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .local import Exchange, LocalAxis, Read


@dataclass(frozen=True)
class Flight:
    """A collective in flight: `finish` returns the result, `done` says whether it would at once."""

    finish: Callable[[], Tensor]
    done: Callable[[], bool]


def _others(local: LocalAxis) -> list[int]:
    """The peers in the order in which a rank turns to them: all of them to different ones."""
    size = len(local.ranks)
    return [(local.rank + i) % size for i in range(1, size)]


def _flight(exchange: Exchange, result: Callable[[], Tensor]) -> Flight:
    def finish() -> Tensor:
        exchange.finish()
        return result()

    return Flight(finish, exchange.done)


def all_gather(local: LocalAxis, x: Tensor, out: Tensor) -> Flight:
    """x (n, …) → out (size · n, …); x may be this rank's part of out."""
    parts = out.chunk(len(local.ranks))
    peers = _others(local)
    exchange = local.exchange("all_gather", x, [Read(p, 0, parts[p]) for p in peers], peers)
    mine = parts[local.rank]
    if mine.data_ptr() != x.data_ptr():
        mine.copy_(x)
    return _flight(exchange, lambda: out)


def reduce_scatter(local: LocalAxis, x: Tensor, out: Tensor) -> Flight:
    """x (size · n, …) → out (n, …), which may be this rank's part of x."""
    mine, peers = x.chunk(len(local.ranks))[local.rank], _others(local)
    parts = x.new_empty((len(local.ranks), *mine.shape))
    offset = local.rank * mine.numel() * mine.element_size()
    parts[local.rank].copy_(mine)
    exchange = local.exchange("reduce_scatter", x, [Read(p, offset, parts[p]) for p in peers], peers)
    return _flight(exchange, lambda: sum_in_rank_order(parts, out))


def all_reduce(local: LocalAxis, x: Tensor, op: str) -> Flight:
    """x (…) in place, for small x: every rank reads all the others'."""
    parts, peers = x.new_empty((len(local.ranks), *x.shape)), _others(local)
    parts[local.rank].copy_(x)
    exchange = local.exchange("all_reduce", parts[local.rank], [Read(p, 0, parts[p]) for p in peers], peers)

    def result() -> Tensor:
        if op == "sum":
            return sum_in_rank_order(parts, x)
        return x.copy_(parts.amax(0) if op == "max" else parts.amin(0))

    return _flight(exchange, result)


def all_to_all(
    local: LocalAxis, x: Tensor, out: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None
) -> Flight:
    """Rows of x to all ranks; `send` and `receive` are rows per rank, none: equal parts."""
    size = len(local.ranks)
    sent = x.split(send or [x.shape[0] // size] * size)
    parts, peers = out.split(receive or [out.shape[0] // size] * size), _others(local)
    row = x[:1].numel() * x.element_size() if x.shape[0] else 0
    offsets = [row * sum(len(part) for part in sent[:p]) for p in range(size)]
    exchange = local.exchange("all_to_all", x, [Read(p, None, parts[p]) for p in peers], peers, offsets)
    parts[local.rank].copy_(sent[local.rank])
    return _flight(exchange, lambda: out)


def broadcast(local: LocalAxis, x: Tensor, source: int) -> Flight:
    """x in place: that of `source`."""
    if source == local.rank:
        return _flight(local.exchange("broadcast", x, (), _others(local)), lambda: x)
    return _flight(local.exchange("broadcast", None, [Read(source, 0, x)], ()), lambda: x)


def reduce_blocks(local: LocalAxis, x: Tensor, to: Sequence[int]) -> Flight:
    """Block j of x summed to rank `to[j]`: (n, …) there, (0, …) elsewhere."""
    blocks, reads = x.chunk(len(to)), []
    parts = x.new_empty((0, 0, *x.shape[1:]))
    if local.rank in to:
        mine = blocks[to.index(local.rank)]
        offset = to.index(local.rank) * mine.numel() * mine.element_size()
        parts = x.new_empty((len(local.ranks), *mine.shape))
        parts[local.rank].copy_(mine)
        reads = [Read(p, offset, parts[p]) for p in _others(local)]
    exchange = local.exchange("reduce", x, reads, [p for p in to if p != local.rank])

    def result() -> Tensor:
        return sum_in_rank_order(parts, torch.empty_like(parts[0])) if reads else parts.view(0, *x.shape[1:])

    return _flight(exchange, result)


def send(local: LocalAxis, x: Tensor, to: int) -> Flight:
    """x to one rank."""
    return _flight(local.send(x, to), lambda: x)


def receive(local: LocalAxis, out: Tensor, source: int) -> Flight:
    """From one rank into `out`."""
    return _flight(local.receive(out, source), lambda: out)


def sum_in_rank_order(parts: Tensor, out: Tensor) -> Tensor:
    """parts (size, n, …) → out (n, …). bf16 is summed in fp32."""
    if parts.shape[0] == 2:
        return torch.add(parts[0], parts[1], out=out)
    return torch.sum(parts, dim=0, out=out)
