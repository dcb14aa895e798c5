"""AllGather, Ulysses and Usp against the plain maths of whole sequences."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.parallel.comm.mesh import Axis, Degrees, Mesh
from pentad.parallel.context.gather import GatherKeysValues
from pentad.parallel.context.gathered_tokens import GatheredTokens
from pentad.parallel.context.ring import Ring
from pentad.parallel.context.tokenring import TokenRing
from pentad.parallel.context.ulysses import Ulysses, check_heads
from pentad.parallel.context.usp import Usp
from pentad.parallel.kernels.device import local_attention
from pentad.parallel.kernels.interfaces import AttentionCall, Core
from pentad.parallel.kernels.mask import Mask, TokenIndex, TokenLayout
from pentad.parallel.kernels.plain_maths import PlainMaths
from pentad.parallel.record.ring import Recorder
from tests.distributed import job_store, run_distributed
from tests.parallel.context.cases import CASES, Case, attend, check, inputs, layout, on_ranks, saved_bytes, sent_bytes

UNEVEN = (Case("repeated thrice", heads=12, kv_heads=3), Case("repeated twice", heads=12, kv_heads=6, documents=None))
"""Key-value heads that the ranks neither divide nor are a multiple of."""
BF16 = (
    Case("bf16", heads=8, kv_heads=2, dtype=torch.bfloat16),
    Case("bf16 with sinks", heads=8, kv_heads=1, dtype=torch.bfloat16, sinks=True, window=9),
)


def gathered(mesh: Mesh) -> GatherKeysValues:
    return GatherKeysValues(mesh.axis("cp"), local_attention(torch.device("cpu")))


def exchanged(mesh: Mesh) -> Ulysses:
    return Ulysses(mesh.axis("cp"), local_attention(torch.device("cpu")))


def exchanged_in_pieces(mesh: Mesh) -> Ulysses:
    return Ulysses(mesh.axis("cp"), local_attention(torch.device("cpu")), piece_bytes=1500)


def in_two_directions(mesh: Mesh) -> Usp:
    return Usp(mesh.axis("cp_inner"), GatherKeysValues(mesh.axis("cp_outer"), PlainMaths()))


def exchanged_twice(mesh: Mesh) -> Usp:
    return Usp(mesh.axis("cp_inner"), Ulysses(mesh.axis("cp_outer"), PlainMaths()))


def exchanged_and_passed_on(mesh: Mesh) -> Usp:
    return Usp(mesh.axis("cp_inner"), Ring(mesh.axis("cp_outer"), mesh.axis("cp_outer_back"), PlainMaths()))


def gathered_bytes(case: Case, ranks: int, tokens: int, kv_heads: int) -> int:
    """Keys and values twice, their gradients once, as many bytes each."""
    return 3 * (ranks - 1) * tokens * kv_heads * (case.key + case.value) * case.dtype.itemsize


def exchanged_bytes(case: Case, ranks: int, tokens: int) -> int:
    """q, k, v and out, forward and backward; key-value heads are repeated so that each rank has some."""
    heads = case.heads + math.lcm(case.kv_heads, ranks)
    return 2 * (ranks - 1) * tokens * heads * (case.key + case.value) * case.dtype.itemsize // ranks


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("make", [gathered, exchanged, exchanged_in_pieces])
def test_equals_one_device(world, make, tmp_path):
    exact = CASES + UNEVEN
    ranks = run_distributed(on_ranks, world, make, exact + BF16, tmp_path, group=False)
    for step, case in enumerate(exact + BF16):
        check(case, [found[step] for found in ranks], 1e-11 if case in exact else 3e-2)
        tokens = case.batch * case.length // world
        expected = (
            gathered_bytes(case, world, tokens, case.kv_heads)
            if make is gathered
            else exchanged_bytes(case, world, tokens)
        )
        assert {sent_bytes(tmp_path, rank, {"cp": world}, step) for rank in range(world)} == {expected}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("make", "inner"),
    [(in_two_directions, 2), (in_two_directions, 4), (exchanged_twice, 2), (exchanged_and_passed_on, 2)],
)
def test_two_directions_equal_one_device(make, inner, tmp_path):
    """An outer axis of one rank communicates nothing."""
    ranks = run_distributed(on_ranks, 4, make, CASES, tmp_path, inner, group=False)
    outer = 4 // inner
    for step, case in enumerate(CASES):
        check(case, [found[step] for found in ranks])
        if make is not in_two_directions:
            continue
        tokens = case.batch * case.length // 4
        kv_heads = math.lcm(case.kv_heads, inner) // inner
        expected = exchanged_bytes(case, inner, tokens) + gathered_bytes(case, outer, inner * tokens, kv_heads)
        sizes = {"cp_inner": inner, "cp_outer": outer}
        assert {sent_bytes(tmp_path, rank, sizes, step) for rank in range(4)} == {expected}


def kept(rank: int, world: int) -> list[int]:
    recorder = Recorder(None, rank=rank, world=world, entries=64)
    mesh = Mesh(Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder, context=2)
    case = Case("kept", heads=8, kv_heads=4, value=5)
    found = [
        saved_bytes(case, make(mesh), layout(case, world, rank)) for make in (gathered, exchanged, in_two_directions)
    ]
    mesh.close()
    return found


@pytest.mark.distributed
def test_keeps_one_rank_s_share():
    """q, k, v, out and lse, not what was gathered."""
    case = Case("kept", heads=8, kv_heads=4, value=5)
    floats = case.batch * case.length * (8 * (6 + 5 + 1) + 4 * (6 + 5))
    assert run_distributed(kept, 4, group=False) == [[floats * 8 // 4] * 3] * 4


@pytest.mark.parametrize(
    "make", [GatherKeysValues, Ulysses, lambda axis, local: Usp(axis, GatherKeysValues(axis, local))]
)
def test_on_one_rank(make: Callable[..., Core]):
    core = make(Axis.single("cp"), PlainMaths())
    for case in CASES:
        check(case, [attend(case, core, 1, 0)])


class Watched(PlainMaths):
    """Remembers the masks that it was given."""

    def __init__(self) -> None:
        self.masks: list[Mask] = []

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float) -> tuple[Tensor, Tensor]:
        self.masks.append(mask)
        return super().forward(q, k, v, mask, scale)


@pytest.mark.parametrize(
    "make",
    [
        GatherKeysValues,
        Ulysses,
        lambda axis, local: Ring(axis, axis, local),
        lambda axis, local: TokenRing(axis, axis, local),
        lambda axis, local: Usp(axis, Ring(axis, axis, local)),
    ],
)
def test_what_layers_share_is_made_once(make: Callable[..., Core]):
    """Masks, with what kernels derive from them, of a microbatch."""
    case = replace(CASES[0], heads=2, kv_heads=2)
    given, dealt, local = inputs(case), layout(case, 1), Watched()
    core = make(Axis.single("cp"), local)
    for _ in range(2):
        core(given.q, given.k, given.v, AttentionCall(dealt, None, case.scale))
    first, second = local.masks
    assert first is second


def test_brings_tokens_into_order_and_back():
    orders = torch.tensor([[0, 3, 4], [1, 2, 5]]), torch.tensor([[1, 2, 5], [0, 3, 4]])
    tokens = GatheredTokens([TokenIndex(order, order + 10) for order in orders])
    assert tokens.rows.order.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert tokens.rows.documents is not None
    assert tokens.rows.documents.tolist() == [[10, 11, 12, 13, 14, 15]] * 2
    by_rank = torch.stack(orders)
    for part in (slice(0, 3), slice(1, 3)):
        whole = torch.full((2, 6, 2), -1)
        pairs = torch.stack([by_rank, -by_rank], -1)[:, :, part]
        tokens.put(whole, part, pairs)
        put = whole[..., 0] >= 0
        assert int(put.sum()) == pairs[..., 0].numel()
        assert torch.equal(whole[..., 0][put], tokens.rows.order[put])
        assert torch.equal(tokens.get(whole, part), pairs)


def test_consecutive_tokens_are_not_copied():
    tokens = GatheredTokens([TokenIndex(torch.arange(3)[None]), TokenIndex(torch.arange(3, 6)[None])])
    whole = torch.empty(2, 6, 4)
    tokens.put(whole, slice(1, 3), torch.arange(32.0).view(2, 2, 2, 4))
    found = tokens.get(whole, slice(1, 3))
    assert torch.equal(found, torch.arange(32.0).view(2, 2, 2, 4))
    assert found.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def test_heads_that_ranks_cannot_share():
    check_heads(8, 4)
    with pytest.raises(UserError, match=r"parallel\.cp: 4 ranks cannot share 6 query heads.*model\.heads"):
        check_heads(6, 4)
    case = Case("three heads", heads=3, kv_heads=3)
    given = inputs(case)
    core = Ulysses(Axis("cp", 0, 2, (0, 1)), PlainMaths())
    half = TokenLayout((TokenIndex(torch.arange(24)[None]), TokenIndex(torch.arange(24, 48)[None])))
    with pytest.raises(UserError, match="2 ranks cannot share 3 query heads"):
        core(given.q[:, :24], given.k[:, :24], given.v[:, :24], AttentionCall(half, None, case.scale))
