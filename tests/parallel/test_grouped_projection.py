"""The grouped projection: every backend against one GEMM per expert and against autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.configs.errors import UserError
from pentad.models.functional import swiglu
from pentad.parallel.gradients import Slot, WeightGradients, give_slot
from pentad.parallel.grouped_projection import Groups, Local, RecomputedInput
from pentad.parallel.kernels.grouped_gemm import Bmm, GroupedMm, Loop, RoundedLoop, _window, gemms

UNEVEN = (5, 0, 9, 1, 0, 17)
EVEN = (6, 6, 6, 6)
EMPTY = (0, 0, 0)
IN, OUT = 16, 24


@dataclass(frozen=True)
class _Linear:
    weight: nn.Parameter
    bias: nn.Parameter | None


def _linear(experts: int, dtype: torch.dtype, *, bias: bool, seed: int) -> _Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, OUT, IN, generator=generator, dtype=torch.float64).to(dtype)
    shift = torch.randn(experts, OUT, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return _Linear(nn.Parameter(weight), None if shift is None else nn.Parameter(shift))


def _plain(x: Tensor, counts: Sequence[int], linear: _Linear, weights: Tensor | None = None) -> Tensor:
    """The definition, for autograd."""
    parts = []
    for e, rows in enumerate(x.split(list(counts))):
        y = rows @ linear.weight[e].t()
        parts.append(y if linear.bias is None else y + linear.bias[e])
    y = torch.cat(parts)
    if weights is not None:
        y = y * weights.unsqueeze(-1)
    return y


def _run(
    compute: str, dtype: torch.dtype, counts: tuple[int, ...], *, bias: bool = True, count: int = 2
) -> list[Tensor]:
    """Outputs and gradients of two linears of the same rows."""
    linears = [_linear(len(counts), dtype, bias=bias, seed=i) for i in range(count)]
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(sum(counts), IN, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    ys = Local(compute)(x, Groups(counts), linears)
    dys = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(dtype) for y in ys]
    params = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
    return [*ys, *torch.autograd.grad(ys, (x, *params), dys)]


@pytest.mark.parametrize("counts", [UNEVEN, EVEN, EMPTY])
@pytest.mark.parametrize("bias", [False, True])
def test_loop_equals_the_definition(counts: tuple[int, ...], bias: bool) -> None:
    linears = [_linear(len(counts), torch.float64, bias=bias, seed=i) for i in range(2)]
    x = torch.randn(sum(counts), IN, dtype=torch.float64, requires_grad=True)
    ys = Local("loop")(x, Groups(counts), linears)
    plain = [_plain(x, counts, linear) for linear in linears]
    dys = [torch.randn_like(y) for y in ys]
    params = [p for linear in linears for p in (linear.weight, linear.bias) if p is not None]
    torch.testing.assert_close(list(ys), plain)
    ours, theirs = torch.autograd.grad(ys, (x, *params), dys), torch.autograd.grad(plain, (x, *params), dys)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("compute", "counts"), [("grouped_mm", UNEVEN), ("grouped_mm", EVEN), ("bmm", EVEN)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_equal_the_loop(compute: str, counts: tuple[int, ...], dtype: torch.dtype) -> None:
    """bf16: x and dy are the same, so both sides round the same sums, in the worst case one step apart."""
    rtol, atol = (1e-5, 1e-4) if dtype == torch.float32 else (2**-7, 0.1)
    for ours, loop in zip(_run(compute, dtype, counts), _run("loop", dtype, counts), strict=True):
        torch.testing.assert_close(ours, loop, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("compute", ["loop", "grouped_mm"])
def test_low_precision_against_fp64(compute: str, dtype: torch.dtype) -> None:
    scale = 2**-7 if dtype == torch.bfloat16 else 1e-6
    for ours, exact in zip(_run(compute, dtype, UNEVEN), _run("loop", torch.float64, UNEVEN), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - exact).norm() <= scale * exact.norm()


def test_grouped_mm_repeats_the_loop_bit_for_bit_in_fp32() -> None:
    for ours, loop in zip(
        _run("grouped_mm", torch.float32, UNEVEN, count=1), _run("loop", torch.float32, UNEVEN, count=1), strict=True
    ):
        assert torch.equal(ours, loop)


@pytest.mark.parametrize(("compute", "counts"), [("loop", UNEVEN), ("bmm", EVEN), ("auto", UNEVEN), ("auto", EMPTY)])
def test_gradcheck(compute: str, counts: tuple[int, ...]) -> None:
    """With the activation, the rows' weights and a bias in the same projection."""
    linear = _linear(len(counts), torch.float64, bias=True, seed=0)
    gate, up = (torch.randn(sum(counts), IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(sum(counts), dtype=torch.float64, requires_grad=True)

    def project(gate: Tensor, up: Tensor, weights: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        made = RecomputedInput(swiglu, (gate, up), weights)
        return Local(compute)(made, Groups(counts), [_Linear(weight, bias)])[0]  # pyright: ignore[reportArgumentType]

    assert linear.bias is not None
    assert torch.autograd.gradcheck(project, (gate, up, weights, linear.weight, linear.bias), fast_mode=True)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_made_input_equals_a_kept_one(weighted: bool, bias: bool) -> None:
    linear = _linear(len(UNEVEN), torch.float64, bias=bias, seed=0)
    gate, up = (torch.randn(sum(UNEVEN), IN, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(sum(UNEVEN), dtype=torch.float64, requires_grad=True) if weighted else None
    inputs = [t for t in (gate, up, weights, linear.weight, linear.bias) if t is not None]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = Local("loop")(RecomputedInput(swiglu, (gate, up), weights), Groups(UNEVEN), [linear])[0]
    assert {id(t) for t in kept} <= {id(t) for t in inputs}
    plain = _plain(F.silu(gate) * up, UNEVEN, linear, weights)
    dy = torch.randn_like(plain)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(plain, inputs, dy))


def test_a_made_input_may_need_no_gradient() -> None:
    """Which tokens the rows are is no number to differentiate."""
    linear = _linear(2, torch.float64, bias=False, seed=0)
    x, index = torch.randn(3, IN, dtype=torch.float64, requires_grad=True), torch.tensor([2, 0, 2, 1])
    ours = Local("loop")(RecomputedInput(torch.Tensor.__getitem__, (x, index)), Groups((3, 1)), [linear])[0]
    plain = _plain(x[index], (3, 1), linear)
    wanted = torch.autograd.grad(plain.sum(), (x, linear.weight))
    for a, b in zip(torch.autograd.grad(ours.sum(), (x, linear.weight)), wanted, strict=True):
        torch.testing.assert_close(a, b)


def _with_slots(linear: _Linear, dtype: torch.dtype, microbatches: int) -> tuple[list[Slot], list[str]]:
    slots, final = [], []
    for name, param in (("weight", linear.weight), ("bias", linear.bias)):
        assert param is not None
        buffer = torch.full(param.shape, torch.nan, dtype=dtype)
        slot = Slot(buffer, lambda name=name: final.append(name))
        slot.start_step(microbatches)
        give_slot(param, slot)
        slots.append(slot)
    return slots, final


Backward = Callable[[Tensor, Tensor], None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("compute", ["loop", "grouped_mm", "auto"])
def test_slots_get_what_autograd_gets(dtype: torch.dtype, deferred: bool, compute: str) -> None:
    """Three microbatches, of which the middle one has no rows, and an expert without rows in the first one."""
    if compute == "grouped_mm" and dtype == torch.float64:
        compute = "loop"
    batches = [UNEVEN, (0,) * 6, (1, 2, 3, 0, 5, 6)]
    linear, twin = (_linear(6, dtype, bias=True, seed=0) for _ in range(2))
    sums = torch.promote_types(dtype, torch.float32)
    slots, final = _with_slots(linear, sums, len(batches))
    store = WeightGradients()
    for slot in slots:
        slot.store = store
    expected: list[Tensor] = [torch.zeros_like(slot.buffer) for slot in slots]
    for i, counts in enumerate(batches):
        assert not final
        x = torch.randn(sum(counts), IN, dtype=torch.float64).to(dtype)
        dy = torch.randn(sum(counts), OUT, dtype=torch.float64).to(dtype)
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        if deferred:
            with store.deferring(i):
                Local(compute)(ours, Groups(counts), [linear])[0].backward(dy)
            assert "weight" not in final
            store.compute(i)
        else:
            Local(compute)(ours, Groups(counts), [linear])[0].backward(dy)
        params = [p for p in (twin.weight, twin.bias) if p is not None]
        dx, *grads = torch.autograd.grad(_plain(theirs, counts, twin), (theirs, *params), dy)
        expected = [total + grad.to(sums) for total, grad in zip(expected, grads, strict=True)]
        torch.testing.assert_close(ours.grad, dx, rtol=2**-7, atol=1e-4 if dtype != torch.bfloat16 else 0.1)
    assert sorted(final) == ["bias", "weight"]
    for slot, total in zip(slots, expected, strict=True):
        error = (slot.buffer - total).norm() / total.norm()
        assert error < {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]


@pytest.mark.parametrize("compute", ["auto", "loop", "grouped_mm", "bmm"])
def test_no_rows_at_all_give_zero_gradients_once(compute: str) -> None:
    linear = _linear(3, torch.float32, bias=True, seed=0)
    slots, final = _with_slots(linear, torch.float32, 1)
    x = torch.zeros(0, IN, requires_grad=True)
    (y,) = Local(compute)(x, Groups(EMPTY), [linear])
    y.sum().backward()
    assert y.shape == (0, OUT) and x.grad is not None and x.grad.shape == (0, IN)
    assert sorted(final) == ["bias", "weight"]
    assert all(not slot.buffer.any() for slot in slots)


@pytest.mark.parametrize("counts", [(300, 0, 37, 20, 1, 129), (1, 5), (9,), (0, 77, 3, 3, 3, 0), (40, 8, 16)])
@pytest.mark.parametrize("fresh", [True, False])
def test_rounding_changes_no_product(counts: tuple[int, ...], fresh: bool) -> None:
    """fp64 against the plain loop, with experts at the end that have no rows behind them to round up with."""
    groups, rows = Groups(counts), sum(counts)
    x, dys = torch.randn(rows, IN).double(), [torch.randn(rows, OUT).double() for _ in range(2)]
    weights = [torch.randn(len(counts), OUT, IN).double() for _ in range(2)]
    found = []
    for way in (RoundedLoop(groups), Loop(groups)):
        total = torch.full_like(weights[0], torch.nan if fresh else 3.0)
        way.add_weight(dys[0], x, total, fresh)
        narrow = torch.zeros(len(counts), IN, OUT).double()  # the other operand is the narrower one
        way.add_weight(x, dys[0], narrow, True)
        found.append([way.forward(x, weights[0]), way.backward(dys, weights), total, narrow])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)


def test_rounding_leaves_few_numbers_of_rows() -> None:
    sizes = set()
    for count in range(1, 2049):
        window = _window(100, 100 + count, 10_000)
        assert window.start == 100 and count <= window.stop - 100 <= max(count + 7, count * 17 / 16)
        sizes.add(window.stop - window.start)
    assert len(sizes) <= 16 + 4 * 16


def test_impossible_choices_name_the_key() -> None:
    x, weight = torch.zeros(sum(UNEVEN), IN), torch.zeros(len(UNEVEN), OUT, IN)
    with pytest.raises(
        UserError, match=r"model\.moe\.compute: bmm needs equally many rows .* 0 to 17.*model\.moe\.pad"
    ):
        gemms("bmm", x, weight, Groups(UNEVEN))
    with pytest.raises(UserError, match=r"model\.moe\.compute: grouped_mm has no fp64"):
        gemms("grouped_mm", x.double(), weight.double(), Groups(UNEVEN))
    with pytest.raises(UserError, match=r"model\.moe\.compute: .* multiples of 4 .* 24 × 14"):
        gemms("grouped_mm", torch.zeros(sum(UNEVEN), 14), torch.zeros(len(UNEVEN), OUT, 14), Groups(UNEVEN))


def test_auto_only_chooses_what_can_be_done() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for width in (14, 16):
            weight = torch.zeros(6, OUT, width, dtype=dtype)
            way = gemms("auto", torch.zeros(sum(UNEVEN), width, dtype=dtype), weight, Groups(UNEVEN))
            assert isinstance(way, GroupedMm) == (dtype == torch.bfloat16 and width == 16)
    assert isinstance(gemms("auto", torch.zeros(24, IN), torch.zeros(4, OUT, IN), Groups(EVEN)), Bmm)
    for dtype, way in ((torch.float32, Loop), (torch.bfloat16, RoundedLoop)):
        x, weight = torch.zeros(1024, IN, dtype=dtype), torch.zeros(2, OUT, IN, dtype=dtype)
        assert isinstance(gemms("auto", x, weight, Groups((1000, 24))), way)
