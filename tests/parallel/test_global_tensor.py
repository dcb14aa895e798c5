"""Flat runs of slices as boxes, against brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pentad.parallel.global_tensor import GlobalTensor, Placement, boxes


@st.composite
def _runs(draw: st.DrawFn) -> tuple[Placement, int, int]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, size)) if draw(st.booleans()) else 0 for size in shape)
    sizes = tuple(draw(st.integers(0, size - start)) for size, start in zip(shape, offsets, strict=True))
    placement = Placement(shape, offsets, sizes)
    numel = math.prod(placement.local_shape)
    start = draw(st.integers(0, numel))
    return placement, start, draw(st.integers(start, numel))


def _numbered(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(math.prod(shape)).reshape(shape)


@settings(deadline=None, max_examples=300)
@given(_runs())
def test_boxes_are_exactly_the_run(run: tuple[Placement, int, int]) -> None:
    placement, start, stop = run
    whole = _numbered(placement.global_shape)
    expected = placement.of(whole).reshape(-1)[start:stop]
    found = boxes(placement, start, stop)
    parts = []
    for box in found:
        part = whole
        for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        assert box.local_flat_start == start + sum(p.numel() for p in parts)
        parts.append(part.reshape(-1))
    assert torch.equal(torch.cat(parts) if parts else expected[:0], expected)
    assert len(found) <= max(1, 2 * len(placement.global_shape) - 1)


@settings(deadline=None, max_examples=100)
@given(_runs())
def test_views_share_the_memory_of_the_data(run: tuple[Placement, int, int]) -> None:
    placement, start, stop = run
    data = placement.of(_numbered(placement.global_shape)).reshape(-1)[start:stop].clone()
    tensor = GlobalTensor(placement, start, stop, data)
    assert tuple(tensor.shape) == placement.global_shape
    for box in tensor.boxes:
        tensor.view_of(box.offsets, box.sizes).fill_(-1)
    assert bool((data == -1).all())


def test_a_run_outside_the_slice_and_wrong_data_are_refused() -> None:
    placement = Placement.shard((6, 4), 1, 1, 2)
    assert placement.local_shape == (6, 2)
    with pytest.raises(ValueError, match="slice of 12 elements"):
        boxes(placement, 3, 13)
    with pytest.raises(ValueError, match="5 elements"):
        GlobalTensor(placement, 0, 5, torch.zeros(4))
    with pytest.raises(ValueError, match="does not divide"):
        Placement.shard((6, 4), 1, 0, 3)
    with pytest.raises(KeyError):
        GlobalTensor(placement, 0, 2, torch.zeros(2)).view_of((3, 2), (1, 2))
