"""Dispatchers against a loop over tokens, and against each other bit for bit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.configs.schema import MoeConfig
from pentad.parallel.comm.mesh import Axis, Degrees, Mesh
from pentad.parallel.expert import dispatch, plan
from pentad.parallel.expert.dispatch import AllToAll
from pentad.parallel.expert.gather import AllGather
from pentad.parallel.expert.make import make_dispatcher
from pentad.parallel.expert.routing import Routing
from pentad.parallel.gradients import Slot, give_slot, slot_of
from pentad.parallel.grouped_projection import Groups
from pentad.parallel.record.ring import Recorder
from tests.distributed import run_distributed
from tests.parallel.expert.world import IDS, E, K, N, Result, cut, experts_of, loop, open_mesh, tokens_of

CLOSE = 1e-12


@dataclass(frozen=True)
class Case:
    ids: str
    before: bool
    gathers: bool = False
    chunks: int = 1
    pad: bool = False


HOW: tuple[dict[str, Any], ...] = (
    {},
    {"chunks": 3},
    {"gathers": True},
    {"pad": True},
    {"pad": True, "chunks": 2},
    {"pad": True, "chunks": 8},  # more than an expert has rows
)
CASES = [Case(ids, before, **how) for ids in IDS for before in (False, True) for how in HOW]


def _capacity(ids: str, world: int) -> int:
    """The largest number of rows of an expert from any rank."""
    counts = [torch.bincount(tokens_of(r, ids).ids.flatten() + 1, minlength=E + 1)[1:].max() for r in range(world)]
    return max(1, int(max(counts)))


def dispatcher_of(case: Case, mesh: Mesh) -> AllToAll | AllGather:
    axes = (mesh.axis("ep"), mesh.axis("etp"))
    if case.gathers:
        return AllGather(E, *axes, weigh_before=case.before)
    made = AllToAll(E, *axes, weigh_before=case.before)
    made.chunks = case.chunks
    return made


def _case(case: Case, mesh: Mesh, rank: int, world: int) -> Result:
    tokens, experts = tokens_of(rank, case.ids), experts_of(mesh)
    x, weights = tokens.x.requires_grad_(), tokens.weights.requires_grad_()
    routing = Routing(tokens.ids, weights, _capacity(case.ids, world) if case.pad else None)
    y, other = dispatcher_of(case, mesh)(x, routing, experts, lambda: "beside")
    assert other == "beside"
    y.backward(tokens.dy)
    assert x.grad is not None and weights.grad is not None
    grads = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return Result(y.detach(), x.grad, weights.grad, grads)


def _all_cases(rank: int, world: int, ep: int, etp: int) -> dict[Case, Result]:
    mesh = open_mesh(rank, ep, etp)
    try:
        return {case: _case(case, mesh, rank, world) for case in CASES}
    finally:
        mesh.close()


def _expected(name: str, whole: Tensor, ep: int, eps: int, etp: int, etps: int) -> Tensor:
    part = cut(name, whole, ep, eps, etp, etps)
    return torch.zeros_like(part) if name == "down.bias" and etp else part


@pytest.mark.sample(1)
@pytest.mark.distributed
@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (1, 2), (4, 1), (2, 2), (1, 4)])
def test_all_dispatchers_compute_what_a_loop_does(ep: int, etp: int):
    world = ep * etp
    ranks = run_distributed(_all_cases, world, ep, etp, group=False)
    for ids in IDS:
        expected, whole = loop([tokens_of(rank, ids) for rank in range(world)])
        for rank, results in enumerate(ranks):
            for case in (case for case in CASES if case.ids == ids):
                got, want = results[case], expected[rank]
                want.params = {
                    name: _expected(name, grad, rank // etp, ep, rank % etp, etp) for name, grad in whole.items()
                }
                assert got.params.keys() == want.params.keys()
                for mine, theirs in zip(got.tensors(), want.tensors(), strict=True):
                    torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE, msg=f"{case} on rank {rank}")
                if case.gathers:
                    for mine, theirs in zip(got.tensors(), results[Case(ids, case.before)].tensors(), strict=True):
                        assert torch.equal(mine, theirs), f"{case} on rank {rank}"


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("ids", IDS)
def test_one_gpu_needs_no_numbers_of_rows(ids: str, before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: rows of nobody stand behind those of the experts, with whatever was in their memory."""

    def planned(ids: Tensor, experts: int, ep: Axis, etp: Axis, chunks: int, sort: plan.SortByExpert) -> plan.RowPlan:
        return plan._on_one_device(ids, experts, sort)

    def empty(x: Tensor, *shape: int) -> Tensor:
        return torch.full(shape, float("nan"), dtype=x.dtype)

    monkeypatch.setattr(dispatch, "by_count", planned)
    monkeypatch.setattr(Tensor, "new_empty", empty)
    expected, whole = loop([tokens_of(0, ids)])
    mesh = Mesh(Degrees(), store=None, rank=0, device="cpu", recorder=Recorder(None, rank=0, world=1, entries=512))
    got = _case(Case(ids, before), mesh, 0, 1)
    mesh.close()
    expected[0].params = whole
    for mine, theirs in zip(got.tensors(), expected[0].tensors(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=CLOSE, atol=CLOSE)


def test_one_device_needs_no_mesh():
    tokens = tokens_of(0, "dropped")
    alone = Axis.single("x")
    dispatcher = make_dispatcher(MoeConfig(experts=E, top_k=K, overlap_chunks=2), alone, alone)
    y, _ = dispatcher(
        tokens.x, Routing(tokens.ids, tokens.weights), lambda rows, groups, weights: rows * 2, lambda: None
    )
    torch.testing.assert_close(y, 2 * tokens.x * tokens.weights.sum(1, keepdim=True))


@pytest.mark.parametrize("capacity", [None, N])
def test_chunks_change_no_bit_of_the_result(capacity: int | None):
    """With experts that treat rows alike however many there are."""
    tokens, alone = tokens_of(0, "dropped"), Axis.single("x")

    def experts(rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        factors = torch.repeat_interleave(torch.arange(E) + 0.1, torch.tensor(groups.counts))
        return (rows * factors.unsqueeze(1)).sin()

    dispatcher, results = AllToAll(E, alone, alone), []
    for chunks in (1, 2, 3, 8):
        dispatcher.chunks = chunks
        x = tokens.x.clone().requires_grad_()
        y, _ = dispatcher(x, Routing(tokens.ids, tokens.weights, capacity), experts, lambda: None)
        results.append((y.detach(), *torch.autograd.grad(y, x, tokens.dy)))
    for y, dx in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(dx, results[0][1])


def test_what_exceeds_the_capacity_goes_nowhere():
    """By position: later tokens of expert 5 have no row."""
    tokens, alone = tokens_of(0, "one expert"), Axis.single("x")
    seen = []

    def experts(rows: Tensor, groups: object, weights: object) -> Tensor:
        seen.append(len(rows))
        return rows

    y, _ = AllToAll(E, alone, alone)(tokens.x, Routing(tokens.ids, tokens.weights, 4), experts, lambda: None)
    whole = tokens.x * tokens.weights.sum(1, keepdim=True)
    torch.testing.assert_close(y[:4], whole[:4])
    assert seen == [E * 4]
    assert not y[4:].any()


def _slots(rank: int, world: int) -> list[tuple[str, int, float]]:
    """Which slots became final, and what is in them, when no token goes anywhere."""
    mesh = open_mesh(rank, 2, 1)
    final: list[str] = []
    tokens, experts = tokens_of(rank, "nothing"), experts_of(mesh)
    for name, param in experts.named_parameters():
        slot = Slot(torch.full_like(param, torch.nan), lambda name=name: final.append(name))
        slot.uses = 2
        slot.start_step(1)
        give_slot(param, slot)
    dispatcher = AllToAll(E, mesh.axis("ep"), mesh.axis("etp"))
    dispatcher.chunks = 2
    y, _ = dispatcher(tokens.x.requires_grad_(), Routing(tokens.ids, tokens.weights), experts, lambda: None)
    y.backward(tokens.dy)
    mesh.close()
    slots = {name: slot_of(param) for name, param in experts.named_parameters()}
    return [(n, final.count(n), float(slot.buffer.abs().sum())) for n, slot in slots.items() if slot is not None]


@pytest.mark.distributed
def test_gradients_become_final_without_tokens():
    for slots in run_distributed(_slots, 2, group=False):
        assert [(count, value) for _, count, value in slots] == [(1, 0.0)] * 6


def test_an_impossible_dispatcher_names_the_key():
    alone = Axis.single("x")
    with pytest.raises(UserError) as error:
        make_dispatcher(MoeConfig(experts=E, dispatcher="deepep"), replace(alone, size=2, ranks=(0, 1)), alone)
    assert error.value.problems[0].key == "model.moe.dispatcher"


def test_a_rank_with_all_experts_needs_no_deepep():
    alone = Axis.single("x")
    assert isinstance(make_dispatcher(MoeConfig(experts=E, dispatcher="deepep"), alone, alone), AllToAll)


def test_an_unknown_dispatcher_is_no_other_one():
    alone = Axis.single("ep")
    with pytest.raises(ValueError, match="'all2all'"):
        make_dispatcher(MoeConfig(experts=E, dispatcher="all2all"), alone, alone)  # type: ignore[arg-type]
