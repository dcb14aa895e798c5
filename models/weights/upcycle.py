"""Upcycling: a mixture of experts made of a dense model, which computes the same before its first step.

The dense feed-forward network is cut into G shards of its inner width (G: the granularity), and expert i starts as a
copy of shard i mod G. G consecutive experts together are the whole network; they start with identical router rows, so
a token's K experts (K a multiple of G) are K/G whole networks. The weights of a token's experts sum to 1, each whole
network's output is thus its weight over G, and a factor G on the experts' last matrices makes up for it: whatever lies
between the matrices, as the factor is behind it. With G = 1 this is sparse upcycling (Komatsuzaki et al., arXiv
2212.05055); the router's rows in groups are He et al.'s (arXiv 2410.07524), whose scaling of all three matrices by the
cube root is only approximate with gated activations.

A shared expert takes the first columns of the dense network's inner width, and the routed ones share the rest.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ...configs.errors import Problem, UserError
from ...configs.schema import ModelConfig, MoeConfig
from ...parallel.global_tensor import Placement
from ..hf.families import hf_family
from .initialise import initial

Read = Callable[[str, Placement], Tensor]
"""A slice of one of the dense model's parameters."""

_MOE = re.compile(r"(layers\.\d+|mtp\.\d+\.layer)\.moe\.(router|experts|shared|shared_gate)\.(.+)")


