"""Model FLOPs of a training step, in closed form. Imports no torch.

Convention (NVIDIA's; Megatron-LM's `num_floating_point_operations`): matrix multiplications only, two FLOPs per
multiply-add, and three times the forward pass for training (forward, input gradients, weight gradients). The head
counts always, tied or not. Of routed experts those count that a token is sent to (`counts.active_experts`). Embedding
look-ups, norms, biases, activations, the softmax, routers and gates, the optimizer and recomputation do not count.
Multi-token prediction counts: its layers, the projections before them and one more head each. Attention counts the
unmasked pairs of a query and a key only:

    one sequence (or packed document) of L tokens, causal         L^2 / 2
    the same with a sliding window of W < L tokens                W L - W^2 / 2

Linear attention counts as the recurrence: for each token and head the products kᵀv and q S of key_dim x value_dim
multiply-adds each, whatever more the chunks compute, and beside the pairs.

L^2 / 2 instead of the exact L (L + 1) / 2 is what the published figures use (Llama 3.1 405B at 8192: 2524 GFLOP per
token); the diagonal counts as half. The window's form is the same integral and meets it at W = L.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...configs import Config, ModelConfig, Problem, UserError, load, preset_names
from ...configs.errors import nearest
from ...configs.sources import find_config
from .parameters import active_experts, parameter_count, sizes

CONVENTION = (
    "model FLOPs, forward + backward = 3 x forward, matrix multiplications only, head included, "
    "of routed experts those that a token is sent to; "
    "flops_per_token: unmasked attention pairs only (causal L^2/2, window W L - W^2/2; NVIDIA's published figures); "
    "flops_per_token_full_attention: the full L^2 (torchtitan's)"
)
_TRAINING = 3 * 2
"""Forward, input gradient and weight gradient, of two FLOPs per multiply-add each."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Training FLOPs (forward + backward) by kind of layer."""

    projections: float
    """Query, key, value and output projections."""
    attention: float
    """Scores and weighted values, of the given pairs; linear attention's states."""
    ffn: float
    """Matrices of dense feed-forward networks."""
    experts: float
    """Matrices of the routed experts that a token is sent to."""
    shared: float
    """Matrices of the shared experts."""
    mtp: float
    """Projections that join two streams for multi-token prediction; its layers and heads are in the other kinds."""
    head: float
    """Logits, once more for every token predicted beyond the next."""

    @property
    def layers(self) -> float:
        """The kinds that layers are made of."""
        return self.projections + self.attention + self.ffn + self.experts + self.shared

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.layers + self.mtp + self.head


def unmasked_pairs(lengths: Iterable[int], window: int | None = None) -> float:
    """Pairs of a query and a key that attention computes, as `flops_per_step` counts them.

    Args:
        lengths: tokens of each sequence, or of each document where documents do not see each other.
        window: sliding window in tokens (`model.window`).
    """
    total = 0.0
    for length in lengths:
        reach = length if window is None else min(length, window)
        total += reach * length - reach * reach / 2
    return total


def layer_windows(model: ModelConfig) -> tuple[int | None, ...]:
    """The sliding window of each layer with softmax attention, modules of multi-token prediction included; None: full
    attention."""
    linear = set(model.linear_layers)
    return tuple(model.window_of(layer) for layer in range(model.layers + model.mtp) if layer not in linear)


def mean_pairs(model: ModelConfig, lengths: Iterable[int]) -> float:
    """`unmasked_pairs` of one layer, the mean over those with softmax attention, which may differ in their windows.

    Args:
        model: the model.
        lengths: tokens of each sequence, or of each document where documents do not see each other.
    """
    lengths = list(lengths)
    windows = Counter(layer_windows(model))
    pairs = [(count, unmasked_pairs(lengths, window)) for window, count in windows.items()]
    if not pairs:
        return 0.0
    return pairs[0][1] if len(pairs) == 1 else sum(count * each for count, each in pairs) / windows.total()


def step_flops(model: ModelConfig, tokens: int, pairs: float) -> StepFlops:
    """FLOPs of a training step by kind of layer.

    Args:
        model: the model.
        tokens: tokens of the step that pass through the model.
        pairs: attention pairs of one layer, from `mean_pairs`, summed over the step's sequences or documents.
    """
    s = sizes(model)
    per_token = _TRAINING * tokens
    return StepFlops(
        projections=float(per_token * (s.softmax * s.projections + s.linear * s.linear_projections)),
        attention=_TRAINING * pairs * s.softmax * s.per_pair + per_token * s.linear * s.state,
        ffn=float(per_token * s.dense * s.ffn),
        experts=per_token * s.routed * active_experts(model) * s.expert,
        shared=float(per_token * s.routed * s.shared),
        mtp=float(per_token * model.mtp * 2 * s.hidden**2),
        head=float(per_token * (1 + model.mtp) * s.hidden * s.vocab),
    )


