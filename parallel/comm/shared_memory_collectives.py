"""The collectives of `collectives.py` between processes that can read each other's memory (`local.py`).

The rank that needs something copies it, at the latest when it waits for it, so no thread competes with the compute.
Sums run in rank order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .shared_memory import Exchange, LocalAxis, PeerTensor
from .slow_copies import SlowCopy


@dataclass(frozen=True)
class Flight:
    """A collective in flight: `finish` returns the result, `done` says whether it would at once, `arrived` when the
    last of its other ranks had come to it (monotonic ns), and `slow` which copies took long, each handed out once; both
    once it is done."""

    finish: Callable[[], Tensor]
    done: Callable[[], bool]
    arrived: Callable[[], int]
    slow: Callable[[], list[SlowCopy]]


def _others(local: LocalAxis) -> list[int]:
    """The peers in the order in which a rank turns to them: all of them to different ones."""
    size = len(local.ranks)
    return [(local.rank + i) % size for i in range(1, size)]


def _flight(exchange: Exchange, result: Callable[[], Tensor]) -> Flight:
    def finish() -> Tensor:
        exchange.finish()
        return result()

    return Flight(finish, exchange.done, lambda: exchange.arrived, exchange.take_slow)


def all_gather(local: LocalAxis, x: Tensor, out: Tensor) -> Flight:
    """x (n, …) → out (size · n, …); x may be this rank's part of out."""
    parts, peers = out.chunk(len(local.ranks)), _others(local)
    mine = parts[local.rank]
    if mine.data_ptr() != x.data_ptr():
        mine.copy_(x)
    exchange = local.exchange("all_gather", [PeerTensor(p, x) for p in peers], [PeerTensor(p, parts[p]) for p in peers])
    return _flight(exchange, lambda: out)


def reduce_scatter(local: LocalAxis, x: Tensor, out: Tensor) -> Flight:
    """x (size · n, …) → out (n, …), which may be this rank's part of x."""
    given, peers = x.chunk(len(local.ranks)), _others(local)
    parts = _parts(local, given[local.rank])
    posts = [PeerTensor(p, given[p]) for p in peers]
    exchange = local.exchange("reduce_scatter", posts, [PeerTensor(p, parts[p]) for p in peers])
    return _flight(exchange, lambda: sum_in_rank_order(parts, out))


def all_reduce(local: LocalAxis, x: Tensor, op: str) -> Flight:
    """x (n, …) in place, for small x: every rank reads all the others'."""
    parts, peers = _parts(local, x), _others(local)
    own = parts[local.rank]
    exchange = local.exchange(
        "all_reduce", [PeerTensor(p, own) for p in peers], [PeerTensor(p, parts[p]) for p in peers]
    )

    def result() -> Tensor:
        if op == "sum":
            return sum_in_rank_order(parts, x)
        return x.copy_(parts.amax(0) if op == "max" else parts.amin(0))

    return _flight(exchange, result)


def all_reduce_in_two(local: LocalAxis, x: Tensor) -> Flight:
    """x (n, …) in place, contiguous, in equal parts: every rank sums one part, then all read the sums. For large x.

    Both steps take their places in the order of the axis's collectives now, and the second follows the first by itself,
    so that neither depends on when which rank waits for it.
    """
    given, peers = x.view(-1).chunk(len(local.ranks)), _others(local)
    mine, parts = given[local.rank], _parts(local, given[local.rank])

    def summed(begun: int) -> None:
        sum_in_rank_order(parts, mine)
        gather.release(begun)

    # A part is overwritten by its sum only after its owner, who made the sum, has read it.
    others = [PeerTensor(p, given[p]) for p in peers]
    gather = local.exchange("all_reduce", [PeerTensor(p, mine) for p in peers], others, held=True)
    scatter = local.exchange("all_reduce", others, [PeerTensor(p, parts[p]) for p in peers], then=summed)

    def finish() -> Tensor:
        scatter.finish()
        gather.finish()
        return x

    return Flight(
        finish,
        lambda: scatter.done() and gather.done(),
        lambda: max(scatter.arrived, gather.arrived),
        lambda: scatter.take_slow() + gather.take_slow(),
    )


def all_to_all(
    local: LocalAxis, x: Tensor, out: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None
) -> Flight:
    """x (rows, …) to all ranks, out (rows, …) from all; `send` and `receive` are rows per rank, none: equal parts."""
    size = len(local.ranks)
    sent = x.split(send or [x.shape[0] // size] * size)
    parts, peers = out.split(receive or [out.shape[0] // size] * size), _others(local)
    parts[local.rank].copy_(sent[local.rank])
    exchange = local.exchange(
        "all_to_all", [PeerTensor(p, sent[p]) for p in peers], [PeerTensor(p, parts[p]) for p in peers]
    )
    return _flight(exchange, lambda: out)


def broadcast(local: LocalAxis, x: Tensor, source: int) -> Flight:
    """x (n, …) in place: that of `source`."""
    if source == local.rank:
        return _flight(local.exchange("broadcast", [PeerTensor(p, x) for p in _others(local)], ()), lambda: x)
    return _flight(local.exchange("broadcast", (), [PeerTensor(source, x)]), lambda: x)


def reduce_blocks(local: LocalAxis, x: Tensor, to: Sequence[int]) -> Flight:
    """Block j of x summed to rank `to[j]`: (n, …) there, (0, …) elsewhere."""
    blocks, reads = x.chunk(len(to)), []
    parts = x.new_empty((0, 0, *x.shape[1:]))
    if local.rank in to:
        parts = _parts(local, blocks[to.index(local.rank)])
        reads = [PeerTensor(p, parts[p]) for p in _others(local)]
    posts = [PeerTensor(p, block) for p, block in zip(to, blocks, strict=True) if p != local.rank]
    exchange = local.exchange("reduce", posts, reads)

    def result() -> Tensor:
        return sum_in_rank_order(parts, torch.empty_like(parts[0])) if reads else parts.view(0, *x.shape[1:])

    return _flight(exchange, result)


def _parts(local: LocalAxis, mine: Tensor) -> Tensor:
    """(size, …) a tensor for each rank's, with this rank's in it."""
    parts = mine.new_empty((len(local.ranks), *mine.shape))
    parts[local.rank].copy_(mine)
    return parts


def send(local: LocalAxis, x: Tensor, to: int) -> Flight:
    """x (n, …), contiguous, to one rank."""
    return _flight(local.send(x, to), lambda: x)


def receive(local: LocalAxis, out: Tensor, source: int) -> Flight:
    """From one rank into `out` (n, …), contiguous."""
    return _flight(local.receive(out, source), lambda: out)


def sum_in_rank_order(parts: Tensor, out: Tensor) -> Tensor:
    """parts (size, n, …) → out (n, …). bf16 is summed in fp32."""
    if parts.shape[0] == 2:
        return torch.add(parts[0], parts[1], out=out)
    return torch.sum(parts, dim=0, out=out)
