"""Jobs of which single steps are traced."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pentad.configs import load
from pentad.configs.schema import Config
from pentad.trainer.data.dataset import Microbatch

LENGTH = 2048


def make_job(folder: Path, preset: str, *overrides: str, layers: int | None = 2) -> Config:
    """Some layers of a preset (none: its own number), two microbatches a step, if `overrides` do not say otherwise."""
    config = folder / "job.yaml"
    model = f"preset: {preset}" if layers is None else f"preset: {preset}, layers: {layers}"
    config.write_text(
        f"name: traced\nmodel: {{{model}}}\ndata: {{name: stdlib}}\noptim: {{name: adamw}}\n"
        f"train: {{steps: 2, global_batch: 2, micro_batch: 1, seq_len: {LENGTH}, dtype: bf16}}\n"
    )
    return load(str(config), overrides, world_size=1)


def make_batch(index: int, *, documents: bool = False, length: int = LENGTH) -> Microbatch:
    """One sequence; `documents`: of documents of 300 tokens in the mean."""
    tokens = torch.zeros(1, length, dtype=torch.long)
    positions = found = None
    if documents:
        starts = torch.rand((1, length), generator=torch.Generator().manual_seed(index)) < 1 / 300
        found = torch.cumsum(starts, 1, dtype=torch.int32)
        positions = torch.arange(length).expand(1, -1).contiguous()
    return Microbatch(tokens, tokens.clone(), positions, found, torch.arange(1), length, length**2 / 2)


def uneven_ends(cfg: Config) -> Callable[[Tensor, str], list[int]]:
    """An `Answer` about ends of experts' rows on one rank, each expert having more than the one before."""
    experts, rows = cfg.model.moe.experts, cfg.train.seq_len * cfg.model.moe.top_k
    return lambda x, where: [rows * (expert + 1) ** 2 // experts**2 for expert in range(experts)]
