"""The canary: ranks on equal devices make equal bits, and one that does not is named before training."""

from __future__ import annotations

import itertools
from unittest.mock import patch

import pytest
import torch
from torch import nn

from pentad.configs.schema import ModelConfig
from pentad.trainer.numerics import canary as room
from pentad.trainer.numerics.canary import CanaryBits, CanaryError, CanaryResult, canary, judge_bits, raise_if_wrong
from tests.distributed import run_distributed
from tests.trainer.numerics.flips import flip_bit
from tests.training import job, open_mesh

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


class _Always:
    """Draws for `flip_bit`: the top of the last element's exponent. What is smaller may be rounded away in the sum that
    follows, on some processors."""

    def randrange(self, stop: int) -> int:
        return 6 if stop == 8 else stop - 1


def _judged(rank: int, world: int, dtype: str, bad: tuple[int, ...], runs: int) -> CanaryResult:
    mesh = open_mesh(rank, job(dp=world))
    calls = itertools.count()

    def spoil(module: nn.Module, given: object, made: torch.Tensor) -> None:
        if next(calls) < runs:
            flip_bit(made.data, _Always())  # type: ignore[arg-type]

    real = room.Transformer

    def broken(cfg: ModelConfig) -> nn.Module:
        model = real(cfg)
        model.get_submodule("layers.1.attention").register_forward_hook(spoil)
        return model

    try:
        with patch.object(room, "Transformer", broken if rank in bad else real):
            return canary(mesh, torch.device("cpu"), DTYPES[dtype])
    finally:
        mesh.close()


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_ranks_make_equal_bits(dtype: str) -> None:
    first, *others = run_distributed(_judged, 3, dtype, (), 0, group=False)
    assert first.suspects == () and first.lines == () == first.unsteady and all(other == first for other in others)
    assert list(first.kinds.values()) == [3]
    raise_if_wrong(first)


@pytest.mark.distributed
def test_one_flipped_bit_on_one_rank_names_it_and_ends_the_job() -> None:
    for found in run_distributed(_judged, 3, "bf16", (1,), 2, group=False):
        assert found.suspects == (1,)
        with pytest.raises(CanaryError, match=r"^canary: rank 1 on \S+ makes other bits than ranks 0, 2 on .* pass"):
            raise_if_wrong(found)


@pytest.mark.distributed
def test_of_two_both_are_named_and_one_that_differs_from_itself_alone() -> None:
    tie = run_distributed(_judged, 2, "fp32", (1,), 2, group=False)[0]
    assert tie.suspects == (0, 1) and "rank 0 on" in tie.lines[0] and "rank 1 on" in tie.lines[0]
    flaky = run_distributed(_judged, 2, "fp32", (1,), 1, group=False)[0]
    assert flaky.suspects == (1,) and "the second time" in flaky.lines[0]


def _bits(rank: int, kind: str, *runs: int) -> CanaryBits:
    first, second = ((1, 1, run) for run in (runs * 2)[:2])
    return CanaryBits(rank, f"node-{rank // 4}", kind, (first, second))


def test_only_equal_devices_are_compared() -> None:
    mixed = [_bits(rank, "old" if rank < 4 else "new", 5 if rank < 4 else 6) for rank in range(8)]
    assert judge_bits(mixed).lines == () and judge_bits(mixed).kinds == {"old": 4, "new": 4}
    wrong = [*mixed[:6], _bits(6, "new", 7), mixed[7]]
    found = judge_bits(wrong)
    assert found.suspects == (6,)
    assert found.lines == ("rank 6 on node-1 makes other bits than ranks 4, 5, 7 on node-1, in the update",)


def test_kernels_that_never_make_the_same_bits_accuse_nobody() -> None:
    found = judge_bits([_bits(rank, "gpu", 2 * rank, 2 * rank + 1) for rank in range(4)])
    assert found.suspects == () == found.lines and found.unsteady == ("gpu",)
    assert "warning" in room.canary_lines(found)[0]
