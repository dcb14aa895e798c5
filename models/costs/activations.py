"""What a layer keeps from its forward for its backward pass: a table with one row a tensor. No torch.

A row says how many bytes the tensor has on one rank, and which part of a layer would make it again in the backward pass
if it were not kept (`memory.recompute`), with how many FLOPs of matrix products:

    norm         outputs of the norms, from their inputs
    activation   outputs of the feed-forward non-linearity, from what it reads
    attention    queries, keys and values, from the norm's output; attention's own output and log-sum-exp stay
    latent       queries, keys and values of latent attention, from the narrow vectors
    ffn          outputs of a dense or shared network's first matrices, from the norm's output
    moe          the same of the experts, from the rows that were sent to them
    head         the gradient of the head's input, from the head's input

Nothing makes the others again but the whole layer from its input (`full`). Shapes: N tokens of the rank's sequences,
n = N / tp of them in the residual stream, h hidden width, R rows of experts, f inner width, q, k widths of all query
and key heads of the rank. What each part keeps is said where its rows are made; names are those of the classes of
`models/`. `tests/models/costs/test_activations.py` holds the table to what autograd keeps.
"""

from __future__ import annotations

import math

from ...configs import ModelConfig
from .kept import INPUT, Kept
from .parameters import matrices_of
from .widths import LocalWork, Widths

RECOMPUTABLE = ("norm", "activation", "attention", "latent", "ffn", "moe", "head")
"""The parts of a layer (head: of the model) that can run again by themselves."""


_INDEX = 8
"""Bytes of an index."""


def layer_rows(model: ModelConfig, layer: int, work: LocalWork) -> list[Kept]:
    """What a layer of a resolved model keeps on one rank.

    Args:
        model: the model.
        layer: its index; those of prediction modules follow the last layer.
        work: the microbatch.
    """
    w = Widths.of(model, work.tp, work.etp)
    stream = work.stream * model.hidden
    rows = [Kept(INPUT, stream, work.width), *_norm(model, work, "attention norm")]
    if layer in model.linear_layers:
        rows += _linear_attention(model, w, work)
    elif model.mla.kv_rank:
        rows += _latent_attention(model, w, work)
    else:
        rows += _attention(model, w, work)
    rows += [
        *_dropout(model, work, "attention"),
        Kept("middle", stream, work.width),
        *_norm(model, work, "ffn norm"),
    ]
    if layer in model.routed_layers:
        rows += _moe(model, w, work)
    else:
        rows += _network(model, work, w.ffn, "ffn")
    return [*rows, *_dropout(model, work, "ffn")]


def _norm(model: ModelConfig, work: LocalWork, name: str) -> list[Kept]:
    """The norm's output (n, h), read by the projections; what it keeps itself are its input and a number a token."""
    return [
        _norm_numbers(model, work, f"{name} numbers", ("norm",)),
        Kept(name, work.stream * model.hidden, work.width, ("norm",)),
    ]


def _norm_numbers(model: ModelConfig, work: LocalWork, name: str, parts: tuple[str, ...] = ()) -> Kept:
    """Of each token the root mean square, in fp32; or mean and deviation, in the layer's type."""
    if model.norm == "layer":
        return Kept(name, 2 * work.stream, work.width, parts)
    return Kept(name, work.stream, work.precise, parts)


def _dropout(model: ModelConfig, work: LocalWork, name: str) -> list[Kept]:
    """One byte an element says what was dropped."""
    return [Kept(f"{name} dropout", work.stream * model.hidden, 1)] if model.dropout else []


def _core(w: Widths, work: LocalWork) -> list[Kept]:
    """Attention's result and log-sum-exp; exchanged back or copied to tokens, the result is a second tensor."""
    out = Kept("attention output", work.tokens * w.value, work.width)
    again = (
        [Kept("attention output by token", work.tokens * w.value, work.width)]
        if work.exchanged > 1 or work.by_head
        else []
    )
    return [Kept("log-sum-exp", work.tokens * w.heads, work.precise), out, *again]


