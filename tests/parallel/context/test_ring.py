"""Ring and TokenRing against the plain maths of whole sequences, and what they send."""

from __future__ import annotations

import gc
from dataclasses import replace

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.parallel.comm.mesh import Axis, Mesh
from pentad.parallel.context.ring import Ring
from pentad.parallel.context.ring_plan import RingPlans, RowSelection
from pentad.parallel.context.tokenring import TokenRing
from pentad.parallel.kernels.blockwise import Blockwise
from pentad.parallel.kernels.mask import Mask, TokenIndex
from pentad.parallel.kernels.plain_maths import PlainMaths
from pentad.parallel.record import reader
from tests.distributed import run_distributed
from tests.parallel.context.cases import CASES, MANY, Case, attend, check, layout, on_ranks, sent_bytes

DOUBLE = 8
WORLDS = [2, 4, pytest.param(8, marks=pytest.mark.slow)]
BOTH_WAYS = tuple(case for case in CASES if case.kv_heads > 1)
BF16 = Case("bf16", heads=8, kv_heads=2, documents=MANY, sinks=True, dtype=torch.bfloat16)


def one_way(mesh: Mesh) -> Ring:
    return Ring(mesh.axis("cp"), mesh.axis("cp_back"), PlainMaths())


def both_ways(mesh: Mesh) -> Ring:
    return Ring(mesh.axis("cp"), mesh.axis("cp_back"), Blockwise(), duplex=True)


def over_one_gloo_axis(mesh: Mesh) -> Ring:
    axis = replace(mesh.axis("cp"), local=None)
    return Ring(axis, axis, PlainMaths(), duplex=True)


def queries_over_gloo(mesh: Mesh) -> TokenRing:
    axis = replace(mesh.axis("cp"), local=None)
    return TokenRing(axis, axis, PlainMaths())


def queries(mesh: Mesh) -> TokenRing:
    return TokenRing(mesh.axis("cp"), mesh.axis("cp_back"), Blockwise())


def traffic(case: Case, world: int, rank: int, *, keys: bool, sign: int = -1) -> tuple[int, int, int]:
    """Rows that a rank sends, per sequence: keys, or queries, toward lower ranks (`sign`); gradients of keys, onward
    and home; and queries for which it sends something home."""
    ranks = layout(case, world).ranks
    moved = followed = used = 0
    for owner in range(world):
        route = []
        for step in range(1, world):
            place = (owner + sign * step) % world
            sides = (ranks[place], ranks[owner]) if keys else (ranks[owner], ranks[place])
            needed = Mask(*sides, case.window).dense(torch.device("cpu"))[:, 0].any(1 if keys else 2)
            if needed.any():
                route.append((place, needed.expand(case.batch, -1)))
        union = [torch.stack([needed for _, needed in route[i:]]).any(0) for i in range(len(route))]
        for index, (place, needed) in enumerate(route):
            before = route[index - 1][0] if index else owner
            moved += int(union[index].sum(1).max()) * (before == rank)
            if place == rank:
                used += int(needed.sum(1).max())
                later = union[index + 1] if index + 1 < len(route) else torch.zeros_like(needed)
                followed += int(later.sum(1).max()) + int((union[index] & ~later).sum(1).max())
    return moved, followed, used


def ring_bytes(case: Case, world: int, rank: int, sign: int = -1) -> int:
    """Keys and values twice, their gradients once."""
    moved, followed, _ = traffic(case, world, rank, keys=True, sign=sign)
    return (2 * moved + followed) * case.batch * case.kv_heads * (case.key + case.value) * DOUBLE


def tokenring_bytes(case: Case, world: int, rank: int) -> int:
    """Forward: q, back come out and lse. Backward: q, dout, lse and Δ, back comes dq."""
    moved, _, used = traffic(case, world, rank, keys=False)
    going, coming = 2 * case.key + case.value + 2, case.value + 1 + case.key
    return (moved * going + used * coming) * case.batch * case.heads * DOUBLE


@pytest.mark.distributed
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("make", "expected"), [(one_way, ring_bytes), (queries, tokenring_bytes)])
def test_around(world, make, expected, tmp_path):
    ranks = run_distributed(on_ranks, world, make, CASES, tmp_path, group=False)
    for step, case in enumerate(CASES):
        check(case, [found[step] for found in ranks])
        for rank in range(world):
            assert sent_bytes(tmp_path, rank, {}, step) == expected(case, world, rank), (case.name, rank)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_zigzag_saves_a_quarter(world):
    """Half of a block stays behind at the wrap-around."""
    case, block = Case("one document", batch=1), 48 // world
    for rank in range(world):
        moved, followed, _ = traffic(case, world, rank, keys=True)
        assert moved == block * ((world - rank) + (rank - 1) / 2 if rank else (world - 1) / 2)
        assert followed == block * (world - 1 - rank + rank / 2)
        assert traffic(case, world, rank, keys=False)[0] == moved
    total = sum(traffic(case, world, rank, keys=True)[0] for rank in range(world))
    assert total == 0.75 * world * (world - 1) * block


