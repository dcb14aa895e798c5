"""What ranks take to come from what they held to what they are to hold: each element once, and no more than must be."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import torch

from pentad.parallel.global_tensor import GlobalTensor, Placement
from pentad.trainer.recovery.pieces import HeldPiece, Move, TensorPiece, moves

Element = tuple[int, ...]


def elements(piece: TensorPiece) -> set[Element]:
    """Of the global tensor, straight from what a piece is."""
    shape, offsets = piece.placement.local_shape, piece.placement.offsets
    inside = list(product(*map(range, shape)))[piece.start : piece.start + piece.count]
    return {tuple(i + at for i, at in zip(index, offsets, strict=True)) for index in inside}


def of_region(move: Move) -> list[Element]:
    return list(product(*(range(at, at + size) for at, size in zip(*move.region, strict=True))))


def random_piece(draws: random.Random, shape: tuple[int, ...]) -> TensorPiece:
    offsets = tuple(draws.randrange(size) for size in shape)
    local = tuple(draws.randint(1, size - at) for size, at in zip(shape, offsets, strict=True))
    numel = 1
    for size in local:
        numel *= size
    start = draws.randrange(numel + 1)
    return TensorPiece(Placement(shape, offsets, local), start, draws.randint(0, numel - start), torch.float32)


def test_every_element_that_is_missing_comes_once_and_no_other_one() -> None:
    draws, complete = random.Random(3), 0
    for _ in range(400):
        shape, world = tuple(draws.randint(1, 5) for _ in range(draws.randint(0, 3))), draws.randint(1, 4)
        held = {
            name: [
                HeldPiece(rank, source, random_piece(draws, shape))
                for rank in range(world)
                for source in range(draws.randint(0, 3))
            ]
            for name in "ab"
        }
        rank, wanted = draws.randrange(world), {name: random_piece(draws, shape) for name in "ab"}
        found = moves(rank, wanted, held, world)
        missing = {name: elements(piece) for name, piece in wanted.items()}
        there = {name: set[Element]().union(*(elements(each.piece) for each in held[name])) for name in "ab"}
        assert (found is None) == any(not missing[name] <= there[name] for name in "ab")
        if found is None:
            continue
        complete += 1
        for name in "ab":
            mine = [move for move in found if move.name == name]
            came = Counter(element for move in mine for element in of_region(move))
            assert set(came) == missing[name] and set(came.values()) <= {1}
            of_source = {(each.rank, each.source): elements(each.piece) for each in held[name]}
            assert all(set(of_region(move)) <= of_source[move.rank, move.source] for move in mine)
            # What the rank holds itself it keeps: so what comes from others is the least that can.
            own = set[Element]().union(*(elements(each.piece) for each in held[name] if each.rank == rank))
            foreign = sum(move.nbytes for move in mine if move.rank != rank)
            assert foreign == 4 * len(missing[name] - own)
    assert complete > 50


def test_views_of_what_is_taken_are_there_on_both_sides() -> None:
    """A region lies inside one box of the taker and of the giver, so that both see it as one array."""
    whole = torch.arange(60.0).view(3, 4, 5)
    wanted, giver = (Placement(whole.shape, at, size) for at, size in (((0, 1, 0), (3, 3, 5)), ((1, 0, 2), (2, 4, 3))))
    mine = GlobalTensor(wanted, 7, 41, torch.zeros(34))
    rest = GlobalTensor.of(whole.contiguous())
    theirs = GlobalTensor(giver, 1, 22, giver.of(whole).reshape(-1)[1:22].clone())
    held = [
        HeldPiece(1, 0, TensorPiece(giver, 1, 21, whole.dtype)),
        HeldPiece(0, 0, TensorPiece(rest.placement, 0, 60, whole.dtype)),
    ]
    found = moves(1, {"w": TensorPiece(wanted, 7, 34, whole.dtype)}, {"w": held}, 2)
    assert found is not None and {move.rank for move in found} == {0, 1}
    for move in found:
        mine.view_of(*move.region).copy_((rest, theirs)[move.rank].view_of(*move.region))
    assert torch.equal(mine.local, wanted.of(whole).reshape(-1)[7:41])


def test_other_shapes_and_types_are_nothing() -> None:
    piece = TensorPiece(Placement.whole((2, 3)), 0, 6, torch.float32)
    for other in (
        TensorPiece(Placement.whole((2, 4)), 0, 8, torch.float32),
        TensorPiece(Placement.whole((2, 3)), 0, 6, torch.bfloat16),
    ):
        assert moves(0, {"w": piece}, {"w": [HeldPiece(0, 0, other)]}, 1) is None
    assert moves(0, {"w": piece}, {}, 1) is None
