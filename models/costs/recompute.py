"""What of each layer is made again in its backward pass (`memory.recompute`), and how many FLOPs that is. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...configs import ModelConfig
from ...configs.schema_parallel import MemoryConfig
from .flops import step_flops
from .kept import Choice, SomeTokens, some_tokens
from .parameters import Sizes, active_experts, matrices_of, sizes


def remade_layers(memory: MemoryConfig, stages: Sequence[Sequence[int]], block: int) -> dict[int, Choice]:
    """What each layer of the stages makes again, by index; a layer that is missing keeps everything.

    Args:
        memory: the section of a job.
        stages: indices of each stage's layers, in order; those of prediction modules belong to the last stage.
        block: tokens of a block (`TokenBlocks`).
    """
    if memory.recompute_is_planned:
        if memory.plan is None:
            raise RuntimeError("what layers make again is not decided yet for this job (trainer.memory.plan)")
        return {
            layer: "full" if parts == "full" else some_tokens(parts, block, share)
            for layer, parts, share in memory.plan
        }
    match memory.recompute:
        case "none":
            return {}
        case "full":
            choice: Choice = "full"
        case _:
            share = memory.token_share
            choice = some_tokens(memory.recompute_parts, block, share if isinstance(share, float) else 0.0)
    every, most = memory.recompute_every, memory.recompute_layers
    chosen = ([layer for layer in layers if layer % every == 0][:most] for layers in stages)
    return {layer: choice for layers in chosen for layer in layers}


def flops_again(model: ModelConfig, tokens: int, pairs: float, remade: Mapping[int, Choice]) -> float:
    """FLOPs of what runs a second time in a step.

    Args:
        model: the model.
        tokens, pairs: as for `step_flops`.
        remade: of each layer.
    """
    whole = [layer for layer, choice in remade.items() if choice == "full"]
    if len(whole) == model.layers + model.mtp:
        return step_flops(model, tokens, pairs).layers / 3
    s = sizes(model)
    return sum(_layer(model, s, layer, choice, tokens, pairs) for layer, choice in remade.items())


def _layer(model: ModelConfig, s: Sizes, layer: int, choice: Choice, tokens: int, pairs: float) -> float:
    if choice == "none":
        return 0.0
    if choice == "full":
        linear = layer in model.linear_layers
        attention = s.linear_projections + s.state if linear else s.projections
        beside = active_experts(model) * s.expert + s.shared if layer in model.routed_layers else s.ffn
        return 2.0 * (tokens * (attention + beside) + (0.0 if linear else pairs * s.per_pair))
    found = part_elements(model, layer)
    parts = choice.parts if isinstance(choice, SomeTokens) else frozenset(choice)
    if "attention" in parts:
        found.pop("latent", None)
    some = dict.fromkeys(choice.cut, choice.blocks.again) if isinstance(choice, SomeTokens) else {}
    return 2.0 * tokens * sum(found.get(part, 0.0) * some.get(part, 1.0) for part in parts)


def part_elements(model: ModelConfig, layer: int) -> dict[str, float]:
    """Multiply-adds of a token in the products of each part of a layer; norms and activation functions have none."""
    s, mla, h = sizes(model), model.mla, model.hidden
    first = (matrices_of(model) - 1) / matrices_of(model)
    found: dict[str, float] = {}
    if layer in model.linear_layers:
        found["attention"] = s.linear_projections - model.heads * model.linear.value_dim * h
    elif mla.kv_rank:
        found["attention"] = s.projections - model.heads * mla.value_dim * h
        expanded = mla.kv_rank * model.heads * (mla.nope_dim + mla.value_dim)
        found["latent"] = expanded + (mla.q_rank or 0) * model.heads * (mla.nope_dim + mla.rope_dim)
    else:
        found["attention"] = s.projections - model.heads * model.head_dim * h
    if layer in model.routed_layers:
        found["moe"] = active_experts(model) * s.expert * first
        found["ffn"] = s.shared * first
    else:
        found["ffn"] = s.ffn * first
    return found
