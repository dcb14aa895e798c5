"""How many of a layer's tokens go to the host and how many are computed again: MEMO (Zhao et al., 2024). No torch.

What a layer keeps is of three sorts. Its input and the attention's result are dear to compute again and small: all
of both goes to the host. The others (normalised inputs, queries, keys, values, inner vectors of the network) are made
token by token, so a share α of their tokens can go to the host and the rest be computed again, just before the layer's
backward pass. The largest α costs the least time, as long as the copies hide behind the next layer's forward pass and
the host has room for all layers but the two that are in use:

    (S_in + S_attn + α S_others) / B ≤ T_layer            (n - 2) (S_in + S_attn + α S_others) ≤ M_host

For a layer of the GPT kind with causal attention, where S_in = S_attn = 2 b s h bytes and S_others = 28 b s h in bf16,
the first says α = 1 from s ≥ 16 F / B - 12 h tokens on, at F FLOP/s and B bytes/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """Bytes that one microbatch's pass through a layer keeps on a rank.

    Args:
        input: the layer's input.
        attention: the attention's result, with its log-sum-exp.
        others: everything that can be computed again token by token.
    """

    input: float
    attention: float
    others: float


@dataclass(frozen=True, kw_only=True)
class TokenShare:
    """What goes to the host.

    Args:
        share: of the tokens of the others, α; the rest is computed again.
        whole: of input and attention, those that go too; fewer than both where not even they hide.
        bound: what keeps α below 1; none: nothing does.
    """

    share: float
    whole: tuple[str, ...]
    bound: Literal["none", "copies", "host"]


def token_share(
    parts: LayerParts, *, forward_s: float, host_bytes_s: float, layers: int, host_bytes: float | None = None
) -> TokenShare:
    """The largest share α that hides and fits.

    Args:
        parts: of one layer.
        forward_s: its forward pass in seconds. A backward pass takes longer, so only forward passes bind.
        host_bytes_s: from the device to the host.
        layers: of the rank, n.
        host_bytes: that the rank may use on the host; none: enough.
    """
    hidden = forward_s * host_bytes_s
    room = float("inf") if host_bytes is None else host_bytes / max(layers - 2, 1)
    most = min(hidden, room)
    bound: Literal["copies", "host"] = "copies" if hidden <= room else "host"
    dear = parts.input + parts.attention
    if dear > most:
        # Not even α = 0 hides: the input alone, or nothing.
        return TokenShare(share=0.0, whole=("input",) if parts.input <= most else (), bound=bound)
    share = 1.0 if parts.others <= most - dear else (most - dear) / parts.others
    return TokenShare(share=share, whole=("input", "attention"), bound=bound if share < 1 else "none")
