"""Gated linear attention (GLA, arXiv 2312.06635): a recurrence whose state decays, and the layer made of it.

For each head, with the decay a_t = exp(g_t), one factor per key dimension:

    S_t = diag(a_t) S_{t-1} + k_tᵀ v_t        o_t = q_t S_t / sqrt(d)

The first token of a document forgets everything before it. Shapes: B sequences, T tokens, H heads, d width of a key, e
of a value, n chunks of C tokens; inside, tensors are (B, H, n, C, ·). In a chunk, with S the state at its begin:

    o_i = (q_i exp(g_1 + … + g_i)) S + Σ_{j ≤ i} Σ_dims q_i k_j exp(g_{j+1} + … + g_i) v_j

The second term is computed by halving: a pair (j, i) meets in the one block of 2 m tokens that has j in its first half
and i in its second one, and its decay is split at the middle: (q_i exp(g_middle + … + g_i)) · (k_j exp(g_{j+1} + …)).
So every exponent is a sum of log-decays and never positive: nothing overflows, and what underflows is really that
small. The usual q exp(G_i) · k exp(−G_j) with G from the chunk's begin overflows in fp32 once a chunk decays by e^88.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configs.schema import ModelConfig
from ..parallel.kernels.precision import precise
from ..parallel.kernels.upload import upload
from ..parallel.recompute import run_part
from .functional import swiglu
from .linear import Linear, project
from .norms import RmsNorm
from .sequences import Sequences

T_co = TypeVar("T_co", covariant=True)

GATE_DIVISOR = 16
"""Log-decays are log sigmoid(·) / 16, so that an untrained layer remembers some hundred tokens (GLA, section 4.4)."""


class Coming(Protocol[T_co]):
    """A result that is on its way."""

    def wait(self) -> T_co: ...


class Neighbours(Protocol):
    """What comes before and after the tokens at hand, where these are only a part of their sequences.

    Both calls return at once, and the tokens' own work goes on until the result is needed.
    """

    def state_before(self, passed: Tensor, state: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        """The state that the tokens at hand begin with: (B, H, d, e), None: zero.

        Args:
            passed: (B, H, d) the share of that state which is left after the last token at hand.
            state: (B, H, d, e) the state after the last token at hand if it is zero before the first one.
            joined: (B,) the sequences whose first token at hand does not begin a document, the state of the others is
                zero; none: all.
        """
        ...

    def grad_after(self, passed: Tensor, grad: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        """The gradient of the state after the last token at hand, through later tokens: (B, H, d, e), None: zero.

        Args:
            passed, joined: as above.
            grad: (B, H, d, e) the gradient of the state before the first token through the tokens at hand.
        """
        ...


class _Nothing:
    def wait(self) -> None:
        return None


class Alone:
    """`Neighbours` where all tokens are at hand: zeros."""

    def state_before(self, passed: Tensor, state: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        return _Nothing()

    def grad_after(self, passed: Tensor, grad: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        return _Nothing()


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    documents: Tensor | None = None,
    joined: Tensor | None = None,
    *,
    chunk: int = 64,
    neighbours: Neighbours | None = None,
) -> Tensor:
    """The recurrence above, in chunks (GLA, section 4): (B, T, H, e).

    Computes in fp32, or fp64 for fp64 inputs. Only the inputs and the state at the begin are kept for backward.

    Args:
        q, k: (B, T, H, d).
        v: (B, T, H, e).
        g: (B, T, H, d) logarithms of the decays, at most 0.
        documents: (B, T) document ids of packed sequences; none: one document each.
        joined: (B,) where the first token goes on with a document whose earlier tokens are not at hand; none: in all.
        chunk: tokens per chunk, a power of two.
        neighbours: of the tokens at hand; none: all tokens are at hand.
    """
    return _GatedLinear.apply(q, k, v, g, documents, joined, chunk, neighbours or Alone())


@dataclass(frozen=True)
class _Chunks:
    """Inputs in chunks, in the precision of the sums, and what backward needs as well as forward.

    Args:
        q, k, g: (B, H, n, C, d), q scaled.
        v: (B, H, n, C, e).
        segment: (B, 1, n, C) how many documents have begun in the chunk up to each token; none: none ever.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    segment: Tensor | None

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, g: Tensor, documents: Tensor | None, chunk: int) -> _Chunks:
        size = min(chunk, 1 << max(0, q.shape[1] - 1).bit_length())
        dtype = precise(q.dtype)
        q, k, v, g = (_chunked(x.to(dtype), size) for x in (q, k, v, g))
        segment = None
        if documents is not None:
            begins = _chunked(_begins(documents)[:, :, None, None], size)[..., 0]
            segment = begins.cumsum(-1)
        return _Chunks(q * q.shape[-1] ** -0.5, k, v, g, segment)

    @property
    def hidden(self) -> Tensor | None:
        """(B, 1, n, C, C) pairs of tokens of different documents."""
        s = self.segment
        return None if s is None else s[..., :, None] != s[..., None, :]

    def reading(self) -> Tensor:
        """What is left of the state at the chunk's begin at each token: (B, H, n, C, d)."""
        left = self.g.cumsum(-2).exp_()
        return left if self.segment is None else left.masked_fill_((self.segment > 0)[..., None], 0)

    def writing(self) -> Tensor:
        """What is left of each token at the chunk's end: (B, H, n, C, d)."""
        left = _sums_before(self.g.flip(-2)).flip(-2).exp_()
        if self.segment is None:
            return left
        return left.masked_fill_((self.segment < self.segment[..., -1:])[..., None], 0)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        documents: Tensor | None,
        joined: Tensor | None,
        chunk: int,
        neighbours: Neighbours,
    ) -> Tensor:
        x = _Chunks.of(q, k, v, g, documents, chunk)
        reading = x.reading()
        decay = reading[..., -1, :]
        starts, end = _scan(decay, (x.k * x.writing()).mT @ x.v)
        coming = neighbours.state_before(decay.prod(2), end, joined)
        scores = _scores(x)
        out = scores @ x.v
        before = coming.wait()
        if before is not None:
            starts.addcmul_(_products_before(decay)[..., None], before[:, :, None])
        out += (x.q * reading) @ starts
        ctx.chunk, ctx.neighbours = chunk, neighbours
        ctx.save_for_backward(q, k, v, g, documents, joined, before)
        return _unchunked(out, q.shape[1]).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, g, documents, joined, before = ctx.saved_tensors
        x = _Chunks.of(q, k, v, g, documents, ctx.chunk)
        dy = _chunked(dout.to(x.v.dtype), x.v.shape[-2])
        reading, writing = x.reading(), x.writing()
        decay = reading[..., -1, :]
        read, written = x.q * reading, x.k * writing
        # From the last chunk to the first one: what each chunk's end means for later chunks at hand.
        ends, start = _scan(decay.flip(2), (read.mT @ dy).flip(2))
        ends = ends.flip(2)
        coming = ctx.neighbours.grad_after(decay.prod(2), start, joined)
        dq, dk, dv, dg = _scores_backward(x, dy)
        starts = _scan(decay, written.mT @ x.v, before)[0]
        after = coming.wait()
        if after is not None:
            ends.addcmul_(_products_before(decay.flip(2)).flip(2)[..., None], after[:, :, None])
        dread = (dy @ starts.mT).mul_(reading)
        dwritten = (x.v @ ends.mT).mul_(writing)
        dv += written @ ends
        dg += _sums_from(x.q * dread)
        dg += _sums_before(x.k * dwritten)
        dg += (ends * starts).sum(-1).mul_(decay)[..., None, :]
        dq, dk = dq.add_(dread).mul_(q.shape[-1] ** -0.5), dk.add_(dwritten)
        grads = zip((dq, dk, dv, dg), (q, k, v, g), strict=True)
        return *(_unchunked(dx, q.shape[1]).to(to.dtype) for dx, to in grads), None, None, None, None


