"""A model that reads its sequence piece by piece: keys, values and states of what it has read stay.

Nothing of the model is written again. The attention core is a seam: here it appends the new keys and values to those
kept, and the new queries attend to all of them. Linear attention asks its neighbours for the state that its tokens
begin with: here that is the state after the tokens before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...configs.schema import ModelConfig
from ...parallel.kernels.attention import attention
from ...parallel.kernels.device import local_attention
from ...parallel.kernels.interfaces import AttentionCall
from ...parallel.kernels.mask import Mask, TokenIndex
from ..attention import Attention
from ..linear_attention import Coming, LinearAttention
from ..mla import LatentAttention
from ..sequences import Inputs
from ..transformer import Transformer


def can_cache(cfg: ModelConfig) -> bool:
    """Whether what the model makes of a token never depends on the tokens after it, nor on how many there are.

    Experts that choose their tokens, or have room for so many, make it depend on them.
    """
    return not cfg.moe.experts or (cfg.moe.router.name != "expert_choice" and cfg.moe.capacity_factor is None)


class SequenceReader(Protocol):
    """Reads one sequence; called with what comes next, (1, n) token ids, it returns the logits (V,) of the token after
    them."""

    def __call__(self, tokens: Tensor) -> Tensor: ...


def make_reader(model: Transformer) -> SequenceReader:
    """The cheapest reader that computes what the model computes. It takes the model over: make a new one for each
    sequence, and use the model only through the newest."""
    return CachedReader(model) if can_cache(model.cfg) else PrefixReader(model)


def last_logits(model: Transformer, tokens: Tensor, first: int = 0) -> Tensor:
    """The logits (V,) of the token that follows `tokens` (1, n), whose own places begin with `first`."""
    positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
    inputs = Inputs(tokens, positions=positions)
    x = model.embed_tokens(inputs)
    seq = model.sequences(inputs, x.dtype)
    x = model.end(model.run_layers(x, seq, None, model.part.layers))
    return model.head_op.logits(x[-1:], model.head_weight)[0]


class PrefixReader:
    """Reads everything again for each piece: what every model allows."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._read = model, torch.empty((1, 0), dtype=torch.long)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        self._read = torch.cat((self._read.to(tokens.device), tokens), dim=1)
        return last_logits(self._model, self._read)


class CachedReader:
    """Reads each piece once."""

    def __init__(self, model: Transformer) -> None:
        self._model, self._count = model, 0
        for module in model.modules():
            if isinstance(module, (Attention, LatentAttention)):
                module.core = _CachedCore(module.window)
            elif isinstance(module, LinearAttention):
                module.neighbours = _StateBefore()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        logits = last_logits(self._model, tokens, self._count)
        self._count += tokens.shape[1]
        return logits


class _Cache:
    """(B, m, K, d) of the newest tokens, in memory that doubles when it is full."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None
        self._first = self._last = 0

    def append(self, x: Tensor, keep: int | None) -> Tensor:
        """All that is kept with x (B, n, K, d) behind it; from then on no more than `keep` tokens, if there is one."""
        memory, new = self._memory, x.shape[1]
        if memory is None or self._last + new > memory.shape[1]:
            old = x[:, :0] if memory is None else memory[:, self._first : self._last]
            count = old.shape[1]
            memory = x.new_empty(x.shape[0], 2 * (count + new), *x.shape[2:])
            memory[:, :count] = old
            self._memory, self._first, self._last = memory, 0, count
        memory[:, self._last : self._last + new] = x
        self._last += new
        found = memory[:, self._first : self._last]
        if keep is not None:
            self._first = max(self._first, self._last - keep)
        return found


class _CachedCore:
    """A `parallel.kernels.interfaces.Core` whose queries also see the keys of earlier calls.

    Args:
        window: of the layer: keys further back are never seen again.
    """

    def __init__(self, window: int | None) -> None:
        self._keep = None if window is None else max(window - 1, 0)
        self._keys, self._values, self._count = _Cache(), _Cache(), 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        keys, values = self._keys.append(k, self._keep), self._values.append(v, self._keep)
        self._count += q.shape[1]
        order = torch.arange(self._count - keys.shape[1], self._count)[None]
        mask = Mask(TokenIndex(order[:, -q.shape[1] :]), TokenIndex(order), call.window)
        return attention(local_attention(q.device), q, keys, values, mask, call.scale, call.sinks)


@dataclass
class _StateBefore:
    """`Neighbours` of linear attention whose tokens come one piece after the other."""

    state: Tensor | None = None
    """(B, H, d, e) after the last token read."""

    def state_before(self, passed: Tensor, state: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        before = self.state
        self.state = state if before is None else torch.addcmul(state, passed[..., None], before)
        return _Known(before)

    def grad_after(self, passed: Tensor, grad: Tensor, joined: Tensor | None) -> Coming[Tensor | None]:
        raise NotImplementedError("a sequence that is read piece by piece is not trained on")


@dataclass(frozen=True)
class _Known:
    """A `Coming` that is here."""

    value: Tensor | None

    def wait(self) -> Tensor | None:
        return self.value
