"""The test helper itself: results, errors, hangs, dead processes, and a fresh group for each call."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank: int, world_size: int, offset: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = offset + rank
    dist.all_reduce(total)
    return rank, total


def _process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def _fail_on_last(rank: int, world_size: int) -> None:
    if rank == world_size - 1:
        raise ArithmeticError(f"rank {rank} cannot")
    dist.barrier()


def _sleep_on_first(rank: int, world_size: int) -> None:
    if rank == 0:
        time.sleep(60)


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(7)


def _only_local() -> None:
    def inner(rank: int, world_size: int) -> None:
        pass

    run_distributed(inner, 1)


def test_returns_results_by_rank() -> None:
    results = run_distributed(_sum_of_ranks, 2, torch.tensor([10.0, 20.0]))
    assert [rank for rank, _ in results] == [0, 1]
    for _, total in results:
        assert total.tolist() == [21.0, 41.0]


def test_processes_are_kept_between_calls() -> None:
    assert run_distributed(_process_id, 2) == run_distributed(_process_id, 2)


def test_raises_the_first_error_with_its_rank() -> None:
    with pytest.raises(ArithmeticError, match="rank 1 cannot") as caught:
        run_distributed(_fail_on_last, 2)
    assert any("on rank 1" in note and "_fail_on_last" in note for note in caught.value.__notes__)


def test_a_hang_names_the_rank_and_the_next_call_works() -> None:
    run_distributed(_process_id, 2)  # the first call of a process also imports this module
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 2 did not finish _sleep_on_first"):
        run_distributed(_sleep_on_first, 2, timeout_s=10.0)
    assert len(run_distributed(_process_id, 2)) == 2


def test_a_dead_process_is_an_error_with_its_exit_code() -> None:
    with pytest.raises(RuntimeError, match="exit code 7"):
        run_distributed(_die, 2)


def test_world_size_and_function_are_checked() -> None:
    with pytest.raises(ValueError, match="world_size is 17"):
        run_distributed(_process_id, 17)
    with pytest.raises((AttributeError, TypeError), match="inner"):
        _only_local()