def flops_per_step(model: ModelConfig, tokens: int, pairs: float) -> float:
    """Training FLOPs of a step; arguments as for `step_flops`."""
    return step_flops(model, tokens, pairs).total


def fp8_flops(model: ModelConfig, tokens: int, scaling: str) -> float:
    """Of a step's training FLOPs those in 8 bits: the products of linears that `parallel.fp8` lists.

    Args:
        scaling: as `train.fp8`.
    """
    s, parts = sizes(model), step_flops(model, tokens, 0.0)
    rank, keys = model.linear.gate_rank, model.heads * model.linear.key_dim
    decays = float(_TRAINING * tokens * s.linear * rank * (model.hidden + keys))
    dense = parts.projections - decays + parts.ffn + parts.shared + parts.mtp
    share = {"none": 0.0, "tensor": 1.0, "row": 2 / 3, "block": 1.0}[scaling]
    return dense * share + parts.experts * min(share, 2 / 3)


def layer_flops(model: ModelConfig, seq_len: int) -> tuple[float, ...]:
    """FLOPs of a forward pass of one sequence: of each layer, each prediction module, last of all uses of the head."""
    s, active, routed, linear = sizes(model), active_experts(model), set(model.routed_layers), set(model.linear_layers)
    found = []
    for layer in range(model.layers + model.mtp):
        beside = active * s.expert + s.shared if layer in routed else s.ffn
        if layer in linear:
            attention = float(seq_len * (s.linear_projections + s.state))
        else:
            attention = seq_len * s.projections + unmasked_pairs([seq_len], model.window_of(layer)) * s.per_pair
        joined = 2 * s.hidden**2 if layer >= model.layers else 0
        found.append(2 * (seq_len * (beside + joined) + attention))
    return (*found, 2.0 * seq_len * s.hidden * s.vocab * (1 + model.mtp))


def s_mfu_flops_per_step(model: ModelConfig, tokens: int, pairs: float) -> float:
    """What S-MFU divides by time and peak: attention, router and the experts that compute, of all layers.

    MoE-CAP (arXiv 2412.07067) counts per token and layer F_attention + 2 N_router + 2 k N_expert, k with the shared
    experts, and no head; here times 3 for training. A dense layer is one expert without a router. Arguments as for
    `step_flops`.
    """
    s = sizes(model)
    return step_flops(model, tokens, pairs).layers + _TRAINING * tokens * s.routed * s.router


def s_mfu_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """`s_mfu_flops_per_step` per token of whole sequences of `seq_len` tokens, unmasked attention pairs only."""
    return s_mfu_flops_per_step(model, seq_len, mean_pairs(model, [seq_len])) / seq_len


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token of whole sequences of `seq_len` tokens, unmasked attention pairs only."""
    return flops_per_step(model, seq_len, mean_pairs(model, [seq_len])) / seq_len


def flops_per_token_full_attention(model: ModelConfig, seq_len: int) -> float:
    """The same with the full square of attention, window and causal mask ignored (torchtitan's convention)."""
    return flops_per_step(model, seq_len, float(seq_len) * seq_len) / seq_len


def report(model: str | Path | ModelConfig | Config, seq_len: int) -> dict[str, Any]:
    """What `pentad flops` prints.

    Args:
        model: a preset of presets/models, a job's file or name, or a configuration.
        seq_len: tokens per sequence.

    Raises:
        UserError: unknown name, or a sequence length that the model cannot have.
    """
    config = _find(model, seq_len)
    counts = parameter_count(config)
    parts = step_flops(config, seq_len, mean_pairs(config, [seq_len]))
    return {
        "model": str(model) if isinstance(model, (str, Path)) else (config.preset or config.family),
        "seq_len": seq_len,
        "params_total": counts.total,
        "params_active": counts.active,
        "params_embedding": counts.embedding,
        "flops_per_token": parts.total / seq_len,
        "flops_per_token_full_attention": flops_per_token_full_attention(config, seq_len),
        "s_mfu_flops_per_token": s_mfu_flops_per_token(config, seq_len),
        "breakdown": {kind: flops / seq_len for kind, flops in asdict(parts).items()},
        "convention": CONVENTION,
    }


def _find(model: str | Path | ModelConfig | Config, seq_len: int) -> ModelConfig:
    if seq_len < 1:
        raise UserError(Problem("seq-len", f"must be at least 1, got {seq_len}"))
    if isinstance(model, Config):
        return model.model
    if isinstance(model, ModelConfig):
        return model
    presets = preset_names("models")
    if str(model) in presets:
        return load(None, [f"model.preset={model}", f"train.seq_len={seq_len}"]).model
    if isinstance(find_config(model), Problem):
        hint = nearest(str(model).lower().replace("-", "_"), [*presets, *preset_names("jobs")])
        tail = f"did you mean {hint}?" if hint else f"models: {', '.join(presets)}"
        raise UserError(Problem(str(model), f"neither a model preset nor a job's file; {tail}"))
    return load(model, [f"train.seq_len={seq_len}"]).model