def upcycled_config(dense: ModelConfig, *, experts: int, top_k: int, granularity: int = 1) -> ModelConfig:
    """The model with experts instead of `dense`'s feed-forward networks.

    Args:
        dense: resolved configuration of the dense model.
        experts: of each layer.
        top_k: experts per token.
        granularity: into how many experts one dense network is cut.

    Raises:
        UserError: the numbers do not divide.
    """
    if granularity < 1 or dense.ffn % granularity:
        message = f"{granularity} does not divide the feed-forward network's width {dense.ffn}"
        raise UserError(Problem("--upcycle granularity", message))
    moe = MoeConfig(experts=experts, top_k=top_k, ffn=dense.ffn // granularity, bias=dense.ffn_bias)
    wanted = replace(dense, moe=replace(moe, router=replace(moe.router, groups_kept=1)))
    check_upcycling(dense, wanted, prefix="--upcycle ")
    try:
        return replace(wanted, family=hf_family(wanted).name)
    except UserError:
        return wanted


def check_upcycling(dense: ModelConfig, wanted: ModelConfig, prefix: str = "model.moe.") -> int:
    """The granularity of `wanted`'s experts as shards of `dense`'s feed-forward networks.

    Args:
        dense: resolved configuration of the dense model.
        wanted: resolved configuration with experts, otherwise of the same model.
        prefix: of the keys in messages.

    Raises:
        UserError: `wanted` could not start as the same function; every reason.
    """
    if dense.moe.experts:
        raise UserError(Problem("checkpoint.upcycle", f"the model has {dense.moe.experts} experts already"))
    moe, router, problems = wanted.moe, wanted.moe.router, list[Problem]()

    def wrong(key: str, message: str) -> None:
        problems.append(Problem(f"{prefix}{key}", message))

    inner, width = dense.ffn - moe.shared, moe.ffn
    if inner <= 0 or inner % width:
        less = f" less the shared expert's {moe.shared}" if moe.shared else ""
        wrong("ffn", f"{width} does not divide the dense network's width {dense.ffn}{less}")
        raise UserError(*problems)
    granularity = inner // width
    for key, count in (("experts", moe.experts), ("top_k", moe.top_k)):
        if count < 1 or count % granularity:
            what = f"granularity {granularity}: one dense network is {granularity} experts of width {width}"
            wrong(key, f"{count} is not a multiple of the {what}")
    if moe.top_k > moe.experts:
        wrong("top_k", f"{moe.top_k} is more than the {moe.experts} experts")
    if router.name != "top_k":
        wrong("router.name", f"{router.name} does not start as the dense model; set it to top_k")
    if not router.normalize:
        wrong("router.normalize", "false: weights that do not sum to 1 do not start as the dense model; set it to true")
    if router.null_experts:
        wrong("router.null_experts", f"{router.null_experts}: a token would lose parts of the dense model; set it to 0")
    if router.groups > 1 and (moe.experts // router.groups) % granularity:
        message = f"{router.groups} groups of {moe.experts // router.groups} experts cut through the {granularity} "
        wrong("router.groups", message + "experts of one dense network")
    if dense.ffn_bias and not moe.bias:
        wrong("bias", "false, but the dense networks have biases; set it to true")
    if problems:
        raise UserError(*problems)
    return granularity


def upcycled(name: str, placement: Placement, cfg: ModelConfig, granularity: int, read: Read, seed: int) -> Tensor:
    """The first value of one parameter's slice, made of the slices of the dense model that it needs.

    Args:
        name: global name in the model with experts.
        placement: the slice.
        cfg: resolved configuration with experts.
        granularity: as `check_upcycling` found.
        read: of the dense model.
        seed: of the router's rows.

    Returns:
        The tensor in the dense model's dtype, or in fp64 where a factor would not be exact, or in fp32 where it is new.
    """
    match = _MOE.fullmatch(name)
    if match is None:
        return read(name, placement)
    layer, part, leaf = match.groups()
    dense = f"{layer}.ffn.{leaf}"
    if part == "router":
        return placement.of(_router(name, placement, cfg, granularity, seed))
    if part == "shared_gate":
        return torch.zeros(placement.local_shape)  # a sigmoid of ½, for which the matrix behind makes up
    if part == "shared":
        return _shared(leaf, dense, placement, cfg, read)
    return _experts(leaf, dense, placement, cfg, granularity, read)


def _router(name: str, placement: Placement, cfg: ModelConfig, granularity: int, seed: int) -> Tensor:
    """Random rows, the same for the experts that together are one dense network; biases are zero."""
    choices, *rest = placement.global_shape
    few = initial(name, Placement.whole((choices // granularity, *rest)), cfg, seed)
    return few.repeat_interleave(granularity, 0)


def _shared(leaf: str, dense: str, placement: Placement, cfg: ModelConfig, read: Read) -> Tensor:
    if leaf == "down.bias":
        return torch.zeros(placement.local_shape)  # the routed experts have it
    dim = 1 if leaf == "down.weight" else 0
    value = read(dense, _part_of(placement, dim, 0, cfg.ffn))
    return _scaled(value, 2.0) if dim and cfg.moe.shared_gate else value


def _experts(leaf: str, dense: str, placement: Placement, cfg: ModelConfig, granularity: int, read: Read) -> Tensor:
    inside = Placement(placement.global_shape[1:], placement.offsets[1:], placement.local_shape[1:])
    first, count = placement.offsets[0], placement.local_shape[0]
    scale = 1 / cfg.moe.router.scale
    if leaf.endswith("bias") and not cfg.ffn_bias:
        return torch.zeros(placement.local_shape)
    if leaf == "down.bias":
        return _scaled(read(dense, inside), scale).expand(count, -1)
    dim, width = int(leaf == "down.weight"), cfg.moe.ffn
    shards: dict[int, Tensor] = {}
    out: Tensor | None = None
    for i in range(count):
        shard = (first + i) % granularity
        if shard not in shards:
            value = read(dense, _part_of(inside, dim, cfg.moe.shared + shard * width, cfg.ffn))
            shards[shard] = _scaled(value, granularity * scale) if dim else value
        out = shards[shard].new_empty(placement.local_shape) if out is None else out
        out[i] = shards[shard]
    return torch.empty(placement.local_shape) if out is None else out


def _part_of(inside: Placement, dim: int, start: int, size: int) -> Placement:
    """Where a slice of something narrow lies in the dense tensor that has `size` in `dim` and it from `start` on."""
    shape, offsets = list(inside.global_shape), list(inside.offsets)
    shape[dim], offsets[dim] = size, offsets[dim] + start
    return Placement(tuple(shape), tuple(offsets), inside.local_shape)


def _scaled(value: Tensor, factor: float) -> Tensor:
    if factor == 1.0:
        return value
    # A power of two is exact in any floating-point type.
    exact = math.frexp(factor)[0] == 0.5
    return (value if exact else value.double()) * factor
