"""Applies tensor parallelism, recompute and the pipeline's cut to a model from outside, in one ordered function."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from torch import nn

from ..configs.schema import ModelConfig
from ..parallel.expert.dispatch import AllToAll
from ..parallel.expert.tokens import TokenGroup
from ..parallel.mesh import Mesh
from ..parallel.plan import Axes, Column, Plan, Row, Rule, Sharding, place
from ..parallel.tensor import ColumnProjection, RowProjection
from ..parallel.vocab import VocabEmbedding, VocabHead, VocabShard
from .initialise import initial
from .linear import Linear
from .moe import Moe
from .plans import PLANS
from .recompute import run_layer_again
from .transformer import Part, Transformer


def rule_of(plan: Plan, name: str) -> Rule:
    """The plan's rule for one parameter.

    Raises:
        KeyError: the plan does not cover the parameter.
    """
    for pattern, rule in plan:
        if fnmatchcase(name, pattern):
            return rule
    raise KeyError(f"the sharding plan has no rule for {name}")


def shardings(model: Transformer, mesh: Mesh, *, balanced: bool = False) -> dict[str, Sharding]:
    """Where each parameter of the (meta) model lives on this rank, by global name."""
    plan = PLANS[model.cfg.family]
    vocab = mesh.axis("vocab_head" if balanced else "tp")
    axes = Axes(
        mesh.axis("tp"), mesh.axis("tp_shard"), mesh.axis("tp_replica"), vocab, mesh.axis("ep"), mesh.axis("etp")
    )
    where = {
        name: place(rule_of(plan, name), name, tuple(param.shape), axes) for name, param in model.named_parameters()
    }
    # A tied table at both ends of a pipeline has two copies, whose gradients are summed.
    if model.cfg.tied and mesh.axis("ends").size > 1 and "embed.weight" in where:
        where["embed.weight"] = replace(where["embed.weight"], partial="ends")
    return where


def build(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    part: Part | None = None,
    balanced: bool = False,
    recompute: bool = False,
) -> tuple[Transformer, dict[str, Sharding]]:
    """This rank's part of the model, uninitialised, and where each of its parameters lives.

    The order: build on meta, cut, allocate, replace the seams. Data parallelism comes after (`parallel.data`).

    Args:
        part: what this rank's stages hold; none: everything.
        balanced: embedding and head are cut over the tensor and pipeline ranks, which the pipeline's program runs.
        recompute: each layer keeps its input only, and runs again in backward.
    """
    with torch.device("meta"):
        model = Transformer(cfg, part)
    where = shardings(model, mesh, balanced=balanced)
    if recompute:
        model.run_layer = run_layer_again
    for name, sharding in where.items():
        owner, leaf = _owner(model, name)
        local = torch.empty(sharding.placement.local_shape, device=device, dtype=dtype)
        setattr(owner, leaf, nn.Parameter(local))
    for name, buffer in model.named_buffers():
        owner, leaf = _owner(model, name)
        setattr(owner, leaf, torch.zeros(buffer.shape, device=device, dtype=buffer.dtype))
    if mesh.axis("tp").size > 1:
        _replace_seams(model, mesh)
    _replace_dispatchers(model, mesh)
    return model, where


def _replace_seams(model: Transformer, mesh: Mesh) -> None:
    tp = mesh.axis("tp")
    column, row = ColumnProjection(tp), RowProjection(tp)
    plan = PLANS[model.cfg.family]
    for name, linear in _linears(model):
        match rule_of(plan, f"{name}.weight"):
            case Row():
                linear.apply_weights = row
            case Column():
                linear.apply_weights = column
    assert model.cfg.vocab
    shard = VocabShard.of(tp, model.cfg.vocab)
    model.embedding_op, model.head_op = VocabEmbedding(shard), VocabHead(shard)


def _replace_dispatchers(model: Transformer, mesh: Mesh) -> None:
    """The experts' ranks are those of the expert mesh, whatever the dense one is."""
    ep, etp, tokens = mesh.axis("ep"), mesh.axis("etp"), TokenGroup(mesh.axis("tp"))
    for module in model.modules():
        if isinstance(module, Moe):
            module.dispatch = AllToAll(model.cfg.moe.experts, ep, etp, weigh_before=model.cfg.moe.weigh == "before")
            module.router.tokens = tokens


def _linears(model: nn.Module) -> Iterator[tuple[str, Linear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, Linear))


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def initial_values(model: Transformer, where: dict[str, Sharding], seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 initial value of this rank's slice), one at a time."""
    for name, sharding in where.items():
        yield name, initial(name, sharding.placement, model.cfg, seed)
