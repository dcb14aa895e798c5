"""The router: which experts a token goes to, and with which weights.

Shapes: n tokens of this device, N of the microbatch, E experts, C choices (experts and null experts), K per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ...configs.schema import ModelConfig
from ...parallel.expert.routing import Findings, RouteForm, Routing
from ...parallel.expert.tokens import TokenPool
from ..dropout import Draws
from ..sequences import Sequences
from .choice import as_columns, capacity, choices_of, expert_choice, is_plain, sinkhorn_prices, top_k, within_capacity
from .logits import router_logits
from .losses import Losses, attach, count_of, fractions, losses, probabilities
from .tally import add_to, columns


@dataclass(frozen=True)
class Decision:
    """What is decided once for a microbatch, also where the layer runs again for its backward.

    Args:
        choices: (n, K) whose scores become the weights.
        real: (n, K) which of these are experts; none: all.
        experts: (n, K) ids, -1 where a token goes to none.
        counts: (C,) fp64, how often this device's tokens took each choice, before any was dropped.
        capacity: as of `Routing`.
        loads: as of `routing_losses.fractions`; none: no balancing loss.
        findings: as of `Routing`.
    """

    choices: Tensor
    real: Tensor | None
    experts: Tensor
    counts: Tensor
    capacity: int | None
    loads: Tensor | None
    findings: Findings = field(default_factory=Findings)


@dataclass(frozen=True)
class RouterKernels:
    """Kernels for what a plain router makes of its logits; signatures as in `parallel.kernels.triton.routing`."""

    route: Callable[[Tensor, Tensor, Tensor | None, Tensor | None, RouteForm], tuple[Tensor, Tensor]]
    totals: Callable[[Tensor], Tensor]
    settle: Callable[[Tensor, Tensor | None, Tensor | None, Tensor, int, float, float], None]


class Router(nn.Module):
    """Scores every choice for every token, and picks.

    Training forwards (`Sequences.share` above 0) count what happens in `tally` (fp64, see `routing_tally`) and run the
    backward of the balancing losses with that of the weights.

    Replaceable from outside: `tokens`, who has the other tokens of a microbatch, and `fixed_width`, whether K has to be
    the same for every microbatch; `kernels` for logits in fp32 (none: torch's operators).

    With name=expert_choice the weights are the scores themselves, whatever `normalize` says; sinkhorn with one expert
    per token has sigmoid scores, as it would have weight 1 otherwise.
    """

    selection_bias: Tensor | None
    load: Tensor | None
    tally: Tensor

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        moe = cfg.moe
        self.moe, self.cfg, self.index = moe, moe.router, index
        choices = choices_of(moe)
        self.weight = nn.Parameter(torch.empty(choices, cfg.hidden))
        self.bias = nn.Parameter(torch.empty(choices)) if self.cfg.logit_bias else None
        remembers = self.cfg.aux_loss > 0 and self.cfg.aux_level == "global_batch"
        self.register_buffer("selection_bias", torch.zeros(choices) if self.cfg.selection_bias else None)
        self.register_buffer("load", torch.zeros(choices) if remembers else None)
        self.register_buffer("tally", torch.zeros(columns(moe), dtype=torch.float64), persistent=False)
        self.tokens = TokenPool.whole()
        self.fixed_width = False
        self.kernels: RouterKernels | None = None
        sinkhorn, name = self.cfg.name == "sinkhorn", self.cfg.name
        self._has_losses = self.cfg.aux_loss > 0 or self.cfg.z_loss > 0
        self._score = "sigmoid" if sinkhorn and moe.top_k == 1 else self.cfg.score
        self._normalize = self.cfg.normalize and name != "expert_choice" and not (sinkhorn and moe.top_k == 1)

    def forward(self, x: Tensor, seq: Sequences, draws: Draws | None = None) -> Routing:
        """x (n, h) → the routing of n tokens."""
        training = seq.share > 0
        if training and self.cfg.jitter and draws is not None:
            x = draws.jitter(x, self.cfg.jitter, self.index)
        logits = router_logits(x, self.weight, self.bias)
        if self.kernels is not None and self._suits_kernels and logits.dtype == torch.float32:
            return self._by_kernels(self.kernels, logits, seq)
        scores = torch.softmax(logits, -1) if self._score == "softmax" else torch.sigmoid(logits)
        decision = None if seq.kept is None else seq.kept.get(self.index)
        first = decision is None
        if decision is None:
            decision = self._decide(logits.detach(), scores.detach(), seq)
            if seq.kept is not None:
                seq.kept[self.index] = decision
        weights = self._weights(logits, scores, decision.choices, decision.real)
        if decision.experts is not decision.choices:
            weights = weights.masked_fill(decision.experts < 0, 0.0)
        if training and (first or self._has_losses):
            terms = self._losses(logits, scores, decision.loads, seq)
            if first:
                shares = probabilities(scores.detach(), self._score)
                add_to(self.tally, self.moe, decision.counts, decision.experts, shares, terms, seq.share)
            weights = self._attached(weights, terms, seq.share)
        return Routing(decision.experts, weights, decision.capacity, decision.findings)

    @property
    def _suits_kernels(self) -> bool:
        """Whether every choice is an expert that takes the token."""
        return self.cfg.name == "top_k" and not self.cfg.null_experts and self.moe.capacity_factor is None

    def _by_kernels(self, kernels: RouterKernels, logits: Tensor, seq: Sequences) -> Routing:
        """The same as `forward` of logits (n, C), without scores and losses as tensors of their own."""
        decision = None if seq.kept is None else seq.kept.get(self.index)
        first = decision is None
        if decision is None:
            decision = self._decide_by_kernels(logits.detach(), seq)
            if seq.kept is not None:
                seq.kept[self.index] = decision
        tokens = self.tokens.count(len(logits))
        aux, z = seq.share * logits.shape[1] / tokens, seq.share / tokens
        softmax = self._score == "softmax"
        form = RouteForm(softmax, self._normalize, self.cfg.scale, self.cfg.aux_loss * aux, self.cfg.z_loss * z)
        sequences = seq.rows if decision.loads is not None and decision.loads.ndim == 2 else None
        weights, partial = kernels.route(logits, decision.choices, decision.loads, sequences, form)
        if first and seq.share > 0:
            totals = kernels.totals(partial)
            counts = None if decision.loads is None or sequences is not None else self._counts(totals, decision)
            kernels.settle(totals, counts, decision.loads, self.tally, len(logits), aux, z)
        return Routing(decision.experts, weights, None, decision.findings)

    @torch.no_grad()
    def rebalance(self, counts: Tensor, go: Tensor) -> None:
        """Follows a step in which the choices were taken so often.

        Args:
            counts: (C,) fp64, of the whole batch.
            go: (scalar) 0: nothing moves.
        """
        experts = self.moe.experts
        if self.selection_bias is not None:
            null = counts[experts:]
            loads = torch.cat((counts[:experts], null.sum().expand_as(null) / max(len(null), 1)))
            self.selection_bias += (torch.sign(loads.mean() - loads) * (self.cfg.bias_rate * go)).float()
        if self.load is not None:
            self.load.copy_(torch.where(go > 0, counts / counts.sum(), self.load.double()))

    def _weights(self, logits: Tensor, scores: Tensor, choices: Tensor, real: Tensor | None) -> Tensor:
        """(n, K) weights of the choices, before any is dropped: those left are not scaled up."""
        if self._normalize and self._score == "softmax":
            chosen = logits.gather(-1, choices)
            if real is not None:
                chosen = chosen.masked_fill(~real, torch.finfo(chosen.dtype).min)
            weights = torch.softmax(chosen, -1)
        else:
            weights = scores.gather(-1, choices)
        if real is not None:
            weights = weights.masked_fill(~real, 0.0)
        if self._normalize and self._score == "sigmoid":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.cfg.scale if self.cfg.scale != 1 else weights

    def _losses(self, logits: Tensor, scores: Tensor, loads: Tensor | None, seq: Sequences) -> Losses:
        """This device's part of the losses; those without a coefficient are only counted."""
        shares = None if loads is None else probabilities(scores, self._score)
        count = self.tokens.count(len(logits))
        return losses(logits if self.cfg.z_loss else logits.detach(), shares, loads, seq, count)

    def _attached(self, weights: Tensor, terms: Losses, share: float) -> Tensor:
        loss = None
        if terms.balance is not None:
            loss = terms.balance * (self.cfg.aux_loss * share)
        if self.cfg.z_loss:
            z = terms.z * (self.cfg.z_loss * share)
            loss = z if loss is None else loss + z
        return weights if loss is None else attach(weights, loss)

    # Decisions ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _decide(self, logits: Tensor, scores: Tensor, seq: Sequences) -> Decision:
        moe, real = self.moe, None
        training = seq.share > 0
        if self.cfg.name == "expert_choice":
            choices, real = self._taken(scores[:, : moe.experts], _places(seq))
        else:
            choices = self._chosen(logits, scores, seq)
            if self.cfg.null_experts:
                real = choices < moe.experts
        experts = choices if real is None else choices.masked_fill(~real, -1)
        padded = None
        if moe.capacity_factor is not None and self.cfg.name != "expert_choice":
            weights = self._weights(logits, scores, choices, real) if moe.drop == "probability" else None
            room, limit = self._room(experts, weights, _places(seq))
            experts = experts.masked_fill(~room, -1)
            padded = limit if moe.pad else None
        taken = choices if self.cfg.name != "expert_choice" else choices[real]
        counts = count_of(taken.reshape(-1), logits.shape[1])
        loads = None
        if training and self.cfg.aux_loss:
            best = choices if is_plain(moe) else scores.topk(moe.top_k, -1).indices
            loads = fractions(best, seq, self.tokens, moe, self.load)
        return Decision(choices, real, experts, counts, padded, loads)

    @torch.no_grad()
    def _decide_by_kernels(self, logits: Tensor, seq: Sequences) -> Decision:
        """As `_decide`; what is counted comes later."""
        plain = is_plain(self.moe)
        scores = logits if plain else (torch.softmax(logits, -1) if self._score == "softmax" else torch.sigmoid(logits))
        choices = self._chosen(logits, scores, seq)
        counts, loads = logits.new_empty(0), None
        if seq.share > 0 and self.cfg.aux_loss and self.cfg.aux_level == "sequence":
            best = choices if plain else scores.topk(self.moe.top_k, -1).indices
            loads = fractions(best, seq, self.tokens, self.moe, None).to(logits.dtype)
        elif seq.share > 0 and self.cfg.aux_loss:
            loads = logits.new_empty(logits.shape[1])
            if not plain and self.load is None:
                counts = count_of(scores.topk(self.moe.top_k, -1).indices.reshape(-1), logits.shape[1])
        return Decision(choices, None, choices, counts, None, loads)

    def _counts(self, totals: Tensor, decision: Decision) -> Tensor:
        """(C,) that the loads follow: of the step before, or how often tokens have each among their best scores."""
        if self.load is not None:
            return self.load
        mine = decision.counts if len(decision.counts) else totals[: choices_of(self.moe)]
        return self.tokens.sum(mine)

    def _chosen(self, logits: Tensor, scores: Tensor, seq: Sequences) -> Tensor:
        """(n, K) each token's choices."""
        if self.cfg.name == "sinkhorn" and seq.share > 0:
            prices = sinkhorn_prices(self.tokens.gather(logits, _places(seq)))
            return (logits + prices).topk(self.moe.top_k, -1).indices
        return top_k(logits, scores, self.moe, self.selection_bias)

    def _taken(self, scores: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(n, K) experts that take each token, and which of them count.

        K is what the most wanted token of the microbatch has, or with `fixed_width` all that it could have.
        """
        everywhere = expert_choice(self.tokens.gather(scores, places), self.moe)
        width = self.moe.experts if self.fixed_width else max(int(everywhere.sum(1).max()), 1)
        return as_columns(self.tokens.mine(everywhere, places), width)

    def _room(self, experts: Tensor, weights: Tensor | None, places: Tensor) -> tuple[Tensor, int]:
        """(n, K) whether an expert has room for the token, and how many it takes."""
        alone = self.moe.capacity_scope == "local"
        whole = experts if alone else self.tokens.gather(experts, places)
        if weights is not None and not alone:
            weights = self.tokens.gather(weights, places)
        limit = capacity(self.moe, len(whole))
        room = within_capacity(whole, weights, limit, self.moe.experts)
        return room if alone else self.tokens.mine(room, places), limit


def _places(seq: Sequences) -> Tensor:
    assert seq.places is not None
    return seq.places