def _attention(model: ModelConfig, w: Widths, work: LocalWork) -> list[Kept]:
    """Queries and keys, rotated, and values; where heads are normed, queries and keys before that too."""
    tokens, product, parts = work.tokens, 2.0 * work.tokens * model.hidden, ("attention",)
    # Exchanged heads are copied where there are too few of them.
    copies = math.lcm(w.kv // model.head_dim, work.exchanged) // (w.kv // model.head_dim)
    here = _unless_exchanged(work, parts)
    rows = [
        Kept("queries", tokens * w.q, work.width, here, product * w.q),
        Kept("keys", tokens * w.kv * copies, work.width, here, product * w.kv),
        Kept("values", tokens * w.kv * copies, work.width, here, product * w.kv),
    ]
    if model.qk_norm:
        numbers = 2 if model.qk_norm_whole else (w.q + w.kv) // model.head_dim
        rows.append(Kept("queries and keys before their norm", tokens * (w.q + w.kv), work.width, parts))
        rows.append(Kept("their norms' numbers", tokens * numbers, work.precise, parts))
    return [*rows, *_core(w, work)]


def _unless_exchanged(work: LocalWork, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Who makes again what attention reads: nobody, where that came from other ranks."""
    return () if work.exchanged > 1 else parts


def _latent_attention(model: ModelConfig, w: Widths, work: LocalWork) -> list[Kept]:
    """The narrow vectors once in t ranks, and of all heads queries, keys, and what keys and values were cut from."""
    mla, tokens, n = model.mla, work.tokens, work.stream
    parts = _unless_exchanged(work, ("latent", "attention"))
    narrowed = ("attention", "latent", "norm")
    narrow = 2.0 * n * model.hidden
    rows = []
    if mla.q_rank:
        flops = narrow * mla.q_rank
        rows.append(Kept("narrow queries", n * mla.q_rank, work.width, ("attention",), flops))
        rows.append(Kept("narrow queries normed", n * mla.q_rank, work.width, narrowed))
    low = mla.kv_rank + mla.rope_dim
    rows.append(Kept("latents", n * low, work.width, ("attention",), narrow * low, n * mla.kv_rank))
    rows.append(Kept("latent norms' numbers", n * (2 if mla.q_rank else 1), work.precise, narrowed))
    before = 2.0 * tokens * (mla.q_rank or model.hidden)
    # Queries that are not made from narrow ones are what `latent` begins with.
    whole = parts if mla.q_rank else _unless_exchanged(work, ("attention",))
    rows.append(Kept("queries", tokens * w.q, work.width, whole, before * w.q))
    if work.latents:
        # Gathered latents are expanded again in backward.
        rows.append(Kept("latents normed", n * mla.kv_rank, work.width, narrowed))
        rows.append(Kept("turned keys", tokens * mla.rope_dim, work.width, parts))
        return [*rows, *_core(w, work)]
    rows.append(Kept("latents normed", n * mla.kv_rank, work.width, narrowed))
    expanded = w.heads * (mla.nope_dim + mla.value_dim)
    rows.append(Kept("keys", tokens * w.q, work.width, parts))
    if work.exchanged > 1:
        rows.append(Kept("values", tokens * w.value, work.width, parts, 2.0 * tokens * mla.kv_rank * expanded))
    else:
        rows.append(
            Kept(
                "keys and values",
                tokens * expanded,
                work.width,
                parts,
                2.0 * tokens * mla.kv_rank * expanded,
                tokens * w.value,
            )
        )
    return [*rows, *_core(w, work)]


def _linear_attention(model: ModelConfig, w: Widths, work: LocalWork) -> list[Kept]:
    """Queries, keys, values, gates and decays; the result as it is, normed and gated."""
    tokens, heads, linear = work.tokens, w.heads, model.linear
    keys, values = (heads * width for width in (linear.key_dim, linear.value_dim))
    parts, product = ("attention",), 2.0 * tokens * model.hidden
    return [
        Kept(
            "narrow decays",
            tokens // work.tp * linear.gate_rank,
            work.width,
            parts,
            product * linear.gate_rank / work.tp,
        ),
        # Their logarithms, what these are made of and what that keeps.
        Kept("decays", 3 * tokens * keys, work.precise, parts, 2.0 * tokens * linear.gate_rank * keys),
        Kept("queries", tokens * keys, work.width, parts, product * keys),
        Kept("keys", tokens * keys, work.width, parts, product * keys),
        Kept("values", tokens * values, work.width, parts, product * values),
        Kept("gates", tokens * values, work.width, parts, product * values),
        Kept("attention output", tokens * values, work.width),
        Kept("head norm's numbers", tokens * heads, work.precise, ("norm",)),
        # Where nothing is converted it is copied once more, into the order of the tokens, and that is what is kept.
        Kept("attention output normed", tokens * values, work.width, ("norm",) if work.width < work.precise else ()),
        Kept("attention output gated", tokens * values, work.width, ("activation",)),
    ]


def _network(model: ModelConfig, work: LocalWork, width: int, name: str) -> list[Kept]:
    """Outputs of the first matrices, and of the non-linearity."""
    elements, product = work.tokens * width, 2.0 * work.tokens * model.hidden * width
    before = ("gate", "up") if matrices_of(model) == 3 else ("up",)
    rows = [Kept(f"{name} {matrix}", elements, work.width, ("ffn",), product) for matrix in before]
    return [*rows, Kept(f"{name} activation", elements, work.width, ("activation",))]


def _moe(model: ModelConfig, w: Widths, work: LocalWork) -> list[Kept]:
    """The router's scores; rows of the experts, outputs of their first matrices, results; the shared expert."""
    moe, n, h = model.moe, work.stream, model.hidden
    rows = [*_router(model, work), *_journey(model, work)]
    arrived, product = work.expert_rows(model), 2.0 * work.expert_rows(model) * h * w.expert
    rows.append(Kept("expert rows", arrived * h, work.width))
    for matrix in ("gate", "up") if matrices_of(model) == 3 else ("up",):
        rows.append(Kept(f"expert {matrix}", arrived * w.expert, work.width, ("moe",), product))
    if moe.weigh == "after":
        rows.append(Kept("expert results", work.sent_rows(model) * h, work.width))
    if moe.shared:
        rows += _network(model, work, w.shared, "shared expert")
        if moe.shared_gate:
            rows.append(Kept("shared expert before its gate", n * h, work.width))
            rows.append(Kept("shared expert's gate", n, work.width))
    return rows


def _router(model: ModelConfig, work: LocalWork) -> list[Kept]:
    """Scores and chosen weights. Softmax over the chosen logits keeps no scores but for a balancing loss."""
    moe, router, n, h = model.moe, model.moe.router, work.stream, model.hidden
    scores = n * (moe.experts + router.null_experts)
    alone = router.name == "sinkhorn" and moe.top_k == 1
    renormed = router.normalize and router.name != "expert_choice" and not alone
    over_chosen = renormed and router.score == "softmax"
    # What is gathered from, logits or scores, is kept; the other one for a loss that reads it.
    kept = 1 + (router.aux_loss > 0 if over_chosen else router.z_loss > 0)
    if router.aux_loss > 0 and router.aux_level == "sequence":
        kept += 1  # the loads of each token's sequence
    rows = [Kept("router scores", kept * scores, work.precise)]
    if router.jitter:
        rows.append(Kept("router noise", 2 * n * h, work.width))
    rows.append(Kept("choices", 2 * n * moe.top_k, _INDEX))
    if router.score != "softmax":
        rows.append(Kept("sums of scores", n * (renormed + (router.aux_loss > 0)), work.precise))
    weights = 1 if over_chosen else 2 if renormed else 1
    return [*rows, Kept("expert weights", weights * n * moe.top_k, work.precise)]


def _journey(model: ModelConfig, work: LocalWork) -> list[Kept]:
    """Orders of rows that several ranks have sent, and weights that travelled along."""
    moe, rows = model.moe, []
    arrived = work.expert_rows(model)
    several = work.ranks > 1 and moe.experts * work.etp > work.ranks and not moe.pad
    if several or moe.dispatcher == "all_gather":
        rows.append(Kept("orders of rows", 2 * arrived, _INDEX))
    if moe.weigh == "before":
        rows.append(Kept("weights of rows", arrived, work.precise))
    return rows


def angle_rows(model: ModelConfig, work: LocalWork, *, each: bool) -> list[Kept]:
    """Cosines and sines of a microbatch, once for all layers of a stage; `each`: sequences have their own positions."""
    if model.position != "rope" or set(range(model.layers + model.mtp)) <= set(model.linear_layers):
        return []
    turning = model.mla.rope_dim if model.mla.kv_rank else model.head_dim
    length = work.tokens if each else work.tokens // work.sequences
    return [Kept("angles", length * turning, work.precise)]


def begin_rows(model: ModelConfig, work: LocalWork) -> list[Kept]:
    """What the embedding keeps beside the tokens, which the step has."""
    rows = [Kept("rows of the table", work.tokens, _INDEX + 1)] if work.tp > 1 else []
    if model.position == "learned":
        rows.append(Kept("positions", work.stream, _INDEX))
    return [*rows, *_dropout(model, work, "embedding")]


def end_rows(model: ModelConfig, work: LocalWork, *, head: bool = True) -> list[Kept]:
    """What the last norm and the head keep: of N (tp) tokens the gradient, which the head makes in its forward pass.

    Args:
        model: the model.
        work: the microbatch.
        head: it is here too; false where it is cut over the ranks of the pipeline.
    """
    stream = work.stream * model.hidden
    last = [Kept("last output", stream, work.width), _norm_numbers(model, work, "last norm's numbers")]
    if not head:
        return last
    vocab = model.vocab // work.tp
    gradient = Kept(
        "head gradient", work.tokens * model.hidden, work.width, ("head",), 4.0 * work.tokens * model.hidden * vocab
    )
    return [*last, gradient]


def prediction_rows(model: ModelConfig, work: LocalWork) -> list[Kept]:
    """What one prediction module keeps beside its layer: the embeddings, both inputs joined, and the head's rows."""
    stream = work.stream * model.hidden
    return [
        Kept("following embeddings", stream, work.width),
        _norm_numbers(model, work, "their norm's numbers"),
        _norm_numbers(model, work, "the hidden states' norm's numbers"),
        Kept("joined", 2 * stream, work.width),
        *(
            Kept(f"prediction {row.name}", row.elements, row.width, row.parts, row.flops)
            for row in end_rows(model, work)
        ),
    ]
