"""Gathered latents against one device that expands its keys and values before attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pentad.parallel.comm.mesh import Axis, Degrees, Mesh
from pentad.parallel.context.gather import GatherKeysValues, GatherLatent
from pentad.parallel.kernels.interfaces import AttentionCall
from pentad.parallel.kernels.mask import TokenLayout
from pentad.parallel.kernels.plain_maths import PlainMaths
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store, run_distributed
from tests.parallel.context.cases import CASES, Case, documents, layout, put_together, sent_bytes, take

NARROW, STILL, TURNING, VALUE = 5, 4, 2, 3
LATENT_CASES = [case for case in CASES if not case.sinks and case.key == case.value]


def _inputs(case: Case) -> tuple[nn.Linear, list[Tensor], Tensor]:
    """What expands; queries, latents and rotary keys of whole sequences; the output's gradient. Equal on every rank."""
    draws = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    up = nn.Linear(NARROW, case.heads * (STILL + VALUE), bias=False).double()
    up.weight.data.copy_(normal(*up.weight.shape))
    sizes = case.batch, case.length
    given = [normal(*sizes, case.heads, STILL + TURNING), normal(*sizes, NARROW), normal(*sizes, TURNING)]
    return up, given, normal(*sizes, case.heads, VALUE)


def _keys_values(expanded: Tensor, turning: Tensor) -> tuple[Tensor, Tensor]:
    still, values = expanded.view(*turning.shape[:2], -1, STILL + VALUE).split((STILL, VALUE), -1)
    return torch.cat((still, turning[:, :, None].expand(-1, -1, still.shape[2], -1)), -1), values


def _expected(case: Case) -> list[Tensor]:
    up, given, dout = _inputs(case)
    q, latent, turning = (x.requires_grad_() for x in given)
    core, whole = GatherKeysValues(Axis.single("cp"), PlainMaths()), TokenLayout.whole(case.length, documents(case))
    out = core(q, *_keys_values(up(latent), turning), AttentionCall(whole, case.window, case.scale))
    return [out.detach(), *torch.autograd.grad(out, (q, latent, turning, up.weight), dout)]


def _attend(case: Case, core: GatherLatent, ranks: int, rank: int) -> tuple[list[Tensor], int]:
    """out, the gradients, and the bytes that are kept for backward."""
    up, given, dout = _inputs(case)
    dealt = layout(case, ranks, rank)
    q, latent, turning = (take(x, dealt.mine).requires_grad_() for x in given)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = core(q, latent.flatten(0, 1), turning, up, _keys_values, AttentionCall(dealt, case.window, case.scale))
    out.backward(take(dout, dealt.mine))
    assert q.grad is not None and latent.grad is not None and turning.grad is not None and up.weight.grad is not None
    return [out.detach(), q.grad, latent.grad, turning.grad, up.weight.grad], sum(kept.values())


def _on_ranks(rank: int, world: int, cases: Sequence[Case], record: Path) -> list[tuple[list[Tensor], int]]:
    recorder = Recorder(record / str(rank), rank=rank, world=world, entries=1024)
    mesh = Mesh(Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder, timeout_s=60)
    core = GatherLatent(mesh.axis("cp"), PlainMaths())
    found = []
    for recorder.step, case in enumerate(cases):
        found.append(_attend(case, core, world, rank))
    mesh.close()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_equals_one_device(world, tmp_path):
    ranks = run_distributed(_on_ranks, world, LATENT_CASES, tmp_path, group=False)
    assert len(LATENT_CASES) >= 8
    for step, case in enumerate(LATENT_CASES):
        dealt = layout(case, world)
        for place, expected in enumerate(_expected(case)):
            parts = [found[step][0][place] for found in ranks]
            mine = torch.stack(parts).sum(0) if place == 4 else put_together(parts, dealt)
            torch.testing.assert_close(mine, expected, rtol=1e-11, atol=1e-11, msg=f"{case.name}, {place}")


@pytest.mark.distributed
def test_sends_and_keeps_what_is_narrow(tmp_path):
    case = LATENT_CASES[0]
    tokens = case.batch * case.length // 4
    for rank, found in enumerate(run_distributed(_on_ranks, 4, [case], tmp_path, group=False)):
        assert sent_bytes(tmp_path, rank, {"cp": 4}) == 3 * 3 * tokens * (NARROW + TURNING) * 8
        kept = case.heads * (STILL + TURNING + VALUE + 1) + NARROW + TURNING  # q, out and lse; latent and rotary key
        assert found[0][1] == tokens * kept * 8
