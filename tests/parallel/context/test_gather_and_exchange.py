"""AllGather, Ulysses and Usp against the plain maths of whole sequences."""

from __future__ import annotations

import pytest
import torch

from pentad.configs.errors import UserError
from pentad.models.local_attention import PlainMaths
from pentad.parallel.context.gather import AllGather
from pentad.parallel.context.ulysses import Ulysses, check_heads
from pentad.parallel.context.usp import Usp
from pentad.parallel.mesh import Mesh
from tests.distributed import run_distributed

from .cases import CASES, LENGTH, Case, check, on_ranks, sent_bytes

DOUBLE, BF16 = 8, 2


def gathered(mesh: Mesh) -> AllGather:
    return AllGather(mesh.axis("cp"), PlainMaths())


def exchanged(mesh: Mesh) -> Ulysses:
    return Ulysses(mesh.axis("cp"), PlainMaths())


def in_two_directions(mesh: Mesh) -> Usp:
    return Usp(mesh.axis("cp_inner"), AllGather(mesh.axis("cp_outer"), PlainMaths()))


def gathered_bytes(case: Case, ranks: int, size: int) -> int:
    """Keys and values twice, their gradients once."""
    tokens = case.batch * case.length // ranks
    return 3 * (ranks - 1) * tokens * case.kv_heads * (case.key + case.value) * size


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_gather(world, tmp_path):
    ranks = run_distributed(on_ranks, world, gathered, CASES, tmp_path, group=False)
    for step, case in enumerate(CASES):
        check(case, [found[step] for found in ranks])
        for rank in range(world):
            expected = gathered_bytes(case, world, DOUBLE)
            assert sent_bytes(tmp_path, rank, {"cp": world}, step) == expected


def exchanged_bytes(case: Case, ranks: int, size: int) -> int:
    """q, k, v and out, forward and backward; key-value heads are as many as ranks, or more."""
    tokens = case.batch * case.length // ranks
    heads = case.heads + max(case.kv_heads, ranks)
    return 2 * (ranks - 1) * tokens * heads * (case.key + case.value) * size // ranks


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4])
def test_exchange(world, tmp_path):
    ranks = run_distributed(on_ranks, world, exchanged, CASES, tmp_path, group=False)
    for step, case in enumerate(CASES):
        check(case, [found[step] for found in ranks])
        for rank in range(world):
            expected = exchanged_bytes(case, world, DOUBLE)
            assert sent_bytes(tmp_path, rank, {"cp": world}, step) == expected