@pytest.mark.parametrize("world", [2, 4, 8])
def test_documents_on_one_rank_do_not_travel(world):
    """Documents that fill a quarter of a rank each stay where they are; zigzag sends most of their keys around."""
    case = Case("short", batch=1, length=64 * world, documents=((16,) * 4 * world,))
    rows = {}
    for dealing in ("by_length", "zigzag"):
        dealt = replace(case, dealing=dealing)
        rows[dealing] = sum(traffic(dealt, world, rank, keys=True)[0] for rank in range(world))
    assert rows["by_length"] == 0 < rows["zigzag"]


@pytest.mark.parametrize("world", [2, 4, 8])
def test_contiguous_sends_nothing_in_vain(world):
    """Rank z's keys go to the world − 1 − z ranks after it; with a window of a block, to the next one."""
    block = 48 // world
    for window, hops in ((None, world * (world - 1) // 2 * block), (block, (world - 1) * (block - 1))):
        case = Case("runs", batch=1, dealing="contiguous", window=window)
        assert sum(traffic(case, world, rank, keys=True)[0] for rank in range(world)) == hops


def sent_by_axis(folder, rank: int, step: int) -> dict[str, int]:
    ring = reader.read(folder / str(rank))
    found: dict[str, int] = {}
    for entry in ring.entries:
        if int(entry["step"]) == step and ring.name(entry["kind"]) == "send":
            axis = ring.name(entry["axis"])
            found[axis] = found.get(axis, 0) + int(entry["nbytes"])
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("world", WORLDS)
def test_both_directions(world, tmp_path):
    ranks = run_distributed(on_ranks, world, both_ways, BOTH_WAYS, tmp_path, group=False)
    for step, case in enumerate(BOTH_WAYS):
        check(case, [found[step] for found in ranks])
        assert case.kv_heads % 2 == 0
        for rank in range(world):
            sent = sent_by_axis(tmp_path, rank, step)
            halves = [ring_bytes(case, world, rank, sign) // 2 for sign in (-1, 1)]
            assert sum(sent.values()) == sum(halves), (case.name, rank)
            if case.dealing == "zigzag":
                # All but some of the gradients goes with the stream.
                assert sent["cp"] > halves[0] // 2
                assert sent["cp_back"] > halves[1] // 2


@pytest.mark.distributed
@pytest.mark.parametrize("make", [over_one_gloo_axis, queries_over_gloo])
def test_one_gloo_axis(make):
    ranks = run_distributed(on_ranks, 3, make, BOTH_WAYS[4:7], None, group=False)
    for step, case in enumerate(BOTH_WAYS[4:7]):
        check(case, [found[step] for found in ranks])


@pytest.mark.distributed
@pytest.mark.parametrize("make", [both_ways, queries])
def test_bf16(make, tmp_path):
    ranks = run_distributed(on_ranks, 4, make, (BF16,), tmp_path, group=False)
    check(BF16, [found[0] for found in ranks], tolerance=0.08)
    assert all(x.dtype == torch.bfloat16 for found in ranks for x in found[0])
    # Gradients under way are fp32.
    ring = reader.read(tmp_path / "1")
    kinds = {ring.name(entry["dtype"]) for entry in ring.entries if ring.name(entry["kind"]) == "send"}
    assert "torch.float32" in kinds


def test_one_head_has_no_two_directions():
    axis, case = Axis("cp", 0, 2, (0, 1)), CASES[2]
    with pytest.raises(UserError, match=r"parallel\.context\.duplex"):
        attend(case, Ring(axis, axis, PlainMaths(), duplex=True), 2, 0)


@pytest.mark.parametrize("make", [Ring, TokenRing])
def test_one_rank_alone(make):
    single = Axis.single("cp")
    for case in CASES:
        check(case, [attend(case, make(single, single, PlainMaths()), 1, 0)])


def test_plans_live_as_long_as_their_dealing_out():
    tables = RingPlans(down=True, keys=True)
    dealt = layout(CASES[0], 4, 1)
    assert tables.of(dealt, None) is tables.of(dealt, None)
    assert tables.of(dealt, 7) is not tables.of(dealt, None)
    del dealt
    gc.collect()
    assert not tables._known


def test_choices_differ_between_sequences():
    chosen = torch.tensor([[True, False, True, True], [False, True, False, False]])
    choice = RowSelection.of(chosen)
    rows = choice.rows(TokenIndex(torch.tensor([[0, 3, 5, 9]])))
    assert rows.order[0].tolist() == [0, 5, 9]
    assert rows.order[1, 0] == 3
    assert (rows.order[1, 1:] > 1 << 60).all()
    x = torch.arange(8.0).view(2, 4, 1)
    part = choice.take(x)
    assert part[0].flatten().tolist() == [0, 2, 3]
    assert part[1, 0].item() == 5
    choice.put(x, torch.full_like(part, 10), add=True)
    assert x.flatten().tolist() == [10, 1, 12, 13, 4, 15, 6, 7]
