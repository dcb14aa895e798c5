"""Every rank gets as many tokens and as much causal attention as every other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pentad.parallel.context.layout import by_length, contiguous, zigzag
from pentad.parallel.kernels.mask import TokenLayout


def documents_of(lengths: list[int]) -> torch.Tensor:
    """(1, S) ids."""
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def work(layout: TokenLayout, documents: torch.Tensor | None, length: int) -> np.ndarray:
    """(B, ranks) unmasked pairs, counted key by key."""
    ids = torch.zeros(1, length, dtype=torch.long) if documents is None else documents
    place = torch.zeros_like(ids)
    for token in range(1, length):
        place[:, token] = torch.where(ids[:, token] == ids[:, token - 1], place[:, token - 1] + 1, 0)
    parts = [(place.gather(1, rows.order.expand(len(ids), -1)) + 1).sum(1) for rows in layout.ranks]
    return torch.stack(parts, 1).numpy()


def random_documents(seed: int, length: int, mean: float) -> torch.Tensor:
    draws = np.random.default_rng(seed)
    lengths: list[int] = []
    while sum(lengths) < length:
        lengths.append(int(min(max(1, draws.exponential(mean)), length - sum(lengths))))
    return documents_of(lengths)


def check_partition(layout: TokenLayout, length: int) -> None:
    counts = {rows.count for rows in layout.ranks}
    assert counts == {length // len(layout.ranks)}
    orders = torch.cat([rows.order for rows in layout.ranks], 1)
    assert torch.equal(orders.sort(1).values, torch.arange(length).expand_as(orders))
    assert all((rows.order.diff(dim=1) > 0).all() for rows in layout.ranks)


@pytest.mark.sample(4)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("length", [64, 4096, 4096 + 8])
def test_one_document(ranks, length):
    layout = zigzag(length, ranks, 0)
    check_partition(layout, length)
    done = work(layout, None, length)
    assert done.max() / done.mean() <= 1.02
    if length == 64:
        assert layout.ranks[0].order[0, : length // ranks // 2].tolist() == list(range(length // ranks // 2))


@pytest.mark.sample(1)
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("mean", [3, 60, 700, 5000])
def test_documents_of_random_lengths(ranks, mean):
    """Without any padding."""
    length = 4096 * ranks
    for seed in range(3):
        documents = random_documents(seed, length, mean)
        layout = zigzag(length, ranks, 0, documents)
        check_partition(layout, length)
        done = work(layout, documents, length)
        assert done.max() / done.mean() <= 1.05


@pytest.mark.sample(2)
@pytest.mark.parametrize("ranks", [2, 4, 6, 8])
@pytest.mark.parametrize("mean", [3, 60, 700, 5000])
def test_by_length(ranks, mean):
    """Even, and a token has far fewer ranks beside its own to share its document with."""
    length = 4096 * ranks
    for seed in range(3):
        documents = random_documents(seed, length, mean)
        layout = by_length(length, ranks, 0, documents)
        check_partition(layout, length)
        done = work(layout, documents, length)
        assert done.max() / done.mean() <= 1.05
        shared = sharers(layout, documents)
        others = ((shared - 1) * np.bincount(documents[0])).sum() / length
        assert others <= {3: 0, 60: 0.1, 700: 0.6, 5000: 1}[mean] * (ranks - 1)


def sharers(layout: TokenLayout, documents: torch.Tensor) -> np.ndarray:
    """How many ranks have tokens of each document of one sequence."""
    found = np.zeros(int(documents.max()) + 1, dtype=np.int64)
    for rows in layout.ranks:
        assert rows.documents is not None
        found[rows.documents[0].unique().numpy()] += 1
    return found


def test_by_length_shares_what_is_too_long():
    """The cp size that each length needs: 4, 2 and 1 ranks."""
    documents = documents_of([700, 400, 400, 130, 130, 130, 130, 10, 10, 4, 4])
    layout = by_length(2048, 4, 0, documents)
    check_partition(layout, 2048)
    assert sharers(layout, documents).tolist()[:7] == [4, 2, 2, 1, 1, 1, 1]
    one = by_length(64, 4, 0)
    assert all(torch.equal(a.order, b.order) for a, b in zip(one.ranks, zigzag(64, 4, 0).ranks, strict=True))


def test_the_case_that_torch_deals_out_unevenly():
    documents = documents_of([16, 4, 4, 8])
    done = work(zigzag(32, 2, 0, documents), documents, 32)
    assert done.tolist() == [[96, 96]]


def test_documents_of_one_token_and_several_sequences():
    documents = torch.cat([documents_of([1] * 32), documents_of([5, 1, 1, 25])])
    layout = zigzag(32, 4, 1, documents)
    check_partition(layout, 32)
    done = work(layout, documents, 32)
    assert done[0].tolist() == [8] * 4
    for rows in layout.ranks:
        assert rows.documents is not None
        assert torch.equal(rows.documents, documents.gather(1, rows.order))


def test_contiguous():
    layout = contiguous(12, 3, 2)
    assert layout.mine.order.tolist() == [[8, 9, 10, 11]]
    check_partition(layout, 12)
