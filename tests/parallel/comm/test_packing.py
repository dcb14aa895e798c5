"""Addresses for lifetimes: nothing that lives together overlaps, and the memory is near the most that lives at once."""

from __future__ import annotations

import random

import pytest

from pentad.parallel.comm.packing import Buffer, live_bytes, pack


def _checked(buffers: list[Buffer], align: int = 64) -> float:
    """How much larger the memory is than what lives at once, of a packing that is correct."""
    packed = pack(buffers, align=align)
    bytes_of = []
    for b, runs in zip(buffers, packed.runs, strict=True):
        mine = {byte for at, count in runs for byte in range(at // align, (at + count) // align)}
        assert all(at % align == 0 and at + count <= packed.nbytes for at, count in runs)
        assert len(mine) * align == sum(count for _, count in runs) >= b.nbytes
        bytes_of.append(mine)
    for k, a in enumerate(buffers):
        for b, theirs in zip(buffers[:k], bytes_of[:k], strict=True):
            assert not (a.start < b.end and b.start < a.end and bytes_of[k] & theirs), (a, b)
    return packed.nbytes / max(live_bytes(buffers), 1)


@pytest.mark.parametrize("seed", range(12))
def test_what_lives_together_lies_apart_in_no_more_than_lives_at_once(seed: int) -> None:
    rng = random.Random(seed)
    buffers = []
    for _ in range(rng.randint(1, 60)):
        start = rng.randint(0, 100)
        buffers.append(Buffer(start, start + rng.randint(1, 40), rng.choice((0, 16_384, 20_000, 50_001, 65_536))))
    assert _checked(buffers) < 1.01


def test_two_sizes_that_leave_gaps_in_one_piece() -> None:
    """A rank of gis: the second chunk's activations, which keep more, come and go while the first's stay."""
    small = [Buffer(*span, 491_520) for span in ((3, 69), (7, 81), (12, 92), (17, 103), (63, 120), (74, 130))]
    large = [Buffer(*span, 557_056) for span in ((22, 27), (32, 38), (121, 127))]
    packed = pack([*small, *large])
    assert packed.nbytes <= 1.005 * live_bytes([*small, *large])
    assert sum(len(runs) > 1 for runs in packed.runs) <= 3


@pytest.mark.parametrize("size", [64, 4096])
def test_buffers_of_one_size_need_what_lives_at_once(size: int) -> None:
    rng = random.Random(size)
    starts = [rng.randint(0, 200) for _ in range(80)]
    assert _checked([Buffer(start, start + rng.randint(1, 60), size) for start in starts]) == 1.0


def test_nested_lifetimes_of_any_size_lie_on_each_other() -> None:
    """The layers of a step without a pipeline: what comes first goes last."""
    rng = random.Random(1)
    assert _checked([Buffer(k, 100 - k, 64 * rng.randint(1, 50)) for k in range(40)]) == 1.0


def test_what_ends_makes_room_for_what_begins_then() -> None:
    assert pack([Buffer(0, 2, 128), Buffer(2, 4, 128)]).nbytes == 128
    assert live_bytes([Buffer(0, 2, 128), Buffer(2, 4, 100)]) == 128


def test_nothing_takes_nothing() -> None:
    assert pack([]).nbytes == 0
