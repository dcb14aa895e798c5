"""Checks of `parallel.cp` and `parallel.context`."""

from __future__ import annotations

from ..errors import Problem
from ..resolve import divides
from ..schema import Config
from ..tables.context_methods import CONTEXT_METHODS


def validate_context(config: Config) -> list[Problem]:
    """Every problem of the resolved sections that follows from the values alone."""
    if config.parallel.cp <= 1:
        return []
    return [*_tokens(config), *_heads(config), *_inner(config), *_placement(config)]


def _tokens(config: Config) -> list[Problem]:
    t, cp, tp = config.train, config.parallel.cp, config.parallel.tp
    if t.seq_len % cp:
        up = -(-t.seq_len // cp) * cp
        message = f"{t.seq_len} is not a multiple of parallel.cp={cp}, whose ranks share it; set train.seq_len={up}"
        return [Problem("train.seq_len", message, ("parallel.cp",))]
    tokens = t.micro_batch * t.seq_len // cp
    if tp > 1 and tokens % tp:
        message = (
            f"train.micro_batch={t.micro_batch} x train.seq_len={t.seq_len} / parallel.cp={cp} = {tokens} tokens are "
            f"not a multiple of parallel.tp={tp}; set train.seq_len={-(-t.seq_len // (cp * tp)) * cp * tp}"
        )
        return [Problem("train.seq_len", message, ("train.micro_batch", "parallel.cp", "parallel.tp"))]
    return []


def _heads(config: Config) -> list[Problem]:
    m, p, context = config.model, config.parallel, config.parallel.context
    if m.kv_heads is None or p.tp < 1 or m.kv_heads < 1:
        return []
    heads, kv_heads = m.heads // p.tp, max(1, m.kv_heads // p.tp)
    sizes = ("model.heads", "model.kv_heads", "parallel.tp", "parallel.cp")
    where = f"of model.heads={m.heads} and model.kv_heads={m.kv_heads} over parallel.tp={p.tp}"
    method = CONTEXT_METHODS[context.method]
    if method.exchanges == "cp" and not divides(p.cp, heads, kv_heads):
        message = (
            f"{method.name} exchanges heads over parallel.cp={p.cp} ranks, and a rank has {heads} query and {kv_heads} "
            f"key-value heads ({where}): parallel.cp must divide the first and divide the second or be a multiple of "
            "it; set parallel.context.method=ring"
        )
        return [Problem("parallel.context.method", message, sizes)]
    inner = context.inner or 1
    if method.exchanges == "inner" and (p.cp % inner or not divides(inner, heads, kv_heads)):
        message = (
            f"{inner} must divide parallel.cp={p.cp} and the {heads} query heads of a rank, and fit its {kv_heads} "
            f"key-value heads ({where}); leave it out"
        )
        return [Problem("parallel.context.inner", message, sizes)]
    if context.duplex and not method.duplex:
        able = ", ".join(row.name for row in CONTEXT_METHODS.values() if row.duplex)
        message = f"sends both ways round a ring, and parallel.context.method={context.method}; set it to {able}"
        return [Problem("parallel.context.duplex", message, ("parallel.context.method",))]
    if context.duplex and kv_heads % 2:
        message = f"each way carries half of the key-value heads, and a rank has {kv_heads} ({where}); set it to false"
        return [Problem("parallel.context.duplex", message, sizes)]
    return []


def _inner(config: Config) -> list[Problem]:
    context, key = config.parallel.context, "parallel.context.inner"
    if context.inner is None or CONTEXT_METHODS[context.method].exchanges == "inner":
        return []
    able = ", ".join(row.name for row in CONTEXT_METHODS.values() if row.exchanges == "inner")
    message = (
        f"{context.inner} ranks of a group would exchange heads, and parallel.context.method={context.method} has no "
        f"groups; leave it out, or set parallel.context.method={able}"
    )
    return [Problem(key, message, ("parallel.context.method",))]


def _placement(config: Config) -> list[Problem]:
    m, context = config.model, config.parallel.context
    problems: list[Problem] = []
    if m.linear_layers and context.placement != "contiguous":
        message = (
            f"{context.placement}, but linear attention (model.linear) hands its state from rank to rank in the "
            "order of the tokens; set parallel.context.placement=contiguous"
        )
        problems.append(Problem("parallel.context.placement", message, ("model.attention_every",)))
    return problems
