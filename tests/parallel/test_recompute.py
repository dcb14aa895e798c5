"""Parts that are made again: same gradients, nothing kept that need not be, nothing run twice in vain."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn

from pentad.parallel.pipeline.saved import Saved, View, storage_id
from pentad.parallel.recompute import remaking, run_again, run_part
from pentad.parallel.saved_tensors import keeping

PARTS = frozenset({"wide", "bent"})


class Net(nn.Module):
    """Three matrices, the second one on the square of the first one's sine."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = (nn.Linear(40, 40, dtype=torch.float64) for _ in range(3))
        self.calls: list[str] = []

    def wide(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append("wide")
        y = self.first(x)
        return y, y.t().sin().t()

    def bent(self, y: Tensor, z: Tensor) -> Tensor:
        self.calls.append("bent")
        return (y * z).square()

    def forward(self, x: Tensor) -> Tensor:
        y = run_part("bent", self.bent, *run_part("wide", self.wide, x))
        return self.third(self.second(y.view(-1, 40)).tanh())


def _input() -> Tensor:
    return torch.randn(30, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def _gradients(net: Net, forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
    net.zero_grad(set_to_none=True)
    x = _input()
    loss = forward(x).square().sum()
    loss.backward()
    assert x.grad is not None
    return [x.grad, *(p.grad.clone() for p in net.parameters() if p.grad is not None)]


def _storages(*roots: Tensor) -> int:
    """Bytes of all tensors that are alive, but for those of parameters and these."""
    gc.collect()
    mine = {t.untyped_storage().data_ptr() for t in roots}
    alive = {}
    for each in gc.get_objects():
        if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in mine:
            alive[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(alive.values())


@pytest.mark.parametrize("parts", [{"wide"}, {"bent"}, {"wide", "bent"}], ids=lambda parts: "+".join(sorted(parts)))
def test_gradients_are_bit_equal_and_each_part_runs_twice(parts: set[str]) -> None:
    net = Net()
    expected = _gradients(net, net)
    net.calls.clear()

    def remade(x: Tensor) -> Tensor:
        with remaking(frozenset(parts)):
            return net(x)

    found = _gradients(net, remade)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(net.calls.count(part) == 1 + (part in parts) for part in PARTS)


def test_a_whole_function_keeps_its_input_alone() -> None:
    net = Net()
    expected = _gradients(net, net)
    found = _gradients(net, lambda x: run_again(net, x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    kept: list[Tensor] = []

    class Keeps:
        def pack(self, tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        def unpack(self, held: Tensor) -> Tensor:
            return held

    x = _input()
    with keeping(Keeps()):
        run_again(net, x).backward(torch.ones(30, 40, dtype=torch.float64))
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_a_second_run_ends_with_the_last_tensor_that_is_needed() -> None:
    calls: list[str] = []

    def function(x: Tensor) -> Tensor:
        calls.append("begins")
        y = x.sin()
        calls.append("ends")
        return y + 1

    x = _input()
    run_again(function, x).sum().backward()
    assert calls == ["begins", "ends", "begins"] and x.grad is not None and torch.equal(x.grad, x.detach().cos())


def test_what_is_made_again_goes_when_its_node_has_run_and_nobody_keeps_an_output() -> None:
    alive: list[list[bool]] = []
    made: list[weakref.ref[torch.UntypedStorage]] = []

    class Reads(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y: Tensor) -> Tensor:
            ctx.save_for_backward(y)
            return y.sum(0)

        @staticmethod
        def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            (y,) = ctx.saved_tensors
            made.append(weakref.ref(y.untyped_storage()))
            return grad.expand_as(y)

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
            alive.append([each() is not None for each in made])
            return grad

    x = _input()
    with remaking(PARTS):
        first = run_part("wide", lambda x: x * 2, x)
        gone = weakref.ref(first.untyped_storage())
        y = Reads.apply(first)
        del first
        assert gone() is None
        z = Reads.apply(run_part("wide", lambda y: y * 3, Looks.apply(y.expand(30, 40))))
    z.sum().backward()
    assert len(made) == 2 and alive == [[False]]
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 180.0))


def test_an_address_that_is_used_again_is_no_output_of_a_part() -> None:
    """A part's output goes at once, and what is allocated next may lie where it was."""
    x = _input()
    seen = set()
    with remaking(PARTS):
        total = x.new_zeros(())
        for i in range(20):
            y = run_part("wide", lambda x: x + 1, x)
            seen.add(y.untyped_storage().data_ptr())
            total = total + y.square().sum()
            del y
            other = torch.full((30, 40), float(i), dtype=torch.float64)
            seen.add(other.untyped_storage().data_ptr())
            total = total + (x * other).sum()
            del other
    total.backward()
    assert len(seen) < 40
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 40 * (x.detach() + 1) + sum(range(20)))


def test_what_parts_are_made_from_goes_through_the_keeper_around_them() -> None:
    """So it can be on the host: what is made again is not there."""
    net, x = Net(), _input()
    plain, away = (
        Saved(torch.device("cpu"), {storage_id(p.untyped_storage()) for p in net.parameters()}) for _ in "12"
    )
    for saved, inside in ((plain, nullcontext()), (away, remaking(PARTS))):
        held: list[object] = []
        pack = saved.pack
        saved.pack = lambda tensor, pack=pack, held=held: held.append(pack(tensor)) or held[-1]  # type: ignore[method-assign]
        with saved.catching(), inside:
            loss = net(x).square().sum()
        assert any(isinstance(each, View) for each in held)
        loss.backward()
    # The input, what tanh gives and the last matrix; not the first matrix, the sine, their product and its square.
    assert (len(plain.blocks), len(away.blocks)) == (7, 3)


def test_a_function_that_saves_other_tensors_the_second_time_is_found_out() -> None:
    runs: list[int] = []

    def fickle(x: Tensor) -> Tensor:
        runs.append(0)
        return x.sin().cos() if len(runs) == 1 else x.sin().cos().exp().sin()

    x = _input()
    with remaking(PARTS):
        y = run_part("wide", fickle, x).square()
    with pytest.raises(RuntimeError, match="saves other tensors than the 2 of the first"):
        y.sum().backward()


def test_without_gradients_nothing_is_held() -> None:
    net, x = Net(), _input()
    with torch.no_grad(), remaking(PARTS):
        y = net(x)
    assert y.grad_fn is None and net.calls == ["wide", "bent"]
