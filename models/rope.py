"""Rotary frequencies: plain, linear, Llama-3 and YaRN scaling."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..configs.schema import RopeConfig
from ..parallel.kernels.precision import precise


def frequencies(cfg: RopeConfig, head_dim: int) -> tuple[Tensor, float]:
    """Angular frequency of each pair of dimensions (head_dim / 2, fp64), and the multiplier of cos and sin.

    Sources: RoFormer (arXiv 2104.09864); Llama 3.1's frequency bands; YaRN (arXiv 2309.00071), section 3.
    """
    base = cfg.theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim)
    match cfg.scaling:
        case "none":
            return base, 1.0
        case "linear":
            return base / cfg.factor, 1.0
        case "llama3":
            return _llama3(cfg, base), 1.0
        case "yarn":
            return _yarn(cfg, base, head_dim), cfg.attention_factor


def _llama3(cfg: RopeConfig, base: Tensor) -> Tensor:
    turns = cfg.original_positions * base / (2 * math.pi)  # within the original context
    keep = ((turns - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0, 1)
    return base * keep + base / cfg.factor * (1 - keep)


def _yarn(cfg: RopeConfig, base: Tensor, head_dim: int) -> Tensor:
    def dim_of(turns: float) -> float:
        """The (fractional) pair index whose wavelength fits `turns` times into the original context."""
        return head_dim * math.log(cfg.original_positions / (turns * 2 * math.pi)) / (2 * math.log(cfg.theta))

    low, high = dim_of(cfg.beta_fast), dim_of(cfg.beta_slow)
    if cfg.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    pair = torch.arange(head_dim // 2, dtype=torch.float64, device="cpu")
    stretch = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
    return base * (1 - stretch) + base / cfg.factor * stretch


def angles(freq: Tensor, factor: float, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B or 1, T, 1, d/2) of positions (T,) or (B, T), to turn tensors of `dtype`: fp32 or better.

    The angle is a product in fp64: in fp32 it loses 1e-3 radians at position 10⁴ and more beyond.
    """
    angle = positions.double()[..., None] * freq
    angle = angle[None, :, None] if positions.dim() == 1 else angle[:, :, None]
    return (angle.cos() * factor).to(precise(dtype)), (angle.sin() * factor).to(precise(dtype))
