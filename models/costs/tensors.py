"""The parameters of one rank, tensor by tensor, in the order of the model. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ...configs import ModelConfig
from .parameters import matrices_of
from .parts import Part
from .widths import Widths

Group = tuple[Literal["begin", "attention", "out", "ffn", "down", "end"], int]
"""What comes before the layers and after them; of a layer, the last matrix of each half, whose gradient is made first,
and the others. With the layer's index."""


@dataclass(frozen=True)
class ParameterTensor:
    """One parameter.

    Args:
        name: global.
        elements: on the rank.
        matrix: weight decay applies.
        expert: its replicas are those of the experts.
        partial: the ranks whose gradients are parts of a sum, as of `sharding_rules.Partial`.
        group: with which others its gradient becomes final.
    """

    name: str
    elements: int
    matrix: bool = True
    expert: bool = False
    partial: Literal["", "tp", "tp_replica", "ends", "etp"] = ""
    group: Group = ("end", 0)


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Over how many ranks the parameters are cut.

    Args:
        tp: matrices.
        ep, etp: experts, and the inner width of each.
        vocab: the vocabulary once more, over the pipeline.
        ends: an embedding that both ends of a pipeline have is summed over these.
    """

    tp: int = 1
    ep: int = 1
    etp: int = 1
    vocab: int = 1
    ends: bool = False


def parameter_tensors(model: ModelConfig, cut: Cut, part: Part | None = None) -> list[ParameterTensor]:
    """What one rank holds of a resolved model, in the order of `Transformer.named_parameters`."""
    part = Part(tuple(range(model.layers))) if part is None else part
    ahead = range(model.layers, model.layers + model.mtp) if part.ends else ()
    tables = model.vocab // cut.tp // cut.vocab * model.hidden
    found: list[ParameterTensor] = []
    # A table that both ends of a pipeline use stands on both, unless they are on one rank.
    if part.embeds or ahead or (part.predicts and model.tied):
        # What only the head uses is final with the head.
        use: Group = ("begin", 0) if part.embeds else ("end", 0)
        found.append(ParameterTensor("embed.weight", tables, partial="ends" if cut.ends else "", group=use))
    if model.position == "learned" and part.begins:
        found.append(
            ParameterTensor(
                "positions.weight", model.max_positions * model.hidden, partial=_whole(cut), group=("begin", 0)
            )
        )
    for layer in part.layers:
        found += _layer(model, cut, layer, f"layers.{layer}")
    if part.ends:
        found += _norm(model, cut, "norm", model.hidden, ("end", 0))
    for index, layer in enumerate(ahead):
        found += _prediction(model, cut, layer, f"mtp.{index}")
    if part.predicts and not model.tied:
        found.append(ParameterTensor("head.weight", tables))
    return found


def _whole(cut: Cut) -> Literal["", "tp"]:
    return "tp" if cut.tp > 1 else ""


def _norm(model: ModelConfig, cut: Cut, name: str, size: int, group: Group) -> list[ParameterTensor]:
    names = ("weight", "bias") if model.norm == "layer" else ("weight",)
    return [ParameterTensor(f"{name}.{each}", size, False, partial=_whole(cut), group=group) for each in names]


def _prediction(model: ModelConfig, cut: Cut, layer: int, name: str) -> list[ParameterTensor]:
    h = model.hidden
    last: Group = ("attention", layer)
    return [
        *_norm(model, cut, f"{name}.hidden_norm", h, last),
        *_norm(model, cut, f"{name}.embed_norm", h, last),
        ParameterTensor(f"{name}.project.weight", 2 * h * h, partial=_whole(cut), group=last),
        *_layer(model, cut, layer, f"{name}.layer"),
        *_norm(model, cut, f"{name}.norm", h, ("end", 0)),
    ]


def _layer(model: ModelConfig, cut: Cut, layer: int, name: str) -> list[ParameterTensor]:
    w = Widths.of(model, cut.tp, cut.etp)
    found = _norm(model, cut, f"{name}.attention_norm", model.hidden, ("attention", layer))
    attention = f"{name}.attention"
    if layer in model.linear_layers:
        found += _linear_attention(model, cut, w, attention)
    elif model.mla.kv_rank:
        found += _latent_attention(model, cut, w, attention)
    else:
        found += _attention(model, cut, w, attention)
    found += _norm(model, cut, f"{name}.ffn_norm", model.hidden, ("ffn", layer))
    found += (
        _moe(model, cut, w, f"{name}.moe")
        if layer in model.routed_layers
        else _network(model, cut, f"{name}.ffn", w.ffn)
    )
    return [replace(tensor, group=(_half(tensor.name), layer)) for tensor in found]


def _half(name: str) -> Literal["attention", "out", "ffn", "down"]:
    """The group of a layer's parameter."""
    if ".attention" in name:
        return "out" if ".attention.out." in name else "attention"
    return "down" if ".down." in name else "ffn"


_Partial = Literal["", "tp", "tp_replica", "ends", "etp"]


