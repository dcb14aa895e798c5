"""All-Scan: several ranks with a part of the sequences each, against one with all of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pentad.models.linear_attention import gated_linear_attention
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.context.all_scan import AllScan
from pentad.parallel.context.layout import contiguous
from pentad.parallel.record import reader
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store, run_distributed

BATCH, LENGTH, HEADS, KEY, VALUE, CHUNK = 2, 48, 3, 6, 5, 8


def inputs() -> list[Tensor]:
    """q, k, v, g and the gradient of the output, whole sequences."""
    draws = torch.Generator().manual_seed(5)
    widths = (KEY, KEY, VALUE, KEY, VALUE)
    found = [torch.randn(BATCH, LENGTH, HEADS, d, generator=draws, dtype=torch.float64) for d in widths]
    found[3] = found[3].abs().mul_(-0.05)
    return found


def documents_of(kind: str) -> Tensor | None:
    """one: no documents; border: they begin where ranks' parts do, or one token beside; many: anywhere, also twice."""
    if kind == "one":
        return None
    begins = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    if kind == "border":
        begins[0, [LENGTH // 2, LENGTH // 4 + 1]] = 1
        begins[1, [LENGTH // 4, LENGTH // 2 - 1, LENGTH // 2 + 1]] = 1
    else:
        begins[:, 1:] = torch.rand(BATCH, LENGTH - 1, generator=torch.Generator().manual_seed(2)) < 0.3
        begins[1, 20:] = 0
    return begins.cumsum(1)


def gradients(
    tensors: list[Tensor], documents: Tensor | None, joined: Tensor | None = None, **settings
) -> list[Tensor]:
    """The output and the gradients of q, k, v and g."""
    *leaves, dout = (x.clone() for x in tensors)
    q, k, v, g = leaves = [x.requires_grad_() for x in leaves]
    out = gated_linear_attention(q, k, v, g, documents, joined, chunk=CHUNK, **settings)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def scanned(
    rank: int, world: int, record: Path | None, kind: str, blocks: int, repeats: int, in_memory: bool
) -> list[Tensor]:
    recorder = Recorder(record and record / str(rank), rank=rank, world=world, entries=1024)
    mesh = Mesh(Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=60)
    cp = mesh.axis("cp") if in_memory else replace(mesh.axis("cp"), local=None)
    scan = AllScan(cp, cp, "cpu", blocks=blocks)
    layout = contiguous(LENGTH, world, rank, documents_of(kind))
    tensors = [x.chunk(world, 1)[rank] for x in inputs()]
    found = []
    for _ in range(repeats):
        found = gradients(tensors, layout.mine.documents, layout.joined, neighbours=scan)
    scan.close()
    mesh.close()
    return found


def sent_bytes(record: Path, rank: int) -> int:
    ring = reader.read(record / str(rank))
    return sum(int(e["nbytes"]) for e in ring.entries if ring.name(e["kind"]) == "send")


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize(("kind", "blocks"), [("one", 4), ("border", 1), ("many", 100)])
def test_equals_one_device(world, kind, blocks, tmp_path):
    ranks = run_distributed(scanned, world, tmp_path, kind, blocks, 1, True, group=False)
    expected = gradients(inputs(), documents_of(kind))
    for mine, theirs in zip(zip(*ranks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(mine, 1), theirs, rtol=1e-12, atol=1e-12)
    state = BATCH * HEADS * KEY * VALUE * 8
    sent = [sent_bytes(tmp_path, rank) for rank in range(world)]
    # One state forward, except from the last rank, and one back, except from the first one: whatever the number.
    assert sent == [state, *[2 * state] * (world - 2), state]


@pytest.mark.distributed
def test_over_sockets_and_many_times():
    ranks = run_distributed(scanned, 4, None, "many", 3, 20, False, group=False)
    expected = gradients(inputs(), documents_of("many"))
    for mine, theirs in zip(zip(*ranks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(mine, 1), theirs, rtol=1e-12, atol=1e-12)
