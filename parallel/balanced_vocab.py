"""Embedding, head and loss with the vocabulary cut over tensor and pipeline ranks alike, in passes of a program.

The head costs as much as several layers, so each of the P = tp · pp ranks takes 1/P of the vocabulary (Vocabulary
Parallelism, arXiv 2411.05288, section 4: algorithm 1 has two barriers, algorithm 2 one). For N tokens:

    CX   the owners (the last stage's ranks, N/tp tokens each) broadcast the hidden states X (N, h)
    S    Y = X Wᵀ for this rank's rows W; m' = max Y, E = exp(Y - m'), s' = sum E. One barrier: also A = E W
    CS   gather m', s' and the labels' Y; c = exp(m' - m) / s makes the softmax E c. One barrier: the gradient
         u (A c - G W), with G the one-hot of the labels, is summed to the owners
    T    dY = u (E c - G), dW = dYᵀ X; two barriers: also dX = dY W
    CD   two barriers: dX is summed to the owners

    IF   look up this rank's rows of the table      CE  sum them to the owners (the first stage's ranks)
    IB   add to the gradient of this rank's rows    CG  the owners broadcast the gradient

u is 1 / valid tokens, and 0 where a token has no loss. Collectives run in a lane; every rank posts them in one order.
A method stands for a token of the program; what it keeps for a later one is kept per microbatch until that came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .comm.collectives import all_gather, broadcast_blocks, reduce_blocks
from .comm.lane import Lane, Pending
from .comm.mesh import Axis
from .gradients import matmul_grad, plain_grad, slot_of
from .kernels.precision import precise
from .labels import IGNORED
from .vocab import Look, VocabShard

_CHUNK = 1024
"""Tokens whose logits are held in the softmax's precision at once, where the logits' own is lower."""


@dataclass
class _Labels:
    """The labels as one rank sees them, (N,) each."""

    target: Tensor
    """The label's row on this rank; 0 where another rank has it."""
    mine: Tensor
    """Whether this rank has the label's row."""
    factor: Tensor
    """u of each token."""


@dataclass
class _Statistics:
    """From S to CS."""

    values: Tensor
    """m', s' and the label's logit (0 where another rank has it): (3, N)."""
    labels: _Labels
    grad: Tensor | None
    """One barrier: A (N, h)."""
    rows: Tensor | None
    """One barrier: the labels' rows of W (N, h), of which those that are `mine` count."""


@dataclass
class _Scored:
    """From S to T."""

    hidden: Tensor
    part: Tensor
    """E (N, V/P) in the logits' precision; T turns it into dY."""
    labels: _Labels


@dataclass
class _Agreed:
    """What CS gives."""

    rescale: Tensor
    """c (N,)."""
    loss: Tensor
    grad: Tensor | None
    """One barrier, on owners: (N/tp, h)."""


