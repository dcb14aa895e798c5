"""Context parallelism by gathering: each rank keeps its queries and gets what all ranks have of keys and values.

    forward     all-gather     of each rank's tokens, its own first while the others' arrive: attend, merge
    backward    all-gather     of each rank's tokens: gradients of its keys and values; summed where these are at home

Any mask works and no head number matters. With b sequences of s tokens on each of P ranks, a rank sends
(P − 1) · b · s · w elements three times, for w numbers a token:

* `GatherKeysValues`: keys and values, w = K · (d + e);
* `GatherLatent`, for latent attention: what they are made from, w = r / tp + p: 576 instead of 40,960 for DeepSeek-V3.
  In exchange every rank expands all tokens, one rank's at a time, so no more than those keys and values exist at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...configs.schema_parallel import ContextConfig
from ..comm.collectives import all_gather, all_to_all
from ..comm.mesh import Axis, Mesh
from ..gradients import at_once
from ..kernels.attention import differentiable
from ..kernels.interfaces import AttentionCall, LocalAttention, to_be_summed
from ..kernels.mask import Mask
from ..kernels.merge import merge_
from ..kernels.precision import precise

KeysValues = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class GatherKeysValues:
    """A `Core`: the keys and values of all ranks are gathered, again in backward.

    Args:
        axis: the ranks that share the sequences.
        local: attention of one device.
    """

    def __init__(self, axis: Axis, local: LocalAttention) -> None:
        self._axis, self._local = axis, local

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> GatherKeysValues:
        """The core of a job; arguments as of `make_core`."""
        return GatherKeysValues(mesh.axis("cp"), local)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
        """See `Core`. Saved for backward: q, k, v, out and lse of this rank's tokens."""
        return differentiable(q, k, v, call.sinks, _Gathered(self._axis, self._local, call))


class GatherLatent:
    """A `LatentCore`: the latents of all ranks are gathered, again in backward; arguments as of `GatherKeysValues`."""

    def __init__(self, axis: Axis, local: LocalAttention) -> None:
        self._axis, self._local = axis, local

    @staticmethod
    def of(context: ContextConfig, mesh: Mesh, local: LocalAttention) -> GatherLatent:
        """The core of a job; arguments as of `make_core`."""
        return GatherLatent(mesh.axis("cp"), local)

    def __call__(
        self,
        q: Tensor,
        latent: Tensor,
        turning: Tensor,
        up: nn.Module,
        keys_values: KeysValues,
        call: AttentionCall,
    ) -> Tensor:
        """See `LatentCore`. Saved for backward: q, latent, turning, out and lse of this rank's tokens.

        The weight of `up` gets as many gradients a microbatch as there are ranks (`Slot.uses`).
        """
        return differentiable(q, latent, turning, None, _Gathered(self._axis, self._local, call, up, keys_values))


@dataclass(frozen=True)
class _Gathered:
    """One layer's attention; the arguments of the methods and of their calls.

    What is gathered are keys and values, or latents and turned keys: `one` and `two` of every rank.
    """

    axis: Axis
    local: LocalAttention
    call: AttentionCall
    up: nn.Module | None = None
    keys_values: KeysValues | None = None

    def attend(self, q: Tensor, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse over all ranks' keys, in lse's precision."""
        out = lse = None
        for _, mask, first, second in self._blocks(one, two):
            if out is None or lse is None:
                out, lse = self._attend(first, second, mask, q)
                out = out.to(lse.dtype)
            else:
                merge_(out, lse, *self._attend(first, second, mask, q))
        assert out is not None and lse is not None
        return out, lse

    def differentiate(
        self, dout: Tensor, q: Tensor, one: Tensor, two: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq in lse's precision, and the gradients of this rank's one and two in their own types."""
        dq = torch.zeros_like(q, dtype=lse.dtype)
        gradients = [x.new_zeros(self.axis.size, *x.shape) for x in (one, two)]
        for rank, mask, first, second in self._blocks(one, two):
            part, *found = self._differentiate(first, second, mask, q, dout, out, lse)
            dq += part
            for gradient, x in zip(gradients, found, strict=True):
                gradient[rank] = x
            del first, second, part, found, x  # among them views of what was gathered
        done, dtwo = (_summed_at_home(gradient, self.axis) for gradient in gradients)
        return dq, done, dtwo

    def _blocks(self, one: Tensor, two: Tensor) -> Iterator[tuple[int, Mask, Tensor, Tensor]]:
        """(rank, mask, its part of the gathered two) for each rank's tokens; this one's first, while the rest arrives.

        Ranks of whose keys no query may see any are left out, but not where they are expanded: how often a weight is
        used must not depend on the mask.
        """
        arriving = [all_gather(x, self.axis) for x in (one, two)]
        mine = self.axis.rank
        yield mine, self._mask(mine), one, two
        ones, twos = (handle.wait().unflatten(0, (self.axis.size, -1)) for handle in arriving)
        for rank in range(self.axis.size):
            if rank != mine and (self.up is not None or not self._mask(rank).is_empty):
                yield rank, self._mask(rank), ones[rank], twos[rank]

    def _mask(self, rank: int) -> Mask:
        layout = self.call.layout
        return layout.once(Mask, layout.mine, layout.ranks[rank], self.call.window)

    def _attend(self, one: Tensor, two: Tensor, mask: Mask, q: Tensor) -> tuple[Tensor, Tensor]:
        """out and lse of one block."""
        return self.local.forward(q, *self._expand(one, two), mask, self.call.scale)

    def _expand(self, one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
        if self.up is None or self.keys_values is None:
            return one, two
        return self.keys_values(self.up(one), two)

    def _differentiate(
        self, one: Tensor, two: Tensor, mask: Mask, q: Tensor, dout: Tensor, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One block's part of dq, and the gradients of its part of the gathered two in their own types."""
        if self.up is None:
            grads = self.local.backward(dout, q, one, two, out, lse, mask, self.call.scale)
            dq, dk, dv = to_be_summed(grads, lse)
            return dq, dk.to(one.dtype), dv.to(two.dtype)
        one, two = (x.detach().requires_grad_() for x in (one, two))
        with torch.enable_grad():
            k, v = self._expand(one, two)
        grads = self.local.backward(dout, q, k.detach(), v.detach(), out, lse, mask, self.call.scale)
        dq, dk, dv = to_be_summed(grads, lse)
        # Not deferred: the weight's gradients would keep the keys and values of all ranks until then.
        with at_once(self.up.parameters()):
            torch.autograd.backward((k, v), (dk.to(k.dtype), dv.to(v.dtype)))
        assert one.grad is not None and two.grad is not None
        return dq, one.grad, two.grad


def _summed_at_home(gradient: Tensor, axis: Axis) -> Tensor:
    """(P, …) gradients of every rank's tokens → the sum of this rank's over all ranks.

    They travel in the tokens' type and are added in fp32 at least, on this rank: a library's reduce-scatter would
    either send twice the bytes or, from rank to rank, round bf16 sums each time.
    """
    parts = all_to_all(gradient, axis).wait()
    return parts.sum(dim=0, dtype=precise(gradient.dtype)).to(gradient.dtype)
