"""The vocabulary cut over tp x pp against one dense embedding and head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pentad.parallel.balanced_vocab import BalancedEmbedding, BalancedHead
from pentad.parallel.comm.lane import Lane
from pentad.parallel.comm.mesh import Degrees, Mesh
from pentad.parallel.gradients import Slot, give_slot, slot_of
from pentad.parallel.record.ring import Recorder
from pentad.parallel.vocab import IGNORED, VocabShard
from tests.distributed import job_store, run_distributed

TOKENS, HIDDEN, VOCAB, MICRO_BATCHES = 24, 16, 48, 3
SCALE = 1 / 37


@dataclass(frozen=True)
class Batch:
    """One microbatch: hidden states (N, h), tokens and labels (N,), the gradient of the embeddings (N, h)."""

    hidden: Tensor
    tokens: Tensor
    labels: Tensor
    grad: Tensor


def _weight(dtype: torch.dtype) -> Tensor:
    return torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def _batch(i: int, dtype: torch.dtype, tokens: int = TOKENS) -> Batch:
    draw = torch.Generator().manual_seed(10 + i)
    labels = torch.randint(VOCAB, (tokens,), generator=draw)
    labels[::5] = IGNORED
    hidden = 3 * torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64)
    grad = torch.randn(tokens, HIDDEN, generator=draw, dtype=torch.float64)
    return Batch(hidden.to(dtype), torch.randint(VOCAB, (tokens,), generator=draw), labels, grad.to(dtype))


def _dense(dtype: torch.dtype, tokens: int = TOKENS) -> dict[str, Tensor]:
    """What one process computes, in fp64 from the same (rounded) inputs."""
    head, table = (_weight(dtype).double().requires_grad_() for _ in range(2))
    losses, dx, rows = [], [], []
    for i in range(MICRO_BATCHES):
        batch = _batch(i, dtype, tokens)
        x = batch.hidden.double().requires_grad_()
        loss = F.cross_entropy(x @ head.t(), batch.labels, ignore_index=IGNORED, reduction="sum") * SCALE
        loss.backward()
        found = F.embedding(batch.tokens, table)
        found.backward(batch.grad.double())
        losses.append(loss.detach())
        dx.append(x.grad)
        rows.append(found.detach())
    assert head.grad is not None and table.grad is not None
    return {
        "loss": torch.stack(losses),
        "dx": torch.stack(dx),
        "head": head.grad,
        "rows": torch.stack(rows),
        "table": table.grad,
    }


def _slot(weight: Tensor, finals: list[str], name: str) -> nn.Parameter:
    param = nn.Parameter(weight.clone())
    buffer = torch.full(weight.shape, float("nan"), dtype=torch.promote_types(weight.dtype, torch.float32))
    slot = Slot(buffer, lambda: finals.append(name))
    give_slot(param, slot)
    slot.start_step(MICRO_BATCHES)
    return param


def _slot_of(param: torch.Tensor) -> Slot:
    slot = slot_of(param)
    assert slot is not None
    return slot


class _Rank:
    """Embedding and head of one rank."""

    def __init__(
        self,
        rank: int,
        tp: int,
        pp: int,
        barriers: int,
        dtype: torch.dtype,
        at: tuple[int, int],
        memory: bool = True,
    ) -> None:
        recorder = Recorder(None, rank=rank, world=tp * pp, entries=1024)
        degrees = Degrees(tp=tp, pp=pp)
        store = job_store() if degrees.world > 1 else None
        self.mesh = Mesh(degrees, store=store, rank=rank, device="cpu", recorder=recorder, timeout_s=60, vocab=True)
        head, embed = self.mesh.axis("vocab_head"), self.mesh.axis("vocab_embed")
        if not memory:
            head, embed = replace(head, local=None), replace(embed, local=None)
        self.lanes = [Lane("head", "cpu", head), Lane("embed", "cpu", embed)]
        shard = VocabShard.of(head, VOCAB)
        first, last = (tuple(range(stage * tp, stage * tp + tp)) for stage in at)
        self.head = BalancedHead(head, self.lanes[0], shard, last, barriers)
        self.embed = BalancedEmbedding(embed, self.lanes[1], shard, first)
        self.finals: list[str] = []
        weight = _weight(dtype)[shard.start : shard.stop]
        self.weight, self.table = _slot(weight, self.finals, "head"), _slot(weight, self.finals, "table")
        self.barriers, self.dtype, self.tp = barriers, dtype, self.mesh.axis("tp")

    def part(self, x: Tensor, owner: bool) -> Tensor | None:
        return x.chunk(self.tp.size)[self.tp.rank] if owner else None

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        self.mesh.close()


def _passes(
    rank: int, world: int, tp: int, barriers: int, dtype: torch.dtype, at: tuple[int, int], tokens: int, memory: bool
) -> dict[str, Any]:
    """Three microbatches, interleaved: a pass of one between the passes of the others."""
    r = _Rank(rank, tp, world // tp, barriers, dtype, at, memory)
    batches = [_batch(i, dtype, tokens) for i in range(MICRO_BATCHES)]
    out: dict[str, Any] = {"loss": [], "dx": [], "rows": []}
    size = (tokens, HIDDEN, dtype)
    for i, batch in enumerate(batches):
        r.embed.look_up(i, batch.tokens, r.table)
        r.embed.post_rows(i)
        r.head.post_hidden(i, r.part(batch.hidden, r.head.is_owner), *size)
    for i, batch in enumerate(batches):
        r.head.score(i, r.weight, batch.labels, SCALE)
        r.head.post_statistics(i)
        r.embed.post_grad(i, r.part(batch.grad, r.embed.is_owner), *size)
    for i in (1, 0, 2):
        r.head.weight_grad(i, r.weight)
        if barriers == 2:
            r.head.post_hidden_grad(i)
    for i in reversed(range(MICRO_BATCHES)):
        r.embed.weight_grad(i, batches[i].tokens, r.table)
    for i in range(MICRO_BATCHES):
        out["loss"].append(r.head.loss(i))
        if r.head.is_owner:
            out["dx"].append(r.head.hidden_grad(i))
        if r.embed.is_owner:
            out["rows"].append(r.embed.rows(i))
    out["head"], out["table"] = _slot_of(r.weight).buffer, _slot_of(r.table).buffer
    out["finals"] = r.finals
    out["kept"] = sum(len(v) for part in (r.head, r.embed) for v in vars(part).values() if isinstance(v, dict))
    r.close()
    return out


def _joined(outputs: list[dict[str, Any]], name: str) -> Tensor:
    """(microbatches, N, h) from the owners' blocks."""
    return torch.cat([torch.stack(o[name]) for o in outputs if o[name]], dim=1)