class BalancedHead:
    """Head and loss.

    Args:
        axis: "vocab_head" of the mesh.
        lane: made for this axis.
        shard: this rank's rows of the vocabulary.
        owners: indices on the axis of the last stage's ranks, ascending, which is the order of their tokens.
        barriers: 1 or 2.
    """

    def __init__(self, axis: Axis, lane: Lane, shard: VocabShard, owners: Sequence[int], barriers: int) -> None:
        self.axis, self.lane, self.shard, self.owners, self.barriers = axis, lane, shard, tuple(owners), barriers
        self.is_owner = axis.rank in self.owners
        self.look: Look | None = None
        self.clear()

    def clear(self) -> None:
        """Drops everything, after a step that failed."""
        self._hidden: dict[int, Pending[Tensor]] = {}
        self._statistics: dict[int, _Statistics] = {}
        self._scored: dict[int, _Scored] = {}
        self._agreed: dict[int, Pending[_Agreed]] = {}
        self._losses: dict[int, Pending[_Agreed]] = {}
        self._owed: dict[int, Pending[_Agreed]] = {}
        self._parts: dict[int, Tensor] = {}
        self._reduced: dict[int, Pending[Tensor]] = {}

    def post_hidden(self, index: int, x: Tensor | None, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        """CX of microbatch `index`: x is the owner's hidden states (N/tp, h), None elsewhere; `tokens` is N."""
        x = _block(x, self.is_owner)
        axis, owners, like = self.axis, self.owners, torch.empty(0, dtype=dtype, device=self.lane.device)
        self._hidden[index] = self.lane.submit(lambda: _spread(x, like, (tokens, hidden), axis, owners))

    @torch.no_grad()
    def score(
        self, index: int, weight: Tensor, labels: Tensor, scale: Tensor | float, *, with_grad: bool = True
    ) -> None:
        """S: this rank's logits and their statistics.

        Args:
            index: of the microbatch.
            weight: this rank's rows (V/P, h).
            labels: of all tokens (N,); IGNORED where there is no loss.
            scale: factor of every token's loss, in practice 1 / valid tokens of the global batch.
            with_grad: false where only the loss is wanted: then T and CD do not come.
        """
        hidden, weight = self._hidden.pop(index).wait(), weight.detach()
        part = self.shard.hide_padding(torch.mm(hidden, weight.t()))
        if self.look is not None:
            self.look(part, labels, self.shard)
        mine = (labels >= self.shard.start) & (labels < self.shard.stop)
        factor = (labels != IGNORED).to(precise(part.dtype)) * scale
        known = _Labels(torch.where(mine, labels - self.shard.start, 0), mine, factor)
        values = _exponentials(part, known)
        early = with_grad and self.barriers == 1
        grad = torch.mm(part, weight) if early else None
        rows = F.embedding(known.target, weight) if early else None
        self._statistics[index] = _Statistics(values, known, grad, rows)
        if with_grad:
            self._scored[index] = _Scored(hidden, part, known)

    def post_statistics(self, index: int) -> None:
        """CS: agree on softmax and loss; with one barrier the owners also get the gradient of the hidden states."""
        statistics = self._statistics.pop(index)
        agreed = self.lane.submit(lambda: self._agree(statistics))
        self._losses[index] = agreed
        if index in self._scored:
            self._agreed[index] = agreed
            if self.is_owner and self.barriers == 1:
                self._owed[index] = agreed

    def _agree(self, statistics: _Statistics) -> _Agreed:
        labels = statistics.labels
        gathered = all_gather(statistics.values[None], self.axis).wait()
        peaks, sums, picked = gathered.unbind(1)
        peak = peaks.amax(0)
        total = (sums * (peaks - peak).exp()).sum(0)
        loss = ((total.log() - (picked.sum(0) - peak)) * labels.factor).sum()
        rescale = (peaks[self.axis.rank] - peak).exp() / total
        grad = None
        if statistics.grad is not None and statistics.rows is not None:
            wide = statistics.grad.to(rescale.dtype).mul_((rescale * labels.factor)[:, None])
            wide.addcmul_(statistics.rows.to(wide.dtype), (labels.factor * labels.mine)[:, None], value=-1)
            grad = reduce_blocks(wide.to(statistics.grad.dtype), self.axis, self.owners).wait()
        return _Agreed(rescale, loss, grad)

    @torch.no_grad()
    def weight_grad(self, index: int, weight: Tensor) -> None:
        """T: the gradient of this rank's rows (V/P, h), into the weight's slot; waits for CS."""
        scored, agreed = self._scored.pop(index), self._agreed.pop(index).wait()
        labels, part = scored.labels, scored.part
        hit = labels.factor * labels.mine
        for rows in _chunks(part):
            wide = part[rows].to(hit.dtype)
            wide.mul_((agreed.rescale[rows] * labels.factor[rows])[:, None])
            wide.scatter_add_(1, labels.target[rows, None], -hit[rows, None])
            if wide.dtype != part.dtype:
                part[rows] = wide
        if self.barriers == 2:
            self._parts[index] = torch.mm(part, weight.detach())
        _keep(weight, matmul_grad(weight, part, scored.hidden))

    def post_hidden_grad(self, index: int) -> None:
        """CD, two barriers: sum the gradient of the hidden states to the owners."""
        part, axis, owners = self._parts.pop(index), self.axis, self.owners
        reduced = self.lane.submit(lambda: reduce_blocks(part, axis, owners).wait())
        if self.is_owner:
            self._reduced[index] = reduced

    def hidden_grad(self, index: int) -> Tensor:
        """On owners: the gradient of the hidden states (N/tp, h); waits for CS or, with two barriers, for CD."""
        if self.barriers == 2:
            return self._reduced.pop(index).wait()
        agreed = self._owed.pop(index).wait()
        grad, agreed.grad = agreed.grad, None
        assert grad is not None
        return grad

    def loss(self, index: int) -> Tensor:
        """Cross-entropy summed over all tokens times their factors; equal on all ranks. Waits for CS."""
        return self._losses.pop(index).wait().loss


class BalancedEmbedding:
    """Embedding.

    Args:
        axis: "vocab_embed" of the mesh.
        lane: made for this axis.
        shard: this rank's rows of the vocabulary.
        owners: indices on the axis of the first stage's ranks, ascending, which is the order of their tokens.
    """

    def __init__(self, axis: Axis, lane: Lane, shard: VocabShard, owners: Sequence[int]) -> None:
        self.axis, self.lane, self.shard, self.owners = axis, lane, shard, tuple(owners)
        self.is_owner = axis.rank in self.owners
        self.clear()

    def clear(self) -> None:
        """Drops everything, after a step that failed."""
        self._found: dict[int, Tensor] = {}
        self._rows: dict[int, Pending[Tensor]] = {}
        self._grads: dict[int, Pending[Tensor]] = {}

    @torch.no_grad()
    def look_up(self, index: int, tokens: Tensor, weight: Tensor) -> None:
        """IF: tokens (N,) in this rank's rows (V/P, h); zeros where another rank has the row."""
        rows, mine = self._local(tokens)
        self._found[index] = F.embedding(rows, weight.detach()).mul_(mine[:, None])

    def post_rows(self, index: int) -> None:
        """CE: sum the rows to the owners."""
        found, axis, owners = self._found.pop(index), self.axis, self.owners
        rows = self.lane.submit(lambda: reduce_blocks(found, axis, owners).wait())
        if self.is_owner:
            self._rows[index] = rows

    def rows(self, index: int) -> Tensor:
        """On owners: their tokens' embeddings (N/tp, h); waits for CE."""
        return self._rows.pop(index).wait()

    def post_grad(self, index: int, grad: Tensor | None, tokens: int, hidden: int, dtype: torch.dtype) -> None:
        """CG: `grad` is the owner's gradient of `rows` (N/tp, h), None elsewhere; `tokens` is N."""
        grad = _block(grad, self.is_owner)
        axis, owners, like = self.axis, self.owners, torch.empty(0, dtype=dtype, device=self.lane.device)
        self._grads[index] = self.lane.submit(lambda: _spread(grad, like, (tokens, hidden), axis, owners))

    @torch.no_grad()
    def weight_grad(self, index: int, tokens: Tensor, weight: Tensor) -> None:
        """IB: the gradient of this rank's rows (V/P, h), into the weight's slot; waits for CG."""
        grad = self._grads.pop(index).wait()
        rows, mine = self._local(tokens)
        if grad.is_cuda:  # selecting would make the host wait
            grad = grad * mine[:, None]
        else:
            rows, grad = rows[mine], grad[mine]
        slot = slot_of(weight)
        if slot is not None:
            slot.add_rows(rows, grad)
            slot.done()
            return
        table = torch.zeros(weight.shape, dtype=precise(grad.dtype), device=grad.device)
        _keep(weight, plain_grad(weight, table.index_add_(0, rows, grad.to(table.dtype))))

    def _local(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Rows on this rank, and whether they are the tokens' own.

        The others are spread evenly: additions of zeros to one and the same row would run one after another.
        """
        mine = (tokens >= self.shard.start) & (tokens < self.shard.stop)
        return (tokens - self.shard.start).remainder(self.shard.stop - self.shard.start), mine


def _chunks(part: Tensor) -> list[slice]:
    """The tokens that are worked on at once: all of them where nothing has to be converted."""
    step = max(part.shape[0], 1) if part.dtype == precise(part.dtype) else _CHUNK
    return [slice(first, first + step) for first in range(0, part.shape[0], step)]


def _exponentials(part: Tensor, labels: _Labels) -> Tensor:
    """Turns the logits (N, V/P) into exp(Y - m') in place; returns m', s' and the label's logit (3, N)."""
    values = part.new_empty((3, part.shape[0]), dtype=precise(part.dtype))
    for rows in _chunks(part):
        wide = part[rows].to(values.dtype)
        peak, total, picked = values[:, rows].unbind(0)
        torch.amax(wide, dim=1, out=peak)
        picked.copy_(wide.gather(1, labels.target[rows, None]).squeeze(1)).mul_(labels.mine[rows])
        wide.sub_(peak[:, None]).exp_()
        torch.sum(wide, dim=1, out=total)
        if wide.dtype != part.dtype:
            part[rows] = wide
    return values


def _block(x: Tensor | None, is_owner: bool) -> Tensor | None:
    if (x is not None) != is_owner:
        raise ValueError("the owners, and nobody else, give their tensor")
    return x.detach().contiguous() if x is not None else None


def _spread(x: Tensor | None, like: Tensor, shape: tuple[int, int], axis: Axis, owners: tuple[int, ...]) -> Tensor:
    """Every owner's block, one after the other, on every rank."""
    if x is not None and len(owners) == 1:
        whole = x
    else:
        whole = like.new_empty(shape)
        if x is not None:
            whole.chunk(len(owners))[owners.index(axis.rank)].copy_(x)
    return broadcast_blocks(whole, axis, owners).wait()


def _keep(weight: Tensor, grad: Tensor | None) -> None:
    """Adds what no slot has taken to the weight's gradient."""
    if grad is not None:
        weight.grad = grad if weight.grad is None else weight.grad + grad
