"""Checks of products in 8 bits (`train.fp8`): the layouts in which they are what one process computes. No torch."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config

_KEY = "train.fp8"
_BLOCK = 128
"""Rows and columns of a block."""
_STEP = 16
"""GPUs multiply 8-bit matrices whose sides are multiples of it."""


def validate_fp8(config: Config) -> list[Problem]:
    """Every problem of the resolved sections that follows from the values alone."""
    if config.train.fp8 == "none":
        return []
    p = config.parallel
    # Sizes that are not whole are other checks' problems.
    if min(p.tp, p.cp) < 1:
        return []
    problems = [*_parts_of_sums(config), *_on_gpu(config)]
    if p.tp > 1 and p.tensor.overlap == "gemm":
        message = "multiplies whole tensors, parallel.tensor.overlap=gemm pieces; set one of them to none"
        problems.append(Problem(_KEY, message, ("parallel.tensor.overlap",)))
    if config.train.fp8 == "tensor":
        problems += _token_share(config)
    if config.train.fp8 == "block":
        problems += _blocks(config)
    return problems


def _parts_of_sums(config: Config) -> list[Problem]:
    """Gradients that ranks have parts of would be rounded to 8 bits before they are summed."""
    m, p = config.model, config.parallel
    if m.mla.kv_rank:
        if p.cp == 1:
            return []
        message = "is for one context rank where keys come from latents (model.mla), parallel.cp is"
        return [Problem(_KEY, f"{message} {p.cp}: set parallel.cp=1 or train.fp8=none", ("parallel.cp", "model.mla"))]
    if p.tp <= m.kv_heads or len(m.linear_layers) == m.layers:
        return []
    message = f"needs a key head for each tensor rank: parallel.tp={p.tp}, model.kv_heads={m.kv_heads}"
    return [Problem(_KEY, f"{message}; set parallel.tp to {m.kv_heads} or less", ("parallel.tp", "model.kv_heads"))]


def _token_share(config: Config) -> list[Problem]:
    memory = config.memory
    if memory.token_share == "none" or memory.recompute not in ("selective", "auto"):
        return []
    message = (
        f"tensor: the scale of a whole tensor is not that of the tokens that memory.token_share={memory.token_share}"
        " makes again; set train.fp8=row or memory.token_share=none"
    )
    return [Problem(_KEY, message, ("memory.token_share", "memory.recompute"))]


def _cut_sizes(config: Config) -> dict[str, int]:
    """What tensor parallelism cuts, by the keys that decide it."""
    m = config.model
    found = {}
    if len(m.linear_layers) < m.layers:
        if m.mla.kv_rank:
            found["model.heads · (mla.nope_dim + mla.rope_dim)"] = m.heads * (m.mla.nope_dim + m.mla.rope_dim)
            found["model.heads · (mla.nope_dim + mla.value_dim)"] = m.heads * (m.mla.nope_dim + m.mla.value_dim)
            found["model.heads · mla.value_dim"] = m.heads * m.mla.value_dim
        else:
            found["model.heads · head_dim"] = m.heads * m.head_dim
            found["model.kv_heads · head_dim"] = m.kv_heads * m.head_dim
    if m.linear_layers:
        found["model.heads · linear.key_dim"] = m.heads * m.linear.key_dim
        found["model.heads · linear.value_dim"] = m.heads * m.linear.value_dim
    if len(m.moe_layers) < m.layers:
        found["model.ffn"] = m.ffn
    if m.moe.experts and m.moe.shared:
        found["model.moe.shared"] = m.moe.shared
    return found


def _blocks(config: Config) -> list[Problem]:
    p, train, problems = config.parallel, config.train, []
    crossing = [f"{what} is {size}" for what, size in _cut_sizes(config).items() if size % (_BLOCK * p.tp)]
    if p.tp > 1 and crossing:
        message = f"block: what {p.tp} tensor ranks share has to be a multiple of {_BLOCK * p.tp}, {crossing[0]}"
        problems.append(Problem(_KEY, f"{message}; set train.fp8=row", ("parallel.tp",)))
    if p.cp > 1 and p.context.placement == "by_length":
        message = "block: parallel.context.placement=by_length cuts blocks of tokens; set zigzag or contiguous"
        problems.append(Problem(_KEY, message, ("parallel.context.placement",)))
    elif p.cp > 1 and train.seq_len % (2 * p.cp * _BLOCK):
        message = (
            f"block: {p.cp} context ranks need train.seq_len to be a multiple of {2 * p.cp * _BLOCK}, which is"
            f" {train.seq_len}; set train.fp8=row"
        )
        problems.append(Problem(_KEY, message, ("parallel.cp", "train.seq_len")))
    return problems


def _on_gpu(config: Config) -> list[Problem]:
    train, p, m = config.train, config.parallel, config.model
    if train.device != "cuda":
        return []
    if train.dtype != "bf16":
        message = f"is for bf16 on a GPU, and train.dtype={train.dtype}; set train.fp8=none"
        return [Problem(_KEY, message, ("train.dtype", "train.device"))]
    sizes = {what: size // p.tp for what, size in _cut_sizes(config).items()} | {"model.hidden": m.hidden}
    sizes["the tokens of a microbatch"] = train.micro_batch * train.seq_len // p.cp
    odd = [f"{what} is {size}" for what, size in sizes.items() if size % _STEP]
    if not odd:
        return []
    message = f"needs sizes that are multiples of {_STEP} on a GPU, and of a rank {odd[0]}; set train.fp8=none"
    return [Problem(_KEY, message, ("train.device", "parallel.tp"))]
