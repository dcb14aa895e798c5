"""What a forward pass saves goes to the host and comes back: equal gradients, whatever the copies' speed and order."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from pentad.parallel.comm.lane import Lane
from pentad.parallel.comm.slab import DiskLanes
from pentad.parallel.comm.waiting import Aborted
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.offload import offload, windows
from pentad.parallel.pipeline.program import Op, Program
from pentad.parallel.pipeline.saved import Offloads, Saved, View, storage_id
from pentad.parallel.pipeline.schedules import generate
from pentad.parallel.pipeline.times import Times
from tests.slow_lane import SlowLane

CPU = torch.device("cpu")
TIMES = Times(offload=(0.1,), reload=(0.1,))


class Net(nn.Module):
    """Views, a tensor saved twice, a small one, a softmax whose output is saved, weights and their transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(48, 96, dtype=torch.float64)
        self.b = nn.Linear(48, 48, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(48, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, dim=-1)
        mixed = torch.softmax(left @ right.t(), dim=-1) @ left
        return (torch.sigmoid(self.b(mixed.t().contiguous().t())) * mixed * self.scale).sum(-1)


@dataclass
class Ran:
    """Gradients of the parameters, and what was held while nothing of a microbatch was needed."""

    grads: list[Tensor]
    outputs: list[Tensor]
    host_bytes: int
    disk_bytes: int


def _program(microbatches: int, share: float = 1.0) -> Program:
    program = generate("gpipe", ranks=1, microbatches=microbatches)
    chosen = [window.pass_ for mine in windows(program, TIMES) for window in mine]
    return offload(program, chosen[: round(share * len(chosen))], TIMES)


def _inputs(microbatches: int) -> list[Tensor]:
    draws = torch.Generator().manual_seed(1)
    return [torch.randn(64, 48, dtype=torch.float64, generator=draws) for _ in range(microbatches)]


def run_net(
    program: Program,
    out: Lane,
    back: Lane,
    disk: DiskLanes | None = None,
    *,
    steps: int = 1,
    between: Callable[[Op], object] = lambda op: None,
) -> Ran:
    """Steps of a program of one rank; `between` is called after every operation."""
    torch.manual_seed(0)
    net, graphs, outputs = Net(), {}, []
    elsewhere = {storage_id(p.untyped_storage()) for p in net.parameters()}
    inputs = _inputs(program.microbatches)
    offloads = Offloads(program, 0, out=out, back=back, device=CPU, elsewhere=elsewhere, disk=disk)

    def forward(op: Op) -> None:
        x = inputs[op.index].clone().requires_grad_()
        with offloads.catching(op.stage, op.index):
            graphs[op.index] = net(x).sum()
        outputs.append(graphs[op.index].detach())

    def backward(op: Op) -> None:
        graphs.pop(op.index).backward()

    handlers: dict[object, Callable[[Op], None]] = {Kinds.FORWARD: forward, Kinds.BACKWARD: backward}
    handlers |= offloads.handlers
    for _ in range(steps):
        outputs.clear()
        net.zero_grad()
        for op in program.ranks[0]:
            handlers[op.kind](op)
            between(op)
    held = offloads.host_bytes, offloads.disk_bytes
    offloads.close()
    return Ran([p.grad.clone() for p in net.parameters() if p.grad is not None], outputs, *held)


@contextmanager
def _lanes(make: Callable[[str], Lane] = lambda name: Lane(name, CPU)) -> Iterator[tuple[Lane, Lane]]:
    lanes = make("out"), make("back")
    try:
        yield lanes
    finally:
        for lane in lanes:
            lane.close()


def test_gradients_are_those_of_activations_that_stayed() -> None:
    with _lanes() as (out, back):
        plain = run_net(generate("gpipe", ranks=1, microbatches=4), out, back)
        for share in (0.5, 1.0):
            moved = run_net(_program(4, share), out, back)
            assert all(torch.equal(a, b) for a, b in zip(plain.grads, moved.grads, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(plain.outputs, moved.outputs, strict=True))
            assert moved.host_bytes > 0
        assert plain.host_bytes == 0


@pytest.mark.parametrize("seed", range(12))
def test_slow_copies_that_end_in_any_order_change_nothing(seed: int) -> None:
    with _lanes() as (out, back):
        plain = run_net(generate("gpipe", ranks=1, microbatches=3), out, back)
    with _lanes(lambda name: SlowLane(name, seed=seed)) as (out, back):
        moved = run_net(_program(3), out, back)
    assert all(torch.equal(a, b) for a, b in zip(plain.grads, moved.grads, strict=True))


def test_a_storage_is_kept_once_and_parameters_and_small_tensors_stay() -> None:
    torch.manual_seed(0)
    net, x = Net(), _inputs(1)[0].requires_grad_()
    saved = Saved(CPU, {storage_id(p.untyped_storage()) for p in net.parameters()})
    packed: list[Tensor | View] = []
    pack = saved.pack
    saved.pack = lambda tensor: packed.append(pack(tensor)) or packed[-1]
    with saved.catching():
        net(x).sum()
    views = [each for each in packed if isinstance(each, View)]
    assert len({id(view.block) for view in views}) == len(saved.blocks) < len(views)
    addresses = [block.storage.data_ptr() for block in saved.blocks if block.storage is not None]
    assert len(set(addresses)) == len(addresses) == len(saved.blocks)
    assert not {p.untyped_storage().data_ptr() for p in net.parameters()} & set(addresses)
    assert all(isinstance(each, View) or each.numel() <= 48 * 96 for each in packed)
    assert saved.nbytes < sum(block.nbytes for block in saved.blocks) + 64 * len(saved.blocks)
    for block, after in zip(saved.blocks, saved.blocks[1:], strict=False):
        assert block.at + block.nbytes <= after.at and after.at % 64 == 0


def test_nothing_is_left_on_the_device_while_it_is_away() -> None:
    torch.manual_seed(0)
    net, program = Net(), _program(2)
    with _lanes() as (out, back):
        offloads = Offloads(program, 0, out=out, back=back, device=CPU, elsewhere=set())
        with offloads.catching(0, 0):
            loss = net(_inputs(1)[0]).sum()
        blocks = list(offloads._saved[0, 0].blocks)
        gone = [weakref.ref(block.storage) for block in blocks if block.storage is not None]
        handlers = offloads.handlers
        handlers[Kinds.OFFLOAD](Op(Kinds.OFFLOAD, 0, 0, 0))
        handlers[Kinds.RELEASE](Op(Kinds.RELEASE, 0, 0))
        assert gone and all(block.storage is None for block in blocks)
        with pytest.raises(RuntimeError, match="on the host"):
            loss.backward()
        offloads.close()


def test_an_activation_goes_through_its_states_in_order() -> None:
    with _lanes() as (out, back):
        offloads = Offloads(_program(2), 0, out=out, back=back, device=CPU, elsewhere=set())
        with offloads.catching(0, 0):
            loss = (torch.ones(2000, requires_grad=True) * 2).square().sum()
        with pytest.raises(RuntimeError, match="REL0@0: its activation is NEW, not SAVING"):
            offloads.handlers[Kinds.RELEASE](Op(Kinds.RELEASE, 0, 0))
        assert float(loss) == 8000.0
        offloads.close()


def test_slabs_are_used_again_and_grow_where_more_is_saved_than_before() -> None:
    program = _program(2)
    with _lanes() as (out, back):
        offloads = Offloads(program, 0, out=out, back=back, device=CPU, elsewhere=set())
        sizes = []
        for rows in (3000, 3000, 9000, 5000):
            for op in program.ranks[0]:
                if op.kind is Kinds.FORWARD:
                    with offloads.catching(0, op.index):
                        (torch.ones(rows, requires_grad=True) * 2).square()
                elif op.kind is not Kinds.BACKWARD:
                    offloads.handlers[op.kind](op)
            sizes.append(offloads.host_bytes)
        assert sizes[0] == sizes[1] and sizes[2] == sizes[3]
        # Planned in pages, of which the smallest activation has a hundred.
        assert 2 * 12032 <= sizes[0] <= 2 * 12032 * 1.01 and 2 * 36032 <= sizes[2] <= 2 * 36032 * 1.01
        offloads.close()
        assert offloads.host_bytes == 0


def test_what_is_left_half_way_is_dropped_whatever_the_copies_do_and_the_next_step_is_right() -> None:
    """Also after an abort, when nobody may wait: a copy that is late neither blocks the end nor spoils a slab."""
    program = _program(2)
    with _lanes(lambda name: SlowLane(name, seed=5)) as (out, back):
        out._abort.trigger("somebody is gone")
        offloads = Offloads(program, 0, out=out, back=back, device=CPU)
        with offloads.catching(0, 0):
            (torch.ones(3000, requires_grad=True) * 2).square()
        offloads.handlers[Kinds.OFFLOAD](Op(Kinds.OFFLOAD, 0, 0, 0))
        with pytest.raises(Aborted):
            offloads.handlers[Kinds.RELEASE](Op(Kinds.RELEASE, 0, 0))
        offloads.clear()
        with offloads.catching(0, 0):
            (torch.ones(3000, requires_grad=True) * 2).square()
        assert len(offloads._saved) == 1
        offloads.close()
        assert offloads.host_bytes == 0


@pytest.mark.parametrize("size", [10, 3000], ids=["stays", "moves"])
def test_a_node_that_never_runs_holds_nothing_for_ever(size: int) -> None:
    """The weights of choices that nobody takes: their softmax keeps its own result."""
    saved = Saved(CPU, set())
    x = torch.ones(size, requires_grad=True)
    with saved.catching():
        y = torch.softmax(x * 2, 0)
    gone = weakref.ref(y.untyped_storage())
    del y, saved
    assert gone() is None


def test_what_has_come_back_goes_as_soon_as_it_was_used() -> None:
    """While a chain runs backward, every link's saved input is gone when the link before it is reached."""
    links, size = 6, 4096
    (ops,) = _program(1).ranks
    alive: list[int] = []
    stored: list[weakref.ref[torch.UntypedStorage]] = []

    def count(_: Tensor) -> None:
        alive.append(sum(each() is not None for each in stored))

    with _lanes() as (out, back):
        offloads = Offloads(_program(1), 0, out=out, back=back, device=CPU)
        graph = torch.zeros(())
        for op in ops:
            match op.kind:
                case Kinds.FORWARD:
                    x = torch.rand(size, dtype=torch.float64, requires_grad=True)
                    with offloads.catching(op.stage, op.index):
                        for _ in range(links):
                            x.register_hook(count)
                            x = x.sin()
                    graph = x.sum()
                    del x
                case Kinds.BACKWARD:
                    graph.backward()
                case _:
                    held = offloads._saved.get((op.stage, op.index))
                    if op.kind is Kinds.RESUME and held is not None:
                        stored = [weakref.ref(b.storage) for b in held.blocks if b.storage is not None]
                    del held
                    offloads.handlers[op.kind](op)
        offloads.close()
    assert alive == sorted(alive, reverse=True)
    assert alive[0] >= links - 2 and alive[-1] <= 1, alive