def _begins(documents: Tensor) -> Tensor:
    """(B, T) 1 where a document begins after a token of another one."""
    return F.pad((documents[:, 1:] != documents[:, :-1]).int(), (1, 0))


def _chunked(x: Tensor, size: int) -> Tensor:
    """(B, T, H, d) → (B, H, n, C, d), filled up with zeros: these tokens write nothing and decay nothing."""
    x = F.pad(x.transpose(1, 2), (0, 0, 0, -x.shape[1] % size))
    return x.reshape(*x.shape[:2], -1, size, x.shape[-1])


def _unchunked(x: Tensor, length: int) -> Tensor:
    """(B, H, n, C, d) → (B, T, H, d)."""
    return x.flatten(2, 3)[:, :, :length].transpose(1, 2)


def _scan(decay: Tensor, update: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The states before each of the chunks, (B, H, n, d, e), and after the last one, (B, H, d, e).

    Args:
        decay: (B, H, n, d) what a chunk leaves of the state.
        update: (B, H, n, d, e) what it adds.
        state: before the first chunk; none: zero.
    """
    states = torch.empty_like(update)
    current = torch.zeros_like(update[:, :, 0]) if state is None else state
    for i in range(update.shape[2]):
        states[:, :, i] = current
        current = torch.addcmul(update[:, :, i], decay[:, :, i, :, None], current)
    return states, current


def _products_before(x: Tensor) -> Tensor:
    """x (B, H, n, d) → the products of all earlier chunks, 1 for the first one."""
    return F.pad(x[:, :, :-1], (0, 0, 1, 0), value=1.0).cumprod(2)


def _sums_before(x: Tensor) -> Tensor:
    """x (…, C, d) → the sums over all earlier tokens."""
    return F.pad(x[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


def _sums_from(x: Tensor) -> Tensor:
    """x (…, C, d) → the sums over the token and all later ones."""
    return x.flip(-2).cumsum(-2).flip(-2)


def _halves(x: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(…, C, d) → the first and the second halves of its blocks of 2 m tokens, views (…, C / 2m, m, d)."""
    blocks = x.unflatten(-2, (-1, 2, m))
    return blocks[..., 0, :, :], blocks[..., 1, :, :]


def _met(scores: Tensor, m: int) -> Tensor:
    """The scores (…, C, C) of second halves with first halves of the same blocks of 2 m: a view (…, C / 2m, m, m)."""
    blocks = scores.unflatten(-2, (-1, 2, m)).unflatten(-1, (-1, 2, m))
    return blocks[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def _levels(g: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each half length m = 1, 2, 4 … C / 2, the decay of all blocks of 2 m tokens from and to their middles.

    Yields:
        m; (…, C / 2m, m, d) what is left of each token of the first half at its end; and of the state at the begin of
        the second half at each of its tokens.
    """
    upto, rest = g.clone(), torch.zeros_like(g)  # sums up to each token, and of those after it, in blocks of m
    m = 1
    while m < g.shape[-2]:
        (_, upto_second), (rest_first, _) = _halves(upto, m), _halves(rest, m)
        yield m, rest_first.exp(), upto_second.exp()
        totals = [half[..., -1:, :].clone() for half in _halves(upto, m)]
        upto_second += totals[0]
        rest_first += totals[1]
        m *= 2


def _scores(x: _Chunks) -> Tensor:
    """Weights (B, H, n, C, C) of each chunk's tokens for its own tokens, zero above the diagonal."""
    size = x.q.shape[-2]
    scores = x.q.new_zeros(*x.q.shape[:-1], size)
    scores.diagonal(dim1=-2, dim2=-1).copy_((x.q * x.k).sum(-1))
    for m, to_middle, from_middle in _levels(x.g):
        keys, queries = _halves(x.k, m)[0] * to_middle, _halves(x.q, m)[1] * from_middle
        _met(scores, m).copy_(queries @ keys.mT)
    hidden = x.hidden
    return scores if hidden is None else scores.masked_fill_(hidden, 0)


def _scores_backward(x: _Chunks, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and g through y = scores · v alone, in chunks; dy (B, H, n, C, e)."""
    dv = _scores(x).mT @ dy
    dscores = dy @ x.v.mT
    hidden = x.hidden
    if hidden is not None:
        dscores.masked_fill_(hidden, 0)
    own = dscores.diagonal(dim1=-2, dim2=-1)[..., None]
    dq, dk, dg = own * x.k, own * x.q, torch.zeros_like(x.g)
    for m, to_middle, from_middle in _levels(x.g):
        keys, queries = _halves(x.k, m)[0] * to_middle, _halves(x.q, m)[1] * from_middle
        met = _met(dscores, m)
        dqueries, dkeys = met @ keys, met.mT @ queries
        _halves(dq, m)[1].addcmul_(dqueries, from_middle)
        _halves(dk, m)[0].addcmul_(dkeys, to_middle)
        dg_first, dg_second = _halves(dg, m)
        dg_second += _sums_from(queries.mul_(dqueries))
        dg_first += _sums_before(keys.mul_(dkeys))
    return dq, dk, dv, dg


class LinearAttention(nn.Module):
    """Multi-head gated linear attention, called like softmax attention; it has no rotary embedding.

    The decay comes from a projection of low rank; heads are normed one by one and gated (GLA, section 4.4).
    `neighbours` is replaceable from outside.
    """

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        linear = cfg.linear
        self.chunk, self.widths = linear.chunk, (linear.key_dim, linear.value_dim)
        keys, values = cfg.heads * linear.key_dim, cfg.heads * linear.value_dim
        self.q = Linear(cfg.hidden, keys)
        self.k = Linear(cfg.hidden, keys)
        self.v = Linear(cfg.hidden, values)
        self.gate = Linear(cfg.hidden, values)
        self.decay_down = Linear(cfg.hidden, linear.gate_rank)
        self.decay_up = Linear(linear.gate_rank, keys, bias=True)
        self.head_norm = RmsNorm(linear.value_dim, cfg.norm_eps)
        self.out = Linear(values, cfg.hidden)
        self.neighbours: Neighbours = Alone()

    def forward(self, x: Tensor, seq: Sequences) -> Tensor:
        """x (N, h) → (N, h)."""
        q, k, v, g, gate = run_part("attention", partial(self.heads, seq.batch), x)
        documents, joined = (
            None if y is None else seq.layout.once(upload, y, x.device)
            for y in (seq.layout.mine.documents, seq.layout.joined)
        )
        y = gated_linear_attention(q, k, v, g, documents, joined, chunk=self.chunk, neighbours=self.neighbours)
        y = run_part("norm", self.head_norm, y)
        return self.out(run_part("activation", swiglu, gate, y.reshape(seq.batch * seq.length, -1)))

    def heads(self, batch: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, T, H, d), v (B, T, H, e), log-decays (B, T, H, d) and gates (N, H e) from x (N, h)."""
        low = self.decay_up(self.decay_down(x))
        q, k, v, gate = project(x, self.q, self.k, self.v, self.gate)
        d, e = self.widths
        g = F.logsigmoid(low.to(precise(x.dtype))) / GATE_DIVISOR
        q, k, g = (y.view(batch, len(y) // batch, -1, d) for y in (q, k, g))
        return q, k, v.view(batch, len(v) // batch, -1, e), g, gate
