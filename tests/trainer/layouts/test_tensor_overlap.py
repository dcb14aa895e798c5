"""Collectives that travel in pieces beside the products of tensor parallelism train as those that do not."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from pentad.configs.schema import MlaConfig, MoeConfig
from pentad.parallel.comm import collectives
from pentad.parallel.comm.shared_memory_collectives import Flight
from pentad.parallel.record.reader import read
from pentad.parallel.tensor import PIECES
from tests.distributed import run_distributed
from tests.rows import ring_path, watched
from tests.same_training import check
from tests.training import job

BIASES = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
MLA = {"mla": MlaConfig(kv_rank=16, q_rank=12, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12}
CASES: dict[str, dict[str, Any]] = {
    "two": {"tp": 2, "model": BIASES},
    "four": {"tp": 4, "model": {**BIASES, "kv_heads": 2}},
    "odd pieces": {"tp": 2, "micro_batch": 1, "seq_len": 6},
    "split backward": {"tp": 2, "cp": 2, "pp": 2, "pipeline": {"schedule": "zb-h1"}, "recompute": "selective"},
    "latents": {"tp": 2, "dp": 2, "model": {**MLA, "mtp": 1}, "recompute": "full", "sharding": "zero1"},
    "experts": {"tp": 4, "ep": 2, "etp": 2, "model": {"moe": MoeConfig(experts=4, top_k=2, ffn=32, shared=16)}},
    "fp32": {"tp": 4, "dtype": "fp32", "optim": "sgd", "model": BIASES},
}


@pytest.mark.parametrize("name", CASES)
def test_layouts(name: str) -> None:
    check(**{"steps": 4, "overlap": "gemm", **CASES[name]})


LARGE = {"layers": 2, "hidden": 512, "ffn": 2048, "heads": 8, "kv_heads": 8, "head_dim": 64, "max_positions": 256}
LATENCY_S = 0.002
Calls = list[tuple[str, int]]
"""Kind and bytes of collectives."""


@contextmanager
def late(exposed: list[float]) -> Iterator[None]:
    """Collectives between this process and others of the host complete `LATENCY_S` after they were launched; adds to
    `exposed` how much of that they were waited for."""

    def slowed(plain: Callable[..., Flight]) -> Callable[..., Flight]:
        def launch(*args: Any) -> Flight:
            due, flight = time.monotonic() + LATENCY_S, plain(*args)

            def finish() -> Tensor:
                exposed.append(max(0.0, due - time.monotonic()))
                time.sleep(exposed[-1])
                return flight.finish()

            return replace(flight, finish=finish)

        return launch

    with ExitStack() as stack:
        for name in ("all_gather", "reduce_scatter", "all_to_all"):
            stack.enter_context(patch.object(collectives.local, name, slowed(getattr(collectives.local, name))))
        yield


def _steps(rank: int, world: int, overlap: str, name: str) -> tuple[float, Calls]:
    """Seconds of latency that were waited for, and the collectives of a step in the record."""
    sizes: dict[str, Any] = {"seq_len": 256, "micro_batch": 4, "global_batch": 4, "dtype": "fp32", "model": LARGE}
    exposed = list[float]()
    with watched(rank, job(tp=world, overlap=overlap, **sizes), name) as made, late(exposed):
        for _ in range(2):
            made.step()
        record = read(ring_path(name, rank))
        tp = [each for each in record.entries if record.name(each["axis"]) == "tp" and each["step"] == 1]
        return sum(exposed), [(record.name(entry["kind"]), int(entry["nbytes"])) for entry in tp]


def _sent(calls: Calls, world: int) -> int:
    """Bytes that a rank sent: of gathers and scatters the record has the whole tensor, of pieces what leaves."""
    shares = {"all_gather": (world - 1) / world, "reduce_scatter": (world - 1) / world, "all_to_all": 1.0}
    return round(sum(shares[kind] * nbytes for kind, nbytes in calls if kind in shares))


def test_the_latency_of_collectives_is_hidden_and_the_bytes_are_the_same() -> None:
    plain, pieces = (run_distributed(_steps, 2, o, uuid.uuid4().hex, group=False)[0] for o in ("none", "gemm"))
    print(f"\nexposed latency {1e3 * plain[0]:.1f} and {1e3 * pieces[0]:.1f} ms")
    assert pieces[0] < 0.4 * plain[0]
    assert _sent(pieces[1], 2) == _sent(plain[1], 2)
    count = {kind: [sum(each == kind for each, _ in calls) for _, calls in (plain, pieces)] for kind, _ in pieces[1]}
    products = 2 * LARGE["layers"]  # attention's and the feed-forward network's, each with a gather and a scatter
    assert count["all_to_all"] == [0, products * PIECES]
    assert count["all_gather"][1] - count["all_gather"][0] == 2 * products * (PIECES - 1)  # forward and backward