def _linear(
    name: str, inputs: int, outs: int, bias: bool = False, partial: _Partial = "", bias_partial: _Partial | None = None
) -> Iterator[ParameterTensor]:
    yield ParameterTensor(f"{name}.weight", inputs * outs, partial=partial)
    if bias:
        yield ParameterTensor(f"{name}.bias", outs, False, partial=partial if bias_partial is None else bias_partial)


def _attention(model: ModelConfig, cut: Cut, w: Widths, name: str) -> list[ParameterTensor]:
    h, whole = model.hidden, _whole(cut)
    kv: _Partial = "tp_replica" if cut.tp > model.kv_heads else ""
    found = [ParameterTensor(f"{name}.sinks", w.heads, False)] if model.sinks else []
    found += _linear(f"{name}.q", h, w.q, model.qkv_bias)
    found += _linear(f"{name}.k", h, w.kv, model.qkv_bias, kv)
    found += _linear(f"{name}.v", h, w.kv, model.qkv_bias, kv)
    found += _linear(f"{name}.out", w.q, h, model.out_bias, bias_partial=whole)
    if model.qk_norm and model.qk_norm_whole:
        found += [ParameterTensor(f"{name}.q_norm.weight", w.q, False)]
        found += [ParameterTensor(f"{name}.k_norm.weight", w.kv, False, partial=kv)]
    elif model.qk_norm:
        sizes = {each: model.head_dim for each in ("q_norm", "k_norm")}
        found += [ParameterTensor(f"{name}.{each}.weight", size, False, partial=whole) for each, size in sizes.items()]
    return found


def _latent_attention(model: ModelConfig, cut: Cut, w: Widths, name: str) -> list[ParameterTensor]:
    h, mla, whole = model.hidden, model.mla, _whole(cut)
    found: list[ParameterTensor] = []
    if mla.q_rank is None:
        found += _linear(f"{name}.q", h, w.q)
    else:
        found += _linear(f"{name}.q_down", h, mla.q_rank, model.qkv_bias, whole)
        found.append(ParameterTensor(f"{name}.q_norm.weight", mla.q_rank, False, partial=whole))
        found += _linear(f"{name}.q_up", mla.q_rank, w.q)
    found += _linear(f"{name}.kv_down", h, mla.kv_rank + mla.rope_dim, model.qkv_bias, whole)
    found.append(ParameterTensor(f"{name}.kv_norm.weight", mla.kv_rank, False, partial=whole))
    found += _linear(f"{name}.kv_up", mla.kv_rank, w.heads * (mla.nope_dim + mla.value_dim))
    return [*found, *_linear(f"{name}.out", w.value, h, model.out_bias, bias_partial=whole)]


def _linear_attention(model: ModelConfig, cut: Cut, w: Widths, name: str) -> list[ParameterTensor]:
    h, linear, whole = model.hidden, model.linear, _whole(cut)
    keys, values = w.heads * linear.key_dim, w.heads * linear.value_dim
    found: list[ParameterTensor] = []
    for each, outs in (("q", keys), ("k", keys), ("v", values), ("gate", values)):
        found += _linear(f"{name}.{each}", h, outs)
    found += _linear(f"{name}.decay_down", h, linear.gate_rank, partial=whole)
    found += _linear(f"{name}.decay_up", linear.gate_rank, keys, True)
    found.append(ParameterTensor(f"{name}.head_norm.weight", linear.value_dim, False, partial=whole))
    return [*found, *_linear(f"{name}.out", values, h, bias_partial=whole)]


def _network(model: ModelConfig, cut: Cut, name: str, width: int) -> list[ParameterTensor]:
    h, bias, found = model.hidden, model.ffn_bias, list[ParameterTensor]()
    for each in ("gate", "up") if matrices_of(model) == 3 else ("up",):
        found += _linear(f"{name}.{each}", h, width, bias)
    return [*found, *_linear(f"{name}.down", width, h, bias, bias_partial=_whole(cut))]


def _moe(model: ModelConfig, cut: Cut, w: Widths, name: str) -> list[ParameterTensor]:
    moe, h, whole = model.moe, model.hidden, _whole(cut)
    choices, mine = moe.experts + moe.router.null_experts, moe.experts // cut.ep
    found = [ParameterTensor(f"{name}.router.weight", choices * h, partial=whole)]
    if moe.router.logit_bias:
        found.append(ParameterTensor(f"{name}.router.bias", choices, False, partial=whole))
    for each in ("gate", "up", "down") if matrices_of(model) == 3 else ("up", "down"):
        found.append(ParameterTensor(f"{name}.experts.{each}.weight", mine * h * w.expert, expert=True))
        if moe.bias:
            outs, partial = (h, "etp") if each == "down" and cut.etp > 1 else (h if each == "down" else w.expert, "")
            found.append(ParameterTensor(f"{name}.experts.{each}.bias", mine * outs, False, True, partial))  # type: ignore[arg-type]
    if moe.shared:
        found += _network(model, cut, f"{name}.shared", w.shared)
        if moe.shared_gate:
            found += _linear(f"{name}.shared_gate", h, 1, partial=whole)
    return found