def _compare(outputs: list[dict[str, Any]], dtype: torch.dtype, tokens: int = TOKENS) -> None:
    expected = _dense(dtype, tokens)
    found = {
        "loss": torch.stack(outputs[-1]["loss"]),
        "dx": _joined(outputs, "dx"),
        "rows": _joined(outputs, "rows"),
        "head": torch.cat([o["head"] for o in outputs]),
        "table": torch.cat([o["table"] for o in outputs]),
    }
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for name, value in expected.items():
        error = (found[name].double() - value).norm() / value.norm()
        assert error < near, (name, float(error))
    for output in outputs:
        assert torch.equal(torch.stack(output["loss"]), found["loss"])  # every rank, the same bits
        assert sorted(output["finals"]) == ["head", "table"]
        assert output["kept"] == 0  # nothing is kept once it was used


@pytest.mark.distributed
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize(("tp", "pp", "memory"), [(1, 2, True), (2, 2, True), (2, 2, False), (1, 4, True)])
def test_equals_dense(tp: int, pp: int, memory: bool, barriers: int):
    """`memory`: between the ranks' memories, as on one host; or over gloo."""
    args = (tp, barriers, torch.float64, (0, pp - 1), TOKENS, memory)
    _compare(run_distributed(_passes, tp * pp, *args, group=False), torch.float64)


