"""What attention and the head hold while they work, against the live tensors of the real ones."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from pentad.configs import ModelConfig, resolve_model
from pentad.models.costs.moments.cores import core_backward, core_forward
from pentad.models.costs.moments.tape import Tape
from pentad.models.costs.moments.ways import CPU, Bench
from pentad.models.costs.widths import LocalWork
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.context.gather import GatherKeysValues
from pentad.parallel.context.layout import deal_of
from pentad.parallel.context.ring import Ring
from pentad.parallel.context.tokenring import TokenRing
from pentad.parallel.context.ulysses import Ulysses
from pentad.parallel.kernels.attention import attention
from pentad.parallel.kernels.device import Cpu
from pentad.parallel.kernels.interfaces import AttentionCall, Core
from pentad.parallel.kernels.mask import Mask, TokenLayout
from pentad.parallel.record.ring import Recorder
from pentad.parallel.vocab import VocabHead, VocabShard
from pentad.trainer.memory.stages import logits_bytes
from tests.distributed import job_store, run_distributed
from tests.peak_bytes import PeakBytes

BATCH, WIDTH = 2, 32


def bench(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype, method: str = "", ranks: int = 1) -> Bench:
    model = resolve_model(
        ModelConfig(
            layers=1, hidden=64, heads=heads, kv_heads=kv_heads, head_dim=WIDTH, ffn=64, vocab=64, max_positions=4096
        ),
        4096,
    )
    exchanged = ranks if method == "ulysses" else 1
    work = LocalWork(sequences=BATCH, tokens=BATCH * tokens, width=dtype.itemsize, exchanged=exchanged)
    return Bench(model=model, work=work, ways=CPU, method=method, ranks=ranks)


@dataclass(frozen=True)
class Peaks:
    """Bytes beside the operands, or the gradient of the result with what forward kept."""

    forward: float
    backward: float


def modelled(b: Bench) -> Peaks:
    q, kv = b.tokens(b.w.q), b.tokens(b.w.kv)
    t = Tape({"queries": q, "keys": kv, "values": kv})
    core_forward(t, b)
    forward = t.peak - q - 2 * kv
    # Here the caller holds the result and its gradient to the end; of exchanged heads a layer lets go of them.
    kept = [name for name in t.live if not name.startswith("own") and name != "attention output by token"]
    back = Tape({name: t.live[name] for name in kept} | {"d attention output": q})
    given = back.now
    core_backward(back, b)
    return Peaks(forward, back.peak - given + (q if b.work.exchanged > 1 else 0.0))


def operands(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries and keys as the rotation leaves them, head by head; values as they come."""
    q, k, v = (torch.randn(BATCH, n, tokens, WIDTH, dtype=torch.float64).to(dtype) for n in (heads, kv_heads, kv_heads))
    found = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2).contiguous()
    return [x.requires_grad_() for x in found]


def measured(core: Core, given: list[Tensor], layout: TokenLayout) -> Peaks:
    call = AttentionCall(layout, None, WIDTH**-0.5)
    q, k, v = given
    core(q, k, v, call)  # masks and plans are made once
    live = PeakBytes()
    live.see(*given)
    before = live.now()
    with live:
        out = core(q, k, v, call)
    forward = live.peak - before
    dout = torch.randn_like(out)
    live.reset()
    live.see(dout)
    before = live.now()
    with live:
        torch.autograd.grad(out, given, dout)
    return Peaks(forward, live.peak - before)


def alone(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    return attention(Cpu(), q, k, v, call.layout.once(Mask.of, call.layout.mine, None), call.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("heads", "kv_heads", "tokens"), [(8, 8, 256), (8, 2, 512), (4, 2, 1024)])
def test_attention_of_one_device(heads: int, kv_heads: int, tokens: int, dtype: torch.dtype) -> None:
    """Blocks of queries up to 1024 tokens, from there on one kernel."""
    real = measured(alone, operands(heads, kv_heads, tokens, dtype), TokenLayout.whole(tokens))
    model = modelled(bench(heads, kv_heads, tokens, dtype))
    assert model.forward == pytest.approx(real.forward, rel=0.1)
    assert model.backward == pytest.approx(real.backward, rel=0.1)


METHODS = ("ring", "ulysses", "allgather", "tokenring")
SHAPES = [(8, 8, 128), (8, 4, 256)]


def core_of(name: str, mesh: Mesh) -> Core:
    axis, back, local = mesh.axis("cp"), mesh.axis("cp_back"), Cpu()
    match name:
        case "ring":
            return Ring(axis, back, local)
        case "ulysses":
            return Ulysses(axis, local, piece_bytes=1)
        case "allgather":
            return GatherKeysValues(axis, local)
        case _:
            return TokenRing(axis, back, local)


def each_method(rank: int, world: int) -> list[Peaks]:
    recorder = Recorder(None, rank=rank, world=world)
    mesh = Mesh(Degrees(cp=world), store=job_store(), rank=rank, device="cpu", recorder=recorder)
    found = []
    for method in METHODS:
        for heads, kv_heads, tokens in SHAPES:
            layout = deal_of("zigzag")(tokens * world, world, rank, None)
            found.append(measured(core_of(method, mesh), operands(heads, kv_heads, tokens, torch.float32), layout))
    mesh.close()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_attention_over_context_ranks(ranks: int) -> None:
    """What the method holds (docs/context.md) and what its kernel does."""
    by_rank = run_distributed(each_method, ranks, group=False)
    cases = [(method, *shape) for method in METHODS for shape in SHAPES]
    for index, (method, heads, kv_heads, tokens) in enumerate(cases):
        model = modelled(bench(heads, kv_heads, tokens, torch.float32, method, ranks))
        real = [peaks[index] for peaks in by_rank]
        for most, said in (
            (max(x.forward for x in real), model.forward),
            (max(x.backward for x in real), model.backward),
        ):
            assert said == pytest.approx(most, rel=0.2), f"{method} {heads} {kv_heads} {ranks}: {real}, {model}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [32 << 10, pytest.param(256 << 10, marks=pytest.mark.slow)])
def test_the_head_holds_one_chunk_of_logits(vocab: int, dtype: torch.dtype) -> None:
    """However many tokens there are; it keeps the gradient of their hidden states, however many words there are."""
    hidden, chunk = 16, 32
    peaks = {}
    weight = torch.nn.Parameter(torch.randn(vocab, hidden, dtype=dtype))
    for tokens in (2 * chunk, 8 * chunk):
        x = torch.randn(tokens, hidden, dtype=dtype, requires_grad=True)
        labels = torch.randint(0, vocab, (tokens,))
        live = PeakBytes()
        live.see(x, weight, labels)
        before = live.now()
        with live:
            loss = VocabHead(VocabShard.whole(vocab), chunk).loss(x, weight, labels, 1.0)
        # Without a slot the weight's gradient is kept too, in fp32.
        table = vocab * hidden * 4
        assert live.now() - before == pytest.approx(tokens * hidden * dtype.itemsize + table, abs=64)
        peaks[tokens] = live.peak - before - table - tokens * hidden * dtype.itemsize
        del loss
        work = LocalWork(sequences=1, tokens=tokens, width=dtype.itemsize)
        b = replace(bench(2, 2, 64, dtype), work=work)
        b = replace(b, model=replace(b.model, hidden=hidden))
        assert logits_bytes(b, tokens, vocab, chunk) == pytest.approx(peaks[tokens], rel=0.02)
    assert peaks[2 * chunk] == pytest.approx(peaks[8 * chunk], rel=0.01)
