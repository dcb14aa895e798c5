"""Embedding and head, whole or sharded over the vocabulary, and the cross-entropy that never holds all logits.

The head walks over chunks of tokens. For each it makes the logits of this rank's part of the vocabulary, agrees with
the other parts on the log-sum-exp (one small collective), and at once turns the logits into their gradient and that
into the gradients of hidden states and weight. So the [tokens, vocabulary] matrix exists for one chunk only, and the
logits are not recomputed in backward. The loss's factor (1 / valid tokens) must therefore be known in forward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .comm.collectives import all_gather, all_reduce, reduce_scatter, reduce_scatter_autograd
from .comm.mesh import Axis
from .gradients import plain_grad, slot_of
from .kernels.precision import precise
from .kernels.weight_products import add_product
from .labels import IGNORED


@dataclass(frozen=True)
class VocabShard:
    """This rank's rows [start, stop) of the vocabulary, and the axis over which the vocabulary is cut.

    Rows from `used` on are padding: no token has them, and none is predicted to.
    """

    axis: Axis
    start: int
    stop: int
    used: int

    @staticmethod
    def whole(vocab: int, used: int | None = None) -> VocabShard:
        """All rows, on one device."""
        return VocabShard(Axis.single("tp"), 0, vocab, vocab if used is None else used)

    @staticmethod
    def of(axis: Axis, vocab: int, used: int | None = None) -> VocabShard:
        """Equal parts in rank order."""
        size = vocab // axis.size
        return VocabShard(axis, axis.rank * size, (axis.rank + 1) * size, vocab if used is None else used)

    def hide_padding(self, logits: Tensor) -> Tensor:
        """Logits (…, rows of this rank), those of padding so low, in place, that their probability is 0.

        Finite, so that products with 0 and a rank that has nothing but padding give no NaN.
        """
        if self.used < self.stop:
            logits[..., max(self.used - self.start, 0) :] = torch.finfo(logits.dtype).min / 2
        return logits


CrossEntropy = Callable[[Tensor, Tensor, "Tensor | float", VocabShard, bool], tuple[Tensor, "Tensor | None"]]
"""logits (n, rows of this rank), labels (n,), factor of the losses, shard, whether a gradient is wanted → the summed
loss, and the gradient of the logits, which may take their memory."""

Look = Callable[[Tensor, Tensor, VocabShard], None]
"""Shown what a head makes in evaluation: logits (n, rows of this rank) and labels (n,) of some of its tokens."""


class VocabEmbedding:
    """tokens (N,) → rows of the table, this rank's share of the tokens (N/tp, h)."""

    def __init__(self, shard: VocabShard) -> None:
        self.shard = shard

    def __call__(self, tokens: Tensor, weight: Tensor) -> Tensor:
        partial = _Lookup.apply(tokens, weight, self.shard)
        return reduce_scatter_autograd(partial, self.shard.axis)

    def local_tokens(self, x: Tensor) -> Tensor:
        """This rank's share of something per token (N, …)."""
        axis = self.shard.axis
        return x if axis.size == 1 else x.chunk(axis.size)[axis.rank]


def look_up(rows: Tensor, table: Tensor) -> Tensor:
    """rows (n,) of a table (m, h) that this device has whole: (n, h). Its gradient is summed in fp32 or better."""
    return _Lookup.apply(rows, table, VocabShard.whole(len(table)))


class _Lookup(torch.autograd.Function):
    """Rows of this rank's part of the table; zeros for the tokens of other parts."""

    @staticmethod
    def forward(ctx, tokens: Tensor, weight: Tensor, shard: VocabShard) -> Tensor:
        ctx.shard, ctx.weight, ctx.rows = shard, weight, weight.shape[0]
        if shard.axis.size == 1:
            ctx.save_for_backward(tokens)
            return F.embedding(tokens, weight)
        mine = (tokens >= shard.start) & (tokens < shard.stop)
        rows = torch.where(mine, tokens - shard.start, 0)
        ctx.save_for_backward(rows, mine)
        return F.embedding(rows, weight) * mine[:, None]

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *mask = ctx.saved_tensors
        if mask:
            grad = grad * mask[0][:, None]
        slot = slot_of(ctx.weight)
        if slot is not None:
            slot.add_rows(rows, grad)
            slot.done()
            return None, None, None
        table = grad.new_zeros((ctx.rows, grad.shape[1]), dtype=precise(grad.dtype))
        table.index_add_(0, rows, grad.to(table.dtype))
        return None, plain_grad(ctx.weight, table), None