@pytest.mark.distributed
@pytest.mark.parametrize("barriers", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_with_both_ends_on_the_first_rank(dtype: torch.dtype, barriers: int):
    """The placement of V schedules; in bf16 the softmax walks over more than one chunk of tokens."""
    tokens = 1500 if dtype == torch.bfloat16 else TOKENS
    _compare(run_distributed(_passes, 4, 2, barriers, dtype, (0, 0), tokens, True, group=False), dtype, tokens)


def test_one_rank_is_the_dense_head():
    _compare([_passes(0, 1, 1, 1, torch.float64, (0, 0), TOKENS, True)], torch.float64)


def _large_logits(rank: int, world: int) -> tuple[float, bool]:
    """Logits of +-1e3, whose exponentials would overflow without the maximum, and a tensor scale."""
    r = _Rank(rank, 1, world, 1, torch.float32, (0, world - 1))
    batch = _batch(0, torch.float32)
    x = batch.hidden * 300 if r.head.is_owner else None
    r.head.post_hidden(0, x, TOKENS, HIDDEN, torch.float32)
    r.head.score(0, r.weight, batch.labels, torch.tensor(SCALE))
    r.head.post_statistics(0)
    loss = float(r.head.loss(0))
    finite = not r.head.is_owner or bool(r.head.hidden_grad(0).isfinite().all())
    r.close()
    return loss, finite


@pytest.mark.distributed
def test_large_logits_do_not_overflow():
    batch = _batch(0, torch.float32)
    logits = (batch.hidden * 300).double() @ _weight(torch.float32).double().t()
    expected = float(F.cross_entropy(logits, batch.labels, ignore_index=IGNORED, reduction="sum") * SCALE)
    for loss, finite in run_distributed(_large_logits, 2, group=False):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert finite


def _evaluation(rank: int, world: int) -> tuple[float, bool]:
    """Loss only, twice, for a batch of which no token has a loss and one of which most have."""
    r = _Rank(rank, 1, world, 1, torch.float64, (0, 0))
    batch = _batch(0, torch.float64)
    losses = []
    for i, labels in enumerate((torch.full_like(batch.labels, IGNORED), batch.labels)):
        r.head.post_hidden(i, r.part(batch.hidden, r.head.is_owner), TOKENS, HIDDEN, torch.float64)
        r.head.score(i, r.weight, labels, SCALE, with_grad=False)
        r.head.post_statistics(i)
        losses.append(float(r.head.loss(i)))
    assert losses[0] == 0
    untouched = not any(vars(r.head)[name] for name in ("_scored", "_agreed", "_owed"))
    r.close()
    return losses[1], untouched


@pytest.mark.distributed
def test_evaluation_keeps_nothing_for_backward():
    expected = float(_dense(torch.float64)["loss"][0])
    for loss, untouched in run_distributed(_evaluation, 2, group=False):
        assert loss == pytest.approx(expected, rel=1e-12)
        assert untouched


def _tied(rank: int, world: int) -> tuple[Tensor, list[str]]:
    """One parameter for both: its slot gets two gradients of the one microbatch."""
    r = _Rank(rank, 1, world, 1, torch.float64, (0, world - 1))
    batch, size = _batch(0, torch.float64), (TOKENS, HIDDEN, torch.float64)
    weight = r.weight
    slot = _slot_of(weight)
    slot.uses = 2
    slot.start_step(1)
    r.embed.look_up(0, batch.tokens, weight)
    r.embed.post_rows(0)
    r.head.post_hidden(0, batch.hidden if r.head.is_owner else None, *size)
    r.head.score(0, weight, batch.labels, SCALE)
    r.head.post_statistics(0)
    r.embed.post_grad(0, batch.grad if r.embed.is_owner else None, *size)
    r.embed.weight_grad(0, batch.tokens, weight)
    before = list(r.finals)
    r.head.weight_grad(0, weight)
    r.close()
    assert before == []
    return slot.buffer, r.finals


@pytest.mark.distributed
def test_tied_weight_gets_both_gradients():
    outputs = run_distributed(_tied, 2, group=False)
    weight = _weight(torch.float64).requires_grad_()
    batch = _batch(0, torch.float64)
    loss = F.cross_entropy(batch.hidden @ weight.t(), batch.labels, ignore_index=IGNORED, reduction="sum") * SCALE
    (loss + (F.embedding(batch.tokens, weight) * batch.grad).sum()).backward()
    torch.testing.assert_close(torch.cat([grad for grad, _ in outputs]), weight.grad, rtol=1e-12, atol=1e-12)
    assert all(finals == ["head"] for _, finals in outputs)


def test_a_weight_without_slot_keeps_its_gradient():
    r = _Rank(0, 1, 1, 1, torch.float64, (0, 0))
    weight = nn.Parameter(_weight(torch.float64))
    for i in range(MICRO_BATCHES):
        batch, size = _batch(i, torch.float64), (TOKENS, HIDDEN, torch.float64)
        r.head.post_hidden(i, batch.hidden, *size)
        r.head.score(i, weight, batch.labels, SCALE)
        r.head.post_statistics(i)
        r.head.weight_grad(i, weight)
    r.close()
    torch.testing.assert_close(weight.grad, _dense(torch.float64)["head"], rtol=1e-12, atol=1e-12)


def test_only_owners_give_their_hidden_states():
    r = _Rank(0, 1, 1, 1, torch.float64, (0, 0))
    with pytest.raises(ValueError, match="owners"):
        r.head.post_hidden(0, None, TOKENS, HIDDEN, torch.float64)
    r.close()
