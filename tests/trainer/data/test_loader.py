"""The loader: equal data in every layout, exact resume, and no failure that goes unnoticed."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import BinData
from pentad.trainer.data.dataset import Dataset, Microbatch, Split, open_data
from pentad.trainer.data.indexed import IndexedWriter
from pentad.trainer.data.loader import Loader, heldout_batches, heldout_steps

T, BATCH = 8, 8


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(0)
    with IndexedWriter(str(tmp_path / "x"), np.dtype("u2")) as writer:
        for length in random.integers(1, 30, 60):
            writer.add(random.integers(0, 50, length).astype(np.uint16))
    cfg = BinData(paths=(str(tmp_path / "x"),), document_mask=True, holdout=0.2)
    return open_data(cfg, seq_len=T, vocab=50, seed=1)


def global_batches(
    split: Split, dp_size: int, micro_batch: int, start: int = 0, prefetch: int = 2
) -> list[torch.Tensor]:
    """Per step, [global_batch, 3 + 4 T] of everything in it, put together from all ranks by sample number."""
    ranks = []
    for rank in range(dp_size):
        with Loader(
            split,
            global_batch=BATCH,
            micro_batch=micro_batch,
            dp_rank=rank,
            dp_size=dp_size,
            start_step=start,
            steps=15,
            prefetch=prefetch,
        ) as loader:
            ranks.append([(step, loader.counts) for step in loader])
    steps = []
    for parts in zip(*ranks, strict=True):
        batches = [batch for step, _ in parts for batch in step]
        for _, counts in parts:
            assert counts == (sum(b.valid for b in batches), sum(b.pairs for b in batches))
        steps.append(torch.cat([table(batch) for batch in batches]))
        steps[-1] = steps[-1][steps[-1][:, 0].argsort()]
    return steps


def table(batch: Microbatch) -> torch.Tensor:
    assert batch.positions is not None and batch.documents is not None
    return torch.cat((batch.samples[:, None], batch.tokens, batch.labels, batch.positions, batch.documents), dim=1)


def test_the_global_batch_is_the_same_in_every_layout(data: Dataset) -> None:
    reference = global_batches(data.train, 1, 1)
    assert [step[:, 0].tolist() for step in reference] == [
        list(range(i, i + BATCH)) for i in range(0, 15 * BATCH, BATCH)
    ]
    for dp_size, micro_batch, prefetch in ((1, 8, 0), (2, 2, 1), (4, 1, 9), (4, 2, 2), (8, 1, 3)):
        other = global_batches(data.train, dp_size, micro_batch, prefetch=prefetch)
        assert all(torch.equal(a, b) for a, b in zip(reference, other, strict=True))


def test_rank_r_owns_microbatches_a_dp_plus_r(data: Dataset) -> None:
    loader = Loader(data.train, global_batch=8, micro_batch=2, dp_rank=1, dp_size=2, start_step=3, steps=4)
    (step,) = loader
    assert [batch.samples.tolist() for batch in step] == [[26, 27], [30, 31]]


def test_resume_at_a_step_gives_the_same_batches(data: Dataset) -> None:
    whole = global_batches(data.train, 2, 2)
    rest = global_batches(data.train, 4, 1, start=6)
    assert len(rest) == 9
    assert all(torch.equal(a, b) for a, b in zip(whole[6:], rest, strict=True))


def test_heldout_is_the_same_at_every_call_and_in_every_layout(data: Dataset) -> None:
    assert data.heldout is not None
    steps = heldout_steps(data.heldout, 100, 4)
    assert steps == data.heldout.sequences // 4

    def rows(dp_size: int, micro_batch: int) -> torch.Tensor:
        layout = {"steps": 100, "global_batch": 4, "micro_batch": micro_batch, "dp_size": dp_size}
        ranks = [heldout_batches(data.heldout, dp_rank=rank, **layout) for rank in range(dp_size)]
        found = torch.cat([table(batch) for rank in ranks for step in rank for batch in step])
        return found[found[:, 0].argsort()]

    assert torch.equal(rows(1, 1), rows(1, 4))
    assert torch.equal(rows(1, 1), rows(2, 2))
    assert len(rows(4, 1)) == 4 * steps
    with pytest.raises(UserError, match=r"data.holdout"):
        heldout_batches(None, steps=1, global_batch=4, micro_batch=1)


def broken(split: Split, at: int, error: Exception) -> Split:
    """The split, failing when asked for step ``at``."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Split):
        def read(self, samples: np.ndarray, source: np.ndarray, starts: np.ndarray) -> Microbatch:
            if samples[0] // BATCH == at:
                raise error
            return super().read(samples, source, starts)

    return Broken(**vars(split))


@pytest.mark.parametrize("prefetch", [0, 1, 50])
def test_an_exception_in_the_thread_reaches_the_consumer_at_its_step(data: Dataset, prefetch: int) -> None:
    split = broken(data.train, 2, OSError("disk on fire"))
    with Loader(split, global_batch=BATCH, micro_batch=4, steps=5, prefetch=prefetch) as loader:
        next(loader)
        next(loader)
        with pytest.raises(OSError, match=r"disk on fire"):
            next(loader)


def test_wait_is_measured(data: Dataset) -> None:
    @dataclasses.dataclass(frozen=True)
    class Slow(Split):
        def read(self, samples: np.ndarray, source: np.ndarray, starts: np.ndarray) -> Microbatch:
            time.sleep(0.1)
            return super().read(samples, source, starts)

    with Loader(Slow(**vars(data.train)), global_batch=BATCH, micro_batch=4, steps=3, prefetch=2) as loader:
        next(loader)
        assert 0.15 < loader.wait_s < 5
        time.sleep(0.5)
        next(loader)
        assert loader.wait_s < 0.1


def threads() -> int:
    return sum(thread.name == "pentad-data" for thread in threading.enumerate())


def test_close_and_forgetting_both_end_the_thread(data: Dataset) -> None:
    before = threads()
    loader = Loader(data.train, global_batch=BATCH, micro_batch=1, steps=1000, prefetch=2)
    next(loader)
    assert threads() == before + 1
    loader.close()
    loader.close()
    assert threads() == before
    with pytest.raises(RuntimeError, match=r"closed"):
        next(loader)
    forgotten = Loader(data.train, global_batch=BATCH, micro_batch=1, steps=1000, prefetch=2)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 5
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threads() == before


def test_indivisible_batches_name_the_key(data: Dataset) -> None:
    with pytest.raises(UserError, match=r"train.global_batch: 8 is not a multiple of .* 3 x 1"):
        Loader(data.train, global_batch=8, micro_batch=3, steps=1)
