"""What dispatchers really do, read from the record: how often, how much, and in which order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pentad.parallel.comm.mesh import Mesh
from pentad.parallel.expert.dispatch import AllToAll
from pentad.parallel.expert.gather import AllGather
from pentad.parallel.expert.routing import Findings, Routing
from pentad.parallel.grouped_projection import Groups
from pentad.parallel.record import reader
from pentad.parallel.record.ring import Recorder
from tests.distributed import run_distributed
from tests.parallel.expert.world import E, H, K, N, Tokens, open_mesh, tokens_of
from tests.rows import without_copies

pytestmark = pytest.mark.distributed
CHUNKS = 3


class _Spanned(torch.autograd.Function):
    """Compute that can be seen in the record, forward and backward."""

    @staticmethod
    def forward(ctx, x: Tensor, recorder: Recorder, name: str) -> Tensor:
        ctx.recorder, ctx.name = recorder, name
        with recorder.span(recorder.intern(name)):
            return x * 2

    @staticmethod
    def backward(ctx, dy: Tensor):  # type: ignore[override]
        with ctx.recorder.span(ctx.recorder.intern(ctx.name + " backward")):
            return dy * 2, None, None


Job = tuple[Any, str, dict[str, Any]]


def _layer(mesh: Mesh, tokens: Tokens, kind: Any, options: dict[str, Any]) -> None:
    """Forward and backward of one layer of experts."""
    dispatcher = kind(E, mesh.axis("ep"), mesh.axis("etp"), weigh_before=options.get("before", False))
    dispatcher.chunks = options.get("chunks", 1)
    recorder, findings = mesh.recorder, Findings()

    def layer(x: Tensor) -> Tensor:
        routing = Routing(tokens.ids, tokens.weights, options.get("capacity"), findings)

        def experts(rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
            assert sum(groups.counts) == len(rows)
            return _Spanned.apply(rows, recorder, "experts").sin()

        y, beside = dispatcher(x, routing, experts, lambda: _Spanned.apply(x, recorder, "beside"))
        return y + beside

    x = tokens.x.requires_grad_()
    y = checkpoint(layer, x, use_reentrant=False) if options.get("again") else layer(x)
    assert isinstance(y, Tensor)
    y.backward(tokens.dy)


def _work(rank: int, world: int, path: str, etp: int, jobs: list[Job]) -> list[list[tuple[str, str, int]]]:
    file = Path(path) / f"{rank}.ring"
    mesh = open_mesh(rank, world // etp, etp, Recorder(file, rank=rank, world=world, entries=1024))
    begun = []
    for kind, ids, options in jobs:
        begun.append(reader.read(file).header.next_ticket)
        _layer(mesh, tokens_of(rank, ids), kind, options)
    mesh.close()
    ring = reader.read(file)
    assert not len(ring.open())
    ends, entries = [*begun[1:], ring.header.next_ticket], without_copies(ring)
    return [
        [(ring.name(e["kind"]), ring.name(e["dtype"]), int(e["nbytes"])) for e in entries if a <= e["ticket"] < b]
        for a, b in zip(begun, ends, strict=True)
    ]


def _run(path: Path, etp: int, *jobs: Job) -> list[list[list[tuple[str, str, int]]]]:
    """(kind, dtype, bytes) of the entries of the record in their order, by rank, by job."""
    return run_distributed(_work, 4, str(path), etp, list(jobs), group=False)


def _rows(entries: list[tuple[str, str, int]]) -> list[str]:
    """The record without the exchange of counts."""
    return [kind for kind, dtype, *_ in entries if dtype != "torch.int64"]


def test_transfers_run_behind_compute(tmp_path):
    """Starts come before the compute that hides them: in forward all dispatches and each result of an earlier chunk,
    in backward the same the other way around."""
    jobs = [(AllToAll, "dropless", {}), (AllToAll, "dropless", {"chunks": CHUNKS})]
    for whole, chunked in _run(tmp_path, 1, *jobs):
        move = "all_to_all"
        forward = [move, "beside", "experts", move]
        backward = [move, "experts backward", move, "beside backward"]
        assert _rows(whole) == forward + backward
        forward = [move] * CHUNKS + ["beside"] + ["experts", move] * CHUNKS
        backward = [move] * CHUNKS + ["experts backward", move] * CHUNKS + ["beside backward"]
        assert _rows(chunked) == forward + backward
        sent = [nbytes for kind, dtype, nbytes in chunked if kind == move and dtype == "torch.float64"][:CHUNKS]
        assert sent == [tokens * K * H * 8 for tokens in (2, 2, 3)]


def test_a_layer_that_runs_again_asks_for_no_counts(tmp_path):
    again = {"again": True}
    jobs = [
        (AllToAll, "dropped", again),
        (AllToAll, "dropped", {"again": True, "chunks": CHUNKS, "before": True}),
        (AllGather, "dropped", again),
        (AllToAll, "dropped", {"again": True, "capacity": N}),
    ]
    for rank in _run(tmp_path, 2, *jobs):
        counts = [[kind for kind, dtype, _ in entries if dtype == "torch.int64"] for entries in rank]
        exchange = ["all_to_all", "all_gather"]
        assert counts == [exchange, exchange, ["all_gather", "all_gather"], []]
        assert [_rows(entries).count("experts") for entries in rank] == [2, 2 * CHUNKS, 2, 2]


def test_bytes_are_those_of_the_formula(tmp_path):
    """fp64, both directions, forward and backward; a collective's bytes are those of its larger side."""
    jobs = [
        (AllToAll, "dropless", {}),
        (AllToAll, "dropped", {"chunks": CHUNKS}),
        (AllToAll, "one rank sends nothing", {"before": True}),
        (AllToAll, "nothing", {"capacity": 5}),
        (AllGather, "dropless", {}),
    ]
    ranks = _run(tmp_path, 1, *jobs)

    def moved(job: int) -> int:
        return sum(nbytes for rank in ranks for _, dtype, nbytes in rank[job] if dtype == "torch.float64")

    row, world = 8 * H, 4
    sent = [sum(int((tokens_of(r, ids).ids >= 0).sum()) for r in range(world)) for _, ids, _ in jobs]
    assert moved(0) == 4 * sent[0] * row == 4 * world * N * K * row
    assert moved(1) == 4 * sent[1] * row
    # The weights travel along, one number a row; they want no gradient here.
    assert moved(2) == 4 * sent[2] * row + sent[2] * 8
    assert moved(3) == 4 * world * E * 5 * row
    # Tokens are gathered, their K results come back; in backward the gradients of K, and of K.
    assert moved(4) == world * world * N * row * (1 + 3 * K)
