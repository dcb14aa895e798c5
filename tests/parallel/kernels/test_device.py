"""All implementations of local attention against softmax attention written out token by token."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.parallel.kernels import device as local_attention
from pentad.parallel.kernels import fused_attention
from pentad.parallel.kernels.attention import attention
from pentad.parallel.kernels.blockwise import Blockwise, blocks
from pentad.parallel.kernels.device import Cpu, Cuda, check_local_attention
from pentad.parallel.kernels.fused_attention import Fused, pieces
from pentad.parallel.kernels.fused_kernels import CpuFlash
from pentad.parallel.kernels.interfaces import LocalAttention, to_be_summed
from pentad.parallel.kernels.mask import Mask, TokenIndex
from pentad.parallel.kernels.merge import merge_
from pentad.parallel.kernels.plain_maths import PlainMaths

LOCALS: dict[str, LocalAttention] = {
    "plain": PlainMaths(), "blockwise": Blockwise(), "fused": Fused(CpuFlash(), CpuFlash())
}  # fmt: skip
SCALE = 0.7


def rows(*orders: Sequence[int], lengths: Sequence[Sequence[int]] | None = None) -> TokenIndex:
    """Of each sequence, or one for all; `lengths`: of the documents of whole sequences."""
    order = torch.tensor([list(order) for order in orders])
    if lengths is None:
        return TokenIndex(order)
    ids = [[i for i, length in enumerate(of_one) for _ in range(length)] for of_one in lengths]
    return TokenIndex(
        order, torch.stack([torch.tensor(of_one)[order[min(i, len(order) - 1)]] for i, of_one in enumerate(ids)])
    )


DOCUMENTS = ((40, 1, 1, 60, 3, 75), (1, 90, 89))
OTHERS = ((180,), (1,) * 50 + (130,))
SPLIT = [*range(30, 60), *range(120, 150)]
MASKS: dict[str, Mask] = {
    "causal": Mask.of(rows(range(180))),
    "one token": Mask.of(rows(range(1))),
    "window": Mask.of(rows(range(180)), 23),
    "window of one": Mask.of(rows(range(70)), 1),
    "wide window": Mask.of(rows(range(180)), 180),
    "documents": Mask.of(rows(range(180), lengths=DOCUMENTS)),
    "many documents": Mask.of(rows(range(180), lengths=OTHERS)),
    "documents and window": Mask.of(rows(range(180), lengths=DOCUMENTS), 30),
    "zigzag": Mask.of(rows(SPLIT)),
    "zigzag, documents": Mask.of(rows(SPLIT, lengths=DOCUMENTS)),
    "zigzag, window": Mask.of(rows(SPLIT), 40),
    "zigzag and all keys": Mask(rows(SPLIT, lengths=DOCUMENTS), rows(range(180), lengths=DOCUMENTS)),
    "zigzag, keys before and after": Mask(rows(SPLIT), rows([*range(30), *range(150, 180)])),
    "keys between": Mask(rows(SPLIT), rows(range(60, 120))),
    "full": Mask(rows(range(100, 180)), rows(range(70))),
    "fewer keys": Mask(rows(range(50, 180)), rows(range(40, 70))),
    "fewer queries": Mask(rows(range(90, 100)), rows(range(180))),
    "some see nothing": Mask(rows(range(150)), rows(range(100, 180))),
    "none see anything": Mask(rows(range(80)), rows(range(80, 160))),
    "nothing in documents": Mask(rows(range(40, 140), lengths=DOCUMENTS), rows(range(40), lengths=DOCUMENTS)),
    "nothing in the window": Mask(rows(range(60, 180)), rows(range(60)), 20),
    "scattered": Mask(rows(range(0, 180, 3)), rows(range(1, 180, 2))),
    "another order in each sequence": Mask(
        rows(range(0, 120), range(60, 180)), rows(range(30, 130), range(0, 200, 2))
    ),
    "another order in each sequence, documents": Mask.of(
        rows([*range(0, 41), *range(80, 119)], range(90, 170), lengths=DOCUMENTS)
    ),
}  # fmt: skip
HEADS = [(4, 4, 8, 8), (4, 2, 8, 8), (4, 1, 6, 10), (2, 2, 12, 8)]


def seen(mask: Mask, batch: int) -> Tensor:
    """(B, n, m) booleans, one by one."""
    found = torch.zeros(batch, mask.queries.count, mask.keys.count, dtype=torch.bool)
    for b in range(batch):
        (q, q_ids), (k, k_ids) = (_lists(x, b) for x in (mask.queries, mask.keys))
        for i in range(len(q)):
            for j in range(len(k)):
                near = mask.window is None or q[i] - k[j] < mask.window
                found[b, i, j] = k[j] <= q[i] and near and q_ids[i] == k_ids[j]
    return found


def _lists(x: TokenIndex, b: int) -> tuple[list[int], list[int]]:
    order = x.order[b if len(x.order) > 1 else 0].tolist()
    return order, [0] * len(order) if x.documents is None else x.documents[b].tolist()


def written_out(q: Tensor, k: Tensor, v: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
    """out and lse with autograd; `found` (B, n, m): what is seen."""
    groups = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(groups, dim=2) for x in (k, v))
    weights = (torch.einsum("bihd,bjhd->bhij", q, k) * SCALE).exp() * found[:, None]
    total = weights.sum(-1)
    out = torch.einsum("bhij,bjhe->bihe", weights / total.clamp(min=1e-300)[..., None], v)
    return out, total.log()


def tensors(mask: Mask, heads: tuple[int, int, int, int], batch: int = 2) -> list[Tensor]:
    """q, k, v, dout."""
    draws = torch.Generator().manual_seed(0)
    n, m = mask.queries.count, mask.keys.count
    many, few, width, value = heads
    shapes = [(batch, n, many, width), (batch, m, few, width), (batch, m, few, value), (batch, n, many, value)]
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in shapes]


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-11) -> None:
    for name, mine, theirs in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(params=list(LOCALS))
def local(request, monkeypatch) -> LocalAttention:
    """With sizes at which 180 tokens meet every kind of piece."""
    monkeypatch.setattr(fused_attention, "_SHORT", 20)
    monkeypatch.setattr(fused_attention, "_MASKED_ROWS", 48)
    return LOCALS[request.param]


@pytest.mark.parametrize("name", MASKS)
def test_against_softmax_written_out(local, name):
    mask = MASKS[name]
    mask = Mask(mask.queries, mask.keys, mask.window)
    found = seen(mask, 2)
    for heads in HEADS if name in ("causal", "documents", "some see nothing") else HEADS[1:3]:
        q, k, v, dout = tensors(mask, heads)
        inputs = [x.requires_grad_() for x in (q, k, v)]
        out, lse = written_out(q, k, v, found)
        expected = (out, lse, *torch.autograd.grad(out, inputs, dout))
        with torch.no_grad():
            mine = local.forward(q, k, v, mask, SCALE)
            grads = local.backward(dout, q, k, v, *mine, mask, SCALE)
        assert_equal((*mine, *grads), expected)
        nothing = ~found.any(-1)
        assert (mine[1].transpose(1, 2)[nothing] == float("-inf")).all() and (mine[0][nothing] == 0).all()


def test_the_cases_are_what_they_are_called():
    for name, some, every in (("some see nothing", True, False), ("none see anything", True, True)):
        nothing = ~seen(MASKS[name], 2).any(-1)
        assert (nothing.any(), nothing.all()) == (some, every)
    assert (~seen(MASKS["nothing in documents"], 2).any(-1)).any()


@pytest.mark.parametrize("sinks", [None, torch.tensor([0.0, 30.0, -2.0, 1.0], dtype=torch.float64)])
def test_keys_in_blocks_with_the_whole_out_and_lse(local, sinks):
    """Three owners of keys, of which one has what no query or only some see; backward of each by itself."""
    queries, batch = rows(SPLIT, lengths=DOCUMENTS), 2
    whole = Mask(queries, rows(range(180), lengths=DOCUMENTS))
    q, k, v, dout = tensors(whole, (4, 2, 8, 6))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected = attention(PlainMaths(), q, k, v, whole, SCALE, sinks)
    if sinks is None:
        torch.testing.assert_close(expected, written_out(q, k, v, seen(whole, batch))[0], rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(expected, inputs, dout)
    q, k, v = (x.detach() for x in inputs)
    owners = [[*range(30), *range(150, 180)], SPLIT, [*range(60, 120)]]
    masks = [Mask(queries, rows(owner, lengths=DOCUMENTS)) for owner in owners]
    out, lse = torch.zeros_like(dout), torch.full((2, 4, len(SPLIT)), float("-inf"), dtype=torch.float64)
    for owner, mask in zip(owners, masks, strict=True):
        merge_(out, lse, *local.forward(q, k[:, owner], v[:, owner], mask, SCALE))
    if sinks is not None:
        value = torch.zeros_like(out)
        merge_(out, lse, value, sinks[None, :, None].expand_as(lse))
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    for owner, mask in zip(owners, masks, strict=True):
        parts = local.backward(dout, q, k[:, owner], v[:, owner], out, lse, mask, SCALE)
        dq += parts[0]
        dk[:, owner] += parts[1]
        dv[:, owner] += parts[2]
    for mine, theirs in zip((dq, dk, dv), grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal", "documents", "some see nothing", "window", "zigzag and all keys"])
def test_lower_precision(local, dtype, name):
    mask = MASKS[name]
    low = [x.to(dtype) for x in tensors(mask, (4, 2, 8, 8))]
    q, k, v, dout = (x.double() for x in low)
    out, lse = PlainMaths().forward(q, k, v, mask, SCALE)
    expected = (out, lse, *PlainMaths().backward(dout, q, k, v, out, lse, mask, SCALE))
    q, k, v, dout = low
    out, lse = local.forward(q, k, v, mask, SCALE)
    found = (out, lse, *to_be_summed(local.backward(dout, q, k, v, out, lse, mask, SCALE), lse))
    assert out.dtype == dtype and all(x.dtype == torch.float32 for x in found[1:])
    for mine, theirs in zip(found, expected, strict=True):
        there = theirs.isfinite()
        assert torch.equal(mine.isfinite(), there)
        error = (mine.double() - theirs)[there].norm() / theirs[there].norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-6)


def test_operands_need_not_be_contiguous(local):
    """Heads first in memory, and one tensor for keys and values."""
    mask = Mask.of(TokenIndex.whole(80))
    q, k, v, dout = tensors(mask, (4, 2, 8, 8))
    expected = local.forward(q, k, v, mask, SCALE)
    grads = local.backward(dout, q, k, v, *expected, mask, SCALE)
    q, dout, out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, dout, expected[0]))
    k, v = torch.cat((k, v), -1).split((8, 8), -1)
    lse = expected[1].transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(x.is_contiguous() for x in (q, k, v, dout, out, lse))
    assert_equal(local.forward(q, k, v, mask, SCALE), expected)
    assert_equal(local.backward(dout, q, k, v, out, lse, mask, SCALE), grads)


@pytest.mark.parametrize("name", MASKS)
def test_blocks_and_pieces_have_all_that_is_seen_once(name, monkeypatch):
    monkeypatch.setattr(fused_attention, "_SHORT", 20)
    monkeypatch.setattr(fused_attention, "_MASKED_ROWS", 48)
    mask = MASKS[name]
    found = seen(mask, 2)
    covered = torch.zeros_like(found)
    for block in blocks(mask.queries, mask.keys, mask.window):
        assert 0 <= block.low <= block.start <= block.high <= mask.keys.count
        assert found[:, block.first : block.last, block.low : block.start].all()
        covered[:, block.first : block.last, block.low : block.high] = True
    assert not (found & ~covered).any()
    times = torch.zeros(found.shape, dtype=torch.int)
    for piece in pieces(mask.queries, mask.keys, mask.window, 2):
        part = (slice(piece.sequence, piece.end), slice(piece.first, piece.last), slice(piece.low, piece.high))
        shape = found[part].shape
        if not piece.masked:
            expected = torch.ones(shape, dtype=torch.bool)
            assert torch.equal(found[part], expected.tril() if piece.causal else expected)
            assert shape[1] == shape[2] or not piece.causal
        times[part] += found[part]
    assert torch.equal(times, found.int())


def test_runs_of_tokens_need_no_masks():
    """Zigzag queries with gathered keys: four kernels without a mask; packed documents: one for each long one."""
    order = [*range(300, 600), *range(1200, 1500)]
    found = [
        (p.first, p.last, p.low, p.high, p.causal, p.masked)
        for p in pieces(rows(order), TokenIndex.whole(1800), None, 1)
    ]
    assert found == [
        (0, 300, 0, 300, False, False),
        (0, 300, 300, 600, True, False),
        (300, 600, 0, 1200, False, False),
        (300, 600, 1200, 1500, True, False),
    ]
    packed = rows(range(1000), lengths=[[500, 20, 30, 450]])
    found = [(p.first, p.last, p.low, p.high, p.causal, p.masked) for p in pieces(packed, packed, None, 1)]
    assert found == [
        (0, 500, 0, 500, True, False),
        (500, 550, 500, 550, False, True),
        (550, 1000, 550, 1000, True, False),
    ]


def test_the_cpu_runs_torchs_operator_for_long_runs_only(monkeypatch):
    monkeypatch.setattr(local_attention, "_LONG", 100)
    monkeypatch.setattr(fused_attention, "_SHORT", 20)
    cpu, packed = Cpu(), rows(range(210), lengths=[[104, 106]])
    for mask, value, fused in (
        (Mask.of(TokenIndex.whole(110)), 8, True),
        (Mask.of(packed), 8, True),
        (Mask.of(TokenIndex.whole(90)), 8, False),
        (Mask.of(TokenIndex.whole(110), 10), 8, False),
        (Mask.of(TokenIndex.whole(110)), 4, False),
        (Mask.of(rows(range(210), lengths=[[160, 50]])), 8, False),
    ):
        q, k, v, dout = (x.float() for x in tensors(mask, (2, 1, 8, value), 1))
        assert isinstance(cpu.best(q, v, mask), Fused if fused else Blockwise)
        found = cpu.forward(q, k, v, mask, SCALE)
        expected = PlainMaths().forward(q, k, v, mask, SCALE)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        grads = (x.backward(dout, q, k, v, *expected, mask, SCALE) for x in (cpu, PlainMaths()))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_what_is_kept_for_backward():
    """q, k, v, out and the log-sum-exp, and no copies of them."""
    mask = Mask.of(TokenIndex.whole(70))
    q, k, v, _ = (x.requires_grad_() for x in tensors(mask, (4, 2, 8, 6)))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = attention(Blockwise(), q, k, v, mask, SCALE)
    assert [x.data_ptr() for x in kept[:4]] == [x.data_ptr() for x in (q, k, v, out)]
    assert kept[4].shape == (2, 4, 70) and len(kept) == 5


def test_blocks_of_packed_documents_leave_out_other_documents():
    packed = rows(range(1024), lengths=[[256] * 4])
    cells = sum((b.last - b.first) * (b.high - b.low) for b in blocks(packed, packed, None))
    assert cells == 4 * sum(64 * 64 * i for i in range(1, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(16, 16), (24, 16)])
def test_the_check_at_the_start_passes_what_is_right(local, dtype, widths):
    check_local_attention(local, torch.device("cpu"), dtype, *widths)


def test_the_check_at_the_start_finds_what_is_wrong():
    class Zero(CpuFlash):
        def backward(self, dout, q, k, v, out, lse, causal, hidden, scale):
            return super().backward(dout, q, k, v, torch.zeros_like(out), lse, causal, hidden, scale)

    class Gone(CpuFlash):
        def forward(self, q, k, v, causal, hidden, scale):
            raise RuntimeError("no such operator")

    with pytest.raises(UserError, match="gives a wrong dq with PyTorch"):
        check_local_attention(Fused(Zero(), Zero()), torch.device("cpu"), torch.float32, 16, 16)
    with pytest.raises(UserError, match=r"does not run with PyTorch.*no such operator"):
        check_local_attention(Fused(Gone(), Gone()), torch.device("cpu"), torch.float32, 16, 16)


@pytest.mark.parametrize("widths", [(192, 128), (64, 64)])
@pytest.mark.parametrize(
    ("capability", "deterministic", "runs", "fast"),
    [
        ((9, 0), False, True, True),
        ((9, 0), True, True, False),
        ((9, 0), False, False, False),
        ((8, 0), False, True, False),
    ],
)
def test_hopper_takes_cudnn_where_it_runs_and_need_not_repeat(
    monkeypatch, widths, capability, deterministic, runs, fast
):
    """cuDNN sums in any order; FlashAttention fills heads up to one width and can sum in one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    monkeypatch.setattr(local_attention, "cudnn_runs", lambda *_: runs)
    cuda = Cuda()
    q, v = (torch.zeros(1, 4, 2, width, dtype=torch.bfloat16) for width in widths)
    assert cuda.best(q, v, Mask.of(TokenIndex.whole(4))) is (cuda._cudnn if fast else cuda._flash)


def test_cudnn_that_does_not_run_is_told_and_replaced(capsys):
    local_attention.cudnn_runs.cache_clear()
    assert not any(local_attention.cudnn_runs(torch.device("cpu"), torch.bfloat16, 64, 64) for _ in range(2))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: cuDNN's attention (causal) does not run with PyTorch")
    assert line.endswith(": FlashAttention-2 is used, which is slower")
