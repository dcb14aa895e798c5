"""Parts that are made again for some tokens: the rows of the others are kept, and only the rest runs a second time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pentad.parallel.pipeline.saved import Saved, storage_id
from pentad.parallel.projection import local
from pentad.parallel.recompute import remaking, run_part
from pentad.parallel.saved_tensors import Strided, keeping
from pentad.parallel.token_blocks import TokenBlocks

BATCH, LENGTH, WIDTH = 2, 24, 60
N = BATCH * LENGTH
BLOCKS = TokenBlocks(12, 5)
"""Of each sequence the tokens 0 to 4 and 12 to 16 are kept."""
WIDE = {"wide": BLOCKS}


class Net(nn.Module):
    """Heads, and some that lie heads first in memory as attention has them, and what reads them over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        self.rows: list[int] = []

    def wide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.rows.append(len(x))
        heads = local(x, (self.first,))[0].sin().view(BATCH, len(x) // BATCH, 4, -1)
        return heads, (1.5 * heads).transpose(1, 2).contiguous().transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k = run_part("wide", self.wide, x)
        return self.second((q * k).roll(1, 1).flatten(2)).tanh()


def _input() -> Tensor:
    return torch.randn(N, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _gradients(net: Net, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    x = _input()
    forward(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("blocks", [BLOCKS, TokenBlocks(24, 1), TokenBlocks(24, 23), TokenBlocks(3, 2)])
def test_gradients_are_those_of_what_keeps_everything_and_the_rest_runs_again(blocks: TokenBlocks) -> None:
    net = Net()
    expected = _gradients(net, net)
    net.rows.clear()

    def forward(x: Tensor) -> Tensor:
        with remaking(frozenset(WIDE), {"wide": blocks}):
            return net(x)

    found = _gradients(net, forward)
    for a, b in zip(found, expected, strict=True):
        assert torch.linalg.vector_norm(a - b) <= 1e-14 * torch.linalg.vector_norm(b)
    again = N // blocks.size * (blocks.size - blocks.kept)
    assert net.rows == [N, again]


def test_what_is_kept_are_copies_of_the_first_rows_which_may_be_on_the_host() -> None:
    net, x = Net(), _input()
    saved = Saved(torch.device("cpu"), {storage_id(p.untyped_storage()) for p in net.parameters()})
    with saved.catching(), remaking(frozenset(WIDE), WIDE):
        loss = net(x).square().sum()
    rows, whole = N // BLOCKS.size * BLOCKS.kept * WIDTH * 8, N * WIDTH * 8
    sizes = sorted(block.nbytes for block in saved.blocks)
    # Rows of both outputs, and of what the sine was made from.
    assert sizes[:2] == [rows, rows] and set(sizes[2:]) <= {rows, whole} and sizes.count(rows) == 3
    loss.backward()


def test_rows_are_those_of_every_block() -> None:
    x = torch.arange(2 * 6 * 3).view(2, 6, 3)
    blocks = TokenBlocks(3, 1)
    first, rest = blocks.first(x), blocks.rest(x)
    assert torch.equal(first.flatten(0, 2), x[:, ::3].reshape(-1, 3))
    assert torch.equal(rest, x[:, [1, 2, 4, 5]])
    assert torch.equal(blocks.joined(Strided.of(x), x.numel(), first, rest), x)
    flat = x.view(12, 3)
    assert torch.equal(blocks.rest(flat), rest.reshape(8, 3))
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    joined = blocks.joined(Strided.of(turned), x.numel(), first, rest)
    assert torch.equal(joined, x) and joined.stride() == turned.stride()


def test_the_largest_block_divides_sequences_and_a_ranks_rows() -> None:
    assert TokenBlocks.largest(64, 3 * 64) == 64  # one rank has three sequences
    assert TokenBlocks.largest(64, 3 * 64 // 2) == 32  # two ranks have one and a half each
    assert TokenBlocks.largest(64, 64 // 4) == 16  # four share one


def test_what_is_no_row_of_tokens_is_found_out() -> None:
    x = _input()
    with remaking(frozenset(WIDE), {"wide": TokenBlocks(24, 5)}):
        with pytest.raises(RuntimeError, match=r"\(60,\) are no rows of tokens in blocks of 24"):
            run_part("wide", lambda x: x.mean(0).exp(), x)
        with pytest.raises(RuntimeError, match="wide: two of its outputs lie in one storage"):
            run_part("wide", lambda x: (x + 1).split(WIDTH // 2, dim=1), x)


def test_an_input_is_not_kept_a_second_time() -> None:
    kept: list[int] = []

    class Keeps:
        def pack(self, tensor: Tensor) -> Tensor:
            kept.append(tensor.data_ptr())
            return tensor.detach()

        def unpack(self, held: Tensor) -> Tensor:
            return held

    x = _input()
    with keeping(Keeps()), remaking(frozenset(WIDE), WIDE):
        run_part("wide", lambda x: x.sin(), x).sum().backward()
    assert set(kept) == {x.data_ptr()} and x.grad is not None and torch.equal(x.grad, x.detach().cos())
