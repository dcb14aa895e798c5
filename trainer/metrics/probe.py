"""Products and links of all ranks, tried out before a job trains, and who falls short."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ...parallel.comm.collectives import all_gather
from ...parallel.comm.link_probe import link_times
from ...parallel.comm.mesh import Mesh
from .products import Product, ceiling_tflops

_SMALL, _LARGE = 64 << 10, 8 << 20
"""Bytes of a message that tells the delay, and of one that tells the rate."""
_SLOW_PRODUCTS = 0.9
"""Share of the median rate below which a rank falls short."""
_SLOW_LINKS = 1.5
"""Times of the median delay from which on a link, or all links of a rank, fall short (C4D's first threshold)."""
_MEASURED = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class Probe:
    """What was found.

    Args:
        tflops: of each rank in square products, all at once.
        delay_us: the median over each rank's links of a message of 64 KiB; none for one rank.
        gb_s: the same of its rate in one of 8 MiB.
        slow: a line for each rank or link that falls short.
    """

    tflops: tuple[float, ...]
    delay_us: tuple[float, ...]
    gb_s: tuple[float, ...]
    slow: tuple[str, ...]

    @property
    def event(self) -> dict[str, object]:
        """For events.jsonl."""
        return {key: list(value) for key, value in asdict(self).items()}


def probe(mesh: Mesh, device: torch.device, dtype: torch.dtype, hosts: Mapping[int, str]) -> Probe:
    """Tries out all ranks, which call this together.

    Args:
        mesh: of the job.
        device, dtype: of the rank, and what it trains in.
        hosts: where each rank is.
    """
    world, size = mesh.axis("world"), _MEASURED[device.type]
    own = ceiling_tflops([Product(size, size, size, 1.0)], device, dtype, seconds=0.2, barrier=mesh.barrier)
    rates = all_gather(torch.tensor([own], dtype=torch.float64, device=device), world).wait().cpu().numpy()
    small, large = (link_times(world, device, nbytes).numpy() for nbytes in (_SMALL, _LARGE))
    return judge(rates, small, large, hosts)


def judge(rates: np.ndarray, small: np.ndarray, large: np.ndarray, hosts: Mapping[int, str]) -> Probe:
    """What measurements say.

    Args:
        rates: (ranks,) TFLOP/s.
        small, large: (ranks, ranks) seconds of a message from rank to rank.
        hosts: where each rank is.
    """
    middle = np.median(rates)
    slow = [
        f"rank {rank}{_at(hosts, rank)} multiplies at {rates[rank]:.3g} TFLOP/s, the median rank at {middle:.3g}"
        for rank in np.flatnonzero(rates < _SLOW_PRODUCTS * middle).tolist()
    ]
    for times, what in ((small, "64 KiB"), (large, "8 MiB")):
        slow += _slow_links(times, what, hosts)
    many = len(rates) > 1
    return Probe(
        tuple(float(rate) for rate in rates),
        tuple(1e6 * each for each in _per_rank(small)) if many else (),
        tuple(_LARGE / 1e9 / each for each in _per_rank(large)) if many else (),
        tuple(slow),
    )


def _per_rank(times: np.ndarray) -> list[float]:
    """The median over each rank's links to others."""
    return [float(np.median(np.delete(row, rank))) for rank, row in enumerate(times)]


def _slow_links(times: np.ndarray, what: str, hosts: Mapping[int, str]) -> list[str]:
    """A rank all of whose links are slow, else a link that is. Links within a node and between nodes are compared with
    their like."""
    count, found = len(times), []
    same = np.array([[hosts.get(a) == hosts.get(b) for b in range(count)] for a in range(count)])
    for kind, words in ((same, "within its node"), (~same, "between nodes")):
        links = kind & ~np.eye(count, dtype=bool)
        if links.sum() < 4:
            continue
        typical = float(np.median(times[links]))
        of_rank = [
            float(np.median(row[mine])) if mine.any() else math.nan for row, mine in zip(times, links, strict=True)
        ]
        bad = [rank for rank in range(count) if of_rank[rank] >= _SLOW_LINKS * typical]
        found += [
            f"rank {rank}{_at(hosts, rank)} takes {1e6 * of_rank[rank]:.0f} µs for {what} {words}, the median is "
            f"{1e6 * typical:.0f} µs"
            for rank in bad
        ]
        for a, b in zip(*np.nonzero(links & (times >= _SLOW_LINKS * typical)), strict=True):
            if a < b and a not in bad and b not in bad:
                found.append(
                    f"ranks {a}{_at(hosts, a)} and {b}{_at(hosts, b)} take {1e6 * times[a, b]:.0f} µs for {what}, the "
                    f"median is {1e6 * typical:.0f} µs"
                )
    return found


def _at(hosts: Mapping[int, str], rank: int) -> str:
    return f" on {hosts[rank]}" if rank in hosts else ""


def probe_lines(found: Probe) -> list[str]:
    """For people."""
    low, middle, high = (f"{value:.3g}" for value in np.quantile(found.tflops, (0, 0.5, 1)))
    lines = [f"probe    {len(found.tflops)} ranks, products {low} to {high} TFLOP/s each, median {middle}"]
    if found.delay_us:
        low, high = min(found.delay_us), max(found.delay_us)
        slowest, fastest = min(found.gb_s), max(found.gb_s)
        lines.append(f"         64 KiB in {low:.0f} to {high:.0f} µs, 8 MiB at {slowest:.3g} to {fastest:.3g} GB/s")
    return [*lines, *(f"warning: {line}" for line in found.slow)]
