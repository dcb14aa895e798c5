"""Parameters and model FLOPs of a training step, in closed form. Imports no torch.

Convention (NVIDIA's; Megatron-LM's `num_floating_point_operations`): matrix multiplications only, two FLOPs per
multiply-add, and three times the forward pass for training (forward, input gradients, weight gradients). The head
counts always, tied or not. Embedding look-ups, norms, biases, activations, the softmax, the optimizer and recomputation
do not count. Attention counts the unmasked pairs of a query and a key only:

    one sequence (or packed document) of L tokens, causal         L^2 / 2
    the same with a sliding window of W < L tokens                W L - W^2 / 2

L^2 / 2 instead of the exact L (L + 1) / 2 is what the published figures use (Llama 3.1 405B at 8192: 2524 GFLOP per
token); the diagonal counts as half. The window's form is the same integral and meets it at W = L.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..configs import Config, ModelConfig, Problem, UserError, load, preset_names, resolve_model
from ..configs.fields import nearest
from ..configs.sources import find_config

CONVENTION = (
    "model FLOPs, forward + backward = 3 x forward, matrix multiplications only, head included; "
    "flops_per_token: unmasked attention pairs only (causal L^2/2, window W L - W^2/2; NVIDIA's published figures); "
    "flops_per_token_full_attention: the full L^2 (torchtitan's)"
)
_TRAINING = 3 * 2
"""Forward, input gradient and weight gradient, of two FLOPs per multiply-add each."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters."""

    total: int
    """All parameters; a tied head counts once."""
    active: int
    """Parameters that one token passes through, the embedding table included."""
    embedding: int
    """Rows looked up at the input: the token table and the learned positions."""


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Training FLOPs (forward + backward) by kind of layer."""

    projections: float
    """Query, key, value and output projections."""
    attention: float
    """Scores and weighted values, of the given pairs."""
    ffn: float
    """Feed-forward matrices."""
    head: float
    """Logits."""

    @property
    def total(self) -> float:
        """The sum of all kinds."""
        return self.projections + self.attention + self.ffn + self.head


@dataclass(frozen=True, kw_only=True)
class _Shape:
    """The model's sizes as plain integers: widths of all query heads (q) and of all key heads (kv) together."""

    layers: int
    hidden: int
    head_dim: int
    q: int
    kv: int
    ffn: int
    ffn_matrices: int
    vocab: int
    positions: int


def _shape(model: ModelConfig) -> _Shape:
    m = resolve_model(model, model.max_positions or 1)
    if m.vocab is None:
        raise UserError(Problem("model.vocab", "missing; it is needed to count parameters and FLOPs"))
    if m.head_dim is None or m.kv_heads is None:
        message = f"model.hidden={m.hidden} is not a multiple of model.heads={m.heads}; set model.head_dim"
        raise UserError(Problem("model.head_dim", message))
    if m.position == "learned" and model.max_positions is None:
        raise UserError(Problem("model.max_positions", "missing; it is needed to count learned positions"))
    return _Shape(
        layers=m.layers,
        hidden=m.hidden,
        head_dim=m.head_dim,
        q=m.heads * m.head_dim,
        kv=m.kv_heads * m.head_dim,
        ffn=m.ffn,
        ffn_matrices=3 if m.activation == "swiglu" else 2,
        vocab=m.vocab,
        positions=(m.max_positions or 0) if m.position == "learned" else 0,
    )


def parameter_count(model: ModelConfig) -> Counts:
    """Parameters of the model.

    Raises:
        UserError: a size that is neither given nor derivable (`model.vocab`, learned `model.max_positions`).
    """
    s = _shape(model)
    norm = s.hidden * (2 if model.norm == "layer" else 1)
    attention = s.hidden * (s.q + 2 * s.kv) + s.q * s.hidden
    attention += (s.q + 2 * s.kv) * model.qkv_bias + s.hidden * model.out_bias + 2 * s.head_dim * model.qk_norm
    ffn = s.ffn_matrices * s.hidden * s.ffn + ((s.ffn_matrices - 1) * s.ffn + s.hidden) * model.ffn_bias
    embedding = (s.vocab + s.positions) * s.hidden
    head = 0 if model.tied else s.vocab * s.hidden
    total = s.layers * (attention + ffn + 2 * norm) + norm + embedding + head
    return Counts(total=total, active=total, embedding=embedding)


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


def step_flops(model: ModelConfig, tokens: int, pairs: float) -> StepFlops:
    """FLOPs of a training step by kind of layer.

    Args:
        model: the model.
        tokens: tokens of the step that pass through the model.
        pairs: attention pairs of one layer, from `unmasked_pairs`, summed over the step's sequences or documents.
    """
    s = _shape(model)
    return StepFlops(
        projections=float(_TRAINING * tokens * s.layers * s.hidden * 2 * (s.q + s.kv)),
        attention=_TRAINING * pairs * s.layers * 2 * s.q,
        ffn=float(_TRAINING * tokens * s.layers * s.ffn_matrices * s.hidden * s.ffn),
        head=float(_TRAINING * tokens * s.hidden * s.vocab),
    )


def flops_per_step(model: ModelConfig, tokens: int, pairs: float) -> float:
    """Training FLOPs of a step; arguments as for `step_flops`."""
    return step_flops(model, tokens, pairs).total


def flops_again(model: ModelConfig, tokens: int, pairs: float) -> float:
    """FLOPs of a step's second forward pass of all layers (memory.recompute=full); arguments as for `step_flops`."""
    parts = step_flops(model, tokens, pairs)
    return (parts.projections + parts.attention + parts.ffn) / 3


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Training FLOPs per token of whole sequences of `seq_len` tokens, unmasked attention pairs only."""
    return flops_per_step(model, seq_len, unmasked_pairs([seq_len], model.window)) / seq_len


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
    parts = step_flops(config, seq_len, unmasked_pairs([seq_len], config.window))
    return {
        "model": str(model) if isinstance(model, (str, Path)) else (config.preset or config.family),
        "seq_len": seq_len,
        "params_total": counts.total,
        "params_active": counts.active,
        "params_embedding": counts.embedding,
        "flops_per_token": parts.total / seq_len,
        "flops_per_token_full_attention": flops_per_token_full_attention(config, seq_len),
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