class VocabHead:
    """The head and its loss over a sharded vocabulary.

    Args:
        shard: this rank's part of the vocabulary.
        chunk: tokens whose logits are held at once.
    """

    def __init__(self, shard: VocabShard, chunk: int = 1024) -> None:
        self.shard, self.chunk = shard, chunk
        self.look: Look | None = None
        self.cross_entropy: CrossEntropy = cross_entropy
        """Replaceable from outside."""

    def logits(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (N/tp, h) → (N, V): whole logits, for evaluation and tests."""
        axis = self.shard.axis
        whole = all_gather(x, axis).wait()
        part = self.shard.hide_padding(whole @ weight.t())
        if axis.size == 1:
            return part
        return all_gather(part.t().contiguous(), axis).wait().t()

    def loss(self, x: Tensor, weight: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
        """Cross-entropy summed over the valid tokens and multiplied by `scale`.

        Args:
            x: this rank's hidden states (N/tp, h).
            weight: this rank's rows (V/tp, h).
            labels: (N,), IGNORED where there is no loss.
            scale: factor of every token's loss, in practice 1 / valid tokens of the global batch.

        Returns:
            A scalar (fp32, or fp64 for fp64 hidden states), equal on all ranks of the axis.
        """
        return _Loss.apply(
            x, weight, labels, scale, self.shard, self.chunk, torch.is_grad_enabled(), self.look, self.cross_entropy
        )


def whole_vocabulary(vocab: int, used: int | None = None) -> tuple[VocabEmbedding, VocabHead]:
    """Embedding and head of one device, which has all rows; arguments as of `VocabShard`."""
    whole = VocabShard.whole(vocab, used)
    return VocabEmbedding(whole), VocabHead(whole)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        scale: Tensor | float,
        shard: VocabShard,
        chunk: int,
        with_grad: bool,
        look: Look | None,
        entropy: CrossEntropy,
    ) -> Tensor:
        axis, slot = shard.axis, slot_of(weight)
        whole = all_gather(x, axis).wait()
        total = whole.new_zeros((), dtype=precise(x.dtype))
        dx = torch.empty_like(whole) if with_grad else None
        dw = torch.zeros(weight.shape, dtype=total.dtype, device=x.device) if with_grad and slot is None else None
        for first in range(0, whole.shape[0], chunk):
            part = slice(first, first + chunk)
            h = whole[part]
            logits = shard.hide_padding(torch.mm(h, weight.t()))
            if look is not None:
                look(logits, labels[part], shard)
            losses, dlogits = entropy(logits, labels[part], scale, shard, with_grad)
            total += losses
            if dlogits is None or dx is None:
                continue
            torch.mm(dlogits, weight, out=dx[part])
            if slot is not None:
                slot.add_matmul(dlogits, h)
            elif dw is not None:
                add_product(dw, dlogits, h, False)
        ctx.weight, ctx.axis, ctx.dtype = weight, axis, x.dtype
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        """`grad` is 1: the loss's factor went into `scale`."""
        dx, dw = ctx.saved_tensors
        dx = reduce_scatter(dx, ctx.axis).wait()
        slot = slot_of(ctx.weight)
        if slot is not None:
            slot.done()
            return dx, *[None] * 8
        return dx, dw.to(ctx.weight.dtype), *[None] * 7


def cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor | float, shard: VocabShard, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Summed loss of one chunk and the gradient of its logits (n, V/tp), which reuses the logits' memory."""
    axis = shard.axis
    logits32 = logits.to(precise(logits.dtype))
    valid = labels != IGNORED
    mine = (labels >= shard.start) & (labels < shard.stop)
    target = torch.where(mine, labels - shard.start, 0)[:, None]
    # The maximum is agreed on first, so that the exponentials are made once and no part can overflow.
    peak = all_reduce(logits32.amax(dim=-1), axis, "max").wait()
    picked = logits32.gather(1, target).squeeze(1).sub_(peak).mul_(mine)
    exp = logits32.sub_(peak[:, None]).exp_()
    sums = all_reduce(torch.stack((exp.sum(dim=-1), picked)), axis).wait()
    denominator, picked = sums[0], sums[1]
    factor = valid.to(logits32.dtype) * scale  # bool × float would be fp32
    loss = ((denominator.log() - picked) * factor).sum()
    if not with_grad:
        return loss, None
    exp.mul_((factor / denominator)[:, None])
    exp.scatter_add_(1, target, -(factor * mine)[:, None].to(exp.dtype))
    return loss, exp if exp.dtype == logits.dtype else exp.to(logits.dtype)


def fused_cross_entropy(
    logits: Tensor, labels: Tensor, scale: Tensor | float, shard: VocabShard, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The same by kernels that pass over the logits once for the loss and once for their gradient."""
    from .kernels.triton.cross_entropy import row_statistics, write_gradient

    axis = shard.axis
    found = row_statistics(logits, labels, shard.start)
    peak, sums = found[0], found[1:]
    if axis.size > 1:
        peak = all_reduce(found[0].clone(), axis, "max").wait()  # it works in place
        sums = all_reduce(torch.stack((found[1] * (found[0] - peak).exp(), found[2])), axis).wait()
    valid = labels != IGNORED
    factor = valid.to(found.dtype) * scale
    loss = ((sums[0].log() + peak - sums[1]) * factor).sum()
    if not with_grad:
        return loss, None
    write_gradient(logits, labels, peak, sums[0].contiguous(), factor, shard.start)
    return loss, logits
