"""Parameters of a model and the sizes of its matrices, in closed form. Imports no torch.

The modules of multi-token prediction (model.mtp) count as further layers, of experts where the model has any, each with
a projection of two streams to one, 2 h^2, and three norms; they share the embedding and the head.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...configs import ModelConfig, Problem, UserError, resolve_model


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Numbers of parameters."""

    total: int
    """All parameters; a tied head counts once."""
    active: int
    """Parameters that one token passes through, the embedding table included; of the routed experts as many as a token
    is sent to (see `active_experts`)."""
    embedding: int
    """Rows looked up at the input: the token table and the learned positions."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Elements of the matrices (multiply-adds of a token), and how often they occur."""

    hidden: int
    vocab: int
    positions: int
    """Learned positions."""
    projections: int
    """Softmax attention's matrices in one layer."""
    per_pair: int
    """Multiply-adds of attention for one query and one key: all heads' scores and weighted values."""
    linear_projections: int
    """Linear attention's matrices in one layer."""
    state: int
    """Multiply-adds of linear attention for one token: all heads' kᵀv and q S."""
    linear: int
    """Layers with linear attention."""
    ffn: int
    """A dense feed-forward network."""
    expert: int
    """A routed expert."""
    shared: int
    """The shared expert of a layer."""
    router: int
    """Logits of one layer, null experts included."""
    dense: int
    """Layers with a dense feed-forward network."""
    routed: int
    """Layers with experts."""

    @property
    def layers(self) -> int:
        """All layers."""
        return self.dense + self.routed

    @property
    def softmax(self) -> int:
        """Layers with softmax attention."""
        return self.layers - self.linear


def active_experts(model: ModelConfig) -> float:
    """Experts that compute for a token, on average.

    model.moe.top_k, whatever a capacity drops. With null experts only their even share of the choices computes: of
    top_k choices among E experts and n null ones, top_k E / (E + n).
    """
    moe = model.moe
    return moe.top_k * moe.experts / (moe.experts + moe.router.null_experts) if moe.experts else 0.0


def sizes(model: ModelConfig) -> Sizes:
    """The sizes of the model.

    Raises:
        UserError: a size that is neither given nor derivable (`model.vocab`, learned `model.max_positions`).
    """
    m = resolve_model(model, model.max_positions or 1)
    if m.vocab is None:
        raise UserError(Problem("model.vocab", "missing; it is needed to count parameters and FLOPs"))
    if m.head_dim is None or m.kv_heads is None:
        message = f"model.hidden={m.hidden} is not a multiple of model.heads={m.heads}; set model.head_dim"
        raise UserError(Problem("model.head_dim", message))
    if m.position == "learned" and model.max_positions is None:
        raise UserError(Problem("model.max_positions", "missing; it is needed to count learned positions"))
    value = m.mla.value_dim if m.mla.kv_rank else m.head_dim
    matrices, routed = matrices_of(m), len(m.moe_layers) + (m.mtp if m.moe.experts else 0)
    return Sizes(
        hidden=m.hidden,
        vocab=m.vocab,
        positions=m.max_positions if m.position == "learned" else 0,
        projections=_projections(m, m.head_dim, m.kv_heads),
        per_pair=m.heads * (m.head_dim + value),
        linear_projections=_linear_projections(m),
        state=2 * m.heads * m.linear.key_dim * m.linear.value_dim,
        linear=len(m.linear_layers),
        ffn=matrices * m.hidden * m.ffn,
        expert=matrices * m.hidden * m.moe.ffn,
        shared=matrices * m.hidden * m.moe.shared,
        router=(m.moe.experts + m.moe.router.null_experts) * m.hidden,
        dense=m.layers + m.mtp - routed,
        routed=routed,
    )


def matrices_of(model: ModelConfig) -> int:
    """Matrices of a feed-forward network: three with a gate, else two."""
    return 3 if model.activation.startswith("swiglu") else 2


def _projections(m: ModelConfig, head_dim: int, kv_heads: int) -> int:
    h, mla, heads = m.hidden, m.mla, m.heads
    if not mla.kv_rank:
        return 2 * h * (heads + kv_heads) * head_dim
    queries = h * heads * head_dim if mla.q_rank is None else mla.q_rank * (h + heads * head_dim)
    keys = h * (mla.kv_rank + mla.rope_dim) + mla.kv_rank * heads * (mla.nope_dim + mla.value_dim)
    return queries + keys + heads * mla.value_dim * h


def _linear_projections(m: ModelConfig) -> int:
    """Queries, keys and their decays; values, their gates and the output."""
    keys, values, rank = m.heads * m.linear.key_dim, m.heads * m.linear.value_dim, m.linear.gate_rank
    return m.hidden * (2 * keys + 3 * values + rank) + rank * keys


def parameter_count(model: ModelConfig) -> Counts:
    """Parameters of the model.

    Raises:
        UserError: a size that is neither given nor derivable (`model.vocab`, learned `model.max_positions`).
    """
    s, moe, gated = sizes(model), model.moe, matrices_of(model) - 1
    h = s.hidden
    norm = h * (2 if model.norm == "layer" else 1)
    softmax = s.projections + _attention_vectors(model)
    linear = s.linear_projections + model.heads * model.linear.key_dim + model.linear.value_dim
    around = s.softmax * softmax + s.linear * linear + s.layers * 2 * norm
    ffn = s.ffn + (gated * model.ffn + h) * model.ffn_bias
    width = model.ffn if moe.ffn is None else moe.ffn
    expert = s.expert + (gated * width + h) * moe.bias
    beside = s.router + (moe.experts + moe.router.null_experts) * moe.router.logit_bias
    if moe.shared:
        beside += s.shared + (gated * moe.shared + h) * model.ffn_bias + h * moe.shared_gate
    embedding = (s.vocab + s.positions) * h
    rest = norm + embedding + (0 if model.tied else s.vocab * h) + model.mtp * (2 * h * h + 3 * norm)
    every = around + s.dense * ffn + s.routed * beside + rest
    return Counts(
        total=every + s.routed * moe.experts * expert,
        active=every + round(s.routed * active_experts(model) * expert),
        embedding=embedding,
    )


def _attention_vectors(model: ModelConfig) -> int:
    """Biases, norms and sinks of one layer's softmax attention."""
    m, mla = resolve_model(model, model.max_positions or 1), model.mla
    head_dim, kv_heads = m.head_dim, m.kv_heads
    q, kv = m.heads * head_dim, kv_heads * head_dim
    found = m.hidden * m.out_bias + m.heads * m.sinks
    if mla.kv_rank:
        narrow = mla.kv_rank + (mla.q_rank or 0)
        return found + narrow + (narrow + mla.rope_dim) * m.qkv_bias
    return found + (q + 2 * kv) * m.qkv_bias + (q + kv if m.qk_norm_whole else 2 * head_dim) * m.qk_norm
