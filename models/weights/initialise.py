"""Initial weights by global name: the same numbers whatever part of a tensor a device holds."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...configs.schema import ModelConfig
from ...parallel.global_tensor import Placement

_BLOCK = 1 << 20
"""Elements drawn from one seed, so that a device draws only the rows that it holds."""


def _seed(seed: int, name: str, block: int) -> int:
    digest = hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def normal(name: str, placement: Placement, std: float, seed: int) -> Tensor:
    """This device's slice of the global tensor `name`, drawn from N(0, std²) in fp32."""
    rows, *rest = placement.global_shape
    width = math.prod(rest)
    step = max(1, _BLOCK // max(width, 1))
    first = placement.offsets[0]
    last = first + placement.local_shape[0]
    parts = []
    for block in range(first // step, -(-last // step)):
        low, high = block * step, min((block + 1) * step, rows)
        draws = torch.randn(high - low, *rest, generator=torch.Generator().manual_seed(_seed(seed, name, block)))
        parts.append(draws[max(first - low, 0) : last - low])
    whole = torch.cat(parts).mul_(std)
    return replace(placement, offsets=(0, *placement.offsets[1:])).of(whole)


def initial(name: str, placement: Placement, cfg: ModelConfig, seed: int) -> Tensor:
    """The initial value of one parameter's slice, in fp32.

    Matrices are normal with init_std, those that write to the residual stream with init_std / sqrt(2 layers)
    (GPT-2, section 2.3); norms are 1 and biases 0.
    """
    if name.endswith("bias"):
        return torch.zeros(placement.local_shape)
    if "norm" in name:
        return torch.ones(placement.local_shape)
    residual = name.endswith(
        ("attention.out.weight", "ffn.down.weight", "moe.shared.down.weight", "moe.experts.down.weight")
    )
    return normal(name, placement, cfg.init_std / math.sqrt(2 * cfg.layers) if residual else cfg.init_std, seed)


@torch.no_grad()
def initialise(module: nn.Module, cfg: ModelConfig, seed: int = 0) -> None:
    """Fills every parameter of an unsharded model."""
    for name, param in module.named_parameters():
        param.copy_(initial(name, Placement.whole(tuple(param.shape)), cfg, seed))
