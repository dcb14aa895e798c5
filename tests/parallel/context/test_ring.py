"""Ring against the plain maths of whole sequences, and what it sends."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pentad.models.local_attention import PlainMaths
from pentad.parallel.context.ring import Ring
from pentad.parallel.mesh import Mesh
from tests.distributed import run_distributed

from .cases import CASES, check, on_ranks


def one_way(mesh: Mesh) -> Ring:
    return Ring(mesh.axis("cp"), mesh.axis("cp_back"), PlainMaths())


def both_ways(mesh: Mesh) -> Ring:
    return Ring(mesh.axis("cp"), mesh.axis("cp_back"), PlainMaths(), duplex=True)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_ring(world, tmp_path):
    ranks = run_distributed(on_ranks, world, one_way, CASES, None, group=False)
    for step, case in enumerate(CASES):
        check(case, [found[step] for found in ranks])
