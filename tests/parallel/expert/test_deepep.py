"""The DeepEP dispatcher over a buffer that behaves as DeepEP documents, made of plain collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pentad.configs.errors import UserError
from pentad.parallel.comm.collectives import all_to_all
from pentad.parallel.comm.mesh import Axis
from pentad.parallel.expert.deepep import DeepEp
from pentad.parallel.expert.dispatch import AllToAll
from pentad.parallel.expert.routing import Findings, Routing
from pentad.parallel.grouped_projection import Groups
from tests.distributed import run_distributed
from tests.parallel.expert.world import E, H, N, open_mesh, tokens_of

BF16 = torch.bfloat16


class _Event:
    def current_stream_wait(self) -> None:
        pass


class _Buffer:
    """Normal kernels of `deep_ep.Buffer` within a node: a token once to each rank that has an expert of it."""

    def __init__(self, ep: Axis) -> None:
        self.ep, self.layouts = ep, 0

    def capture(self) -> _Event:
        return _Event()

    def get_dispatch_layout(self, ids: Tensor, experts: int) -> tuple[Any, ...]:
        self.layouts += 1
        ranks = torch.where(ids < 0, self.ep.size, ids // (experts // self.ep.size))
        in_rank = torch.stack([(ranks == r).any(1) for r in range(self.ep.size)], 1)
        per_expert = torch.bincount(ids.flatten() + 1, minlength=experts + 1)[1:]
        return in_rank.sum(0).int(), None, per_expert.int(), in_rank, _Event()

    def dispatch(self, x: Tensor, handle: Any = None, **given: Any) -> tuple[Any, ...]:
        assert x.dtype == BF16
        assert given["async_finish"] and given["allocate_on_comm_stream"] and given["previous_event"] is not None
        if handle is not None:
            source, send, receive = handle[:3]
            return all_to_all(x[source], self.ep, send, receive).wait(), None, None, None, None, _Event()
        assert given["topk_weights"].dtype == torch.float32 and given["topk_idx"].dtype == torch.int64
        source = torch.cat([in_rank.nonzero().flatten() for in_rank in given["is_token_in_rank"].t()])
        send = given["num_tokens_per_rank"].tolist()
        receive = all_to_all(torch.tensor(send), self.ep).wait().tolist()

        def move(rows: Tensor) -> Tensor:
            return all_to_all(rows[source], self.ep, send, receive).wait()

        mine = len(given["num_tokens_per_expert"]) // self.ep.size
        ids = move(given["topk_idx"]) - self.ep.rank * mine
        ids[(ids < 0) | (ids >= mine)] = -1
        weights = move(given["topk_weights"]).masked_fill(ids < 0, 0.0)
        counts = torch.bincount(ids.flatten() + 1, minlength=mine + 1)[1:].tolist()
        return move(x), ids, weights, counts, (source, send, receive, len(x)), _Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **given: Any) -> tuple[Any, ...]:
        assert x.dtype == BF16 and x.is_contiguous()
        source, send, receive, tokens = handle

        def total(rows: Tensor) -> Tensor:
            back = all_to_all(rows, self.ep, receive, send).wait()
            return torch.zeros(tokens, rows.shape[1], dtype=back.dtype).index_add_(0, source, back)

        return total(x), None if topk_weights is None else total(topk_weights), _Event()


def _results(rank: int, world: int, ids: str, before: bool) -> tuple[list[list[Tensor]], int]:
    """Output and gradients through both dispatchers, and how many layouts were made for two runs of DeepEP's."""
    mesh = open_mesh(rank, world, 1)
    ep = mesh.axis("ep")
    buffer = _Buffer(ep)
    # Small whole numbers: nothing is rounded in bfloat16, whatever the order of sums.
    draws = torch.Generator().manual_seed(rank)
    tokens, first = tokens_of(rank, ids), ep.rank * (E // world) + 1
    whole = torch.randint(-2, 3, (2, N, H), generator=draws).to(BF16)

    def experts(rows: Tensor, groups: Groups, weights: Tensor | None) -> Tensor:
        out = torch.cat([part * (first + e) for e, part in enumerate(rows.split(groups.counts))])
        return out if weights is None else out * weights.to(out.dtype).unsqueeze(1)

    both = []
    deepep = DeepEp(E, ep, lambda token_bytes: buffer, weigh_before=before)
    reference = AllToAll(E, ep, mesh.axis("etp"), weigh_before=before)
    findings = Findings()
    for dispatcher, kept in ((reference, Findings()), (deepep, findings), (deepep, findings)):
        x = whole[0].clone().requires_grad_()
        weights = torch.ones(tokens.ids.shape).masked_fill(tokens.ids < 0, 0).requires_grad_()
        y, _ = dispatcher(x, Routing(tokens.ids, weights, None, kept), experts, lambda: None)
        y.backward(whole[1])
        assert x.grad is not None and weights.grad is not None
        both.append([y.detach(), x.grad, weights.grad])
    mesh.close()
    return both, buffer.layouts


@pytest.mark.distributed
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("ids", ["dropped", "nothing"])
def test_gives_what_the_all_to_all_gives(ids, before):
    for (reference, *runs), layouts in run_distributed(_results, 4, ids, before, group=False):
        for run in runs:
            for mine, theirs in zip(run, reference, strict=True):
                assert torch.equal(mine, theirs)
        assert layouts == 1  # the second run keeps the first one's


def test_only_bfloat16():
    alone = Axis.single("x")
    tokens = tokens_of(0, "dropless")
    with pytest.raises(UserError, match=r"train\.dtype"):
        DeepEp(E, alone, lambda token_bytes: None)(tokens.x, Routing(tokens.ids, tokens.weights), None, lambda: None)  # type: ignore[arg-type]
