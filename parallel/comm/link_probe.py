"""How fast every rank of an axis sends to every other one, two by two."""

from __future__ import annotations

import time

import torch

from .collectives import all_gather, receive, send
from .mesh import Axis

_REPEATS = 5


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """All pairs of so many ranks in rounds of disjoint ones (a round-robin tournament)."""
    places: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    found = []
    for _ in range(len(places) - 1):
        half = len(places) // 2
        facing = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def link_times(axis: Axis, device: torch.device, nbytes: int) -> torch.Tensor:
    """(ranks, ranks) seconds of a message from each rank to each other one and back, halved: the median of five. All
    ranks call this together; while a pair is measured, so are others that share no rank with it.

    Args:
        axis: whose ranks.
        device: of the messages.
        nbytes: of a message.
    """
    mine = torch.zeros(axis.size, dtype=torch.float64, device=device)
    out, back = (torch.zeros(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    for pairs in rounds(axis.size):
        pair = next((pair for pair in pairs if axis.rank in pair), None)
        if pair is not None:
            peer = pair[1] if axis.rank == pair[0] else pair[0]
            times = sorted(_there_and_back(axis, peer, out, back) for _ in range(_REPEATS + 1))
            mine[peer] = times[len(times) // 2] / 2
    return all_gather(mine, axis).wait().view(axis.size, axis.size).cpu()


def _there_and_back(axis: Axis, peer: int, out: torch.Tensor, back: torch.Tensor) -> float:
    _done(out.device)
    begin = time.perf_counter()
    if axis.rank < peer:
        send(out, axis, peer).wait()
        receive(back, axis, peer).wait()
    else:
        receive(back, axis, peer).wait()
        send(out, axis, peer).wait()
    _done(out.device)
    return time.perf_counter() - begin


def _done(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
