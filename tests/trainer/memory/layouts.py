"""Random small jobs, each with a peak of some hundred MiB on its ranks, to measure the memory model on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pentad.configs import validate
from pentad.configs.schema import Config, MlaConfig, MoeConfig
from pentad.configs.tables.schedules import SCHEDULES
from pentad.trainer.memory.estimate import estimate
from tests.training import job

LEAST = 80 << 20
"""Bytes of the predicted peak: a measured one is then at least 64 MiB, unless the model is badly wrong."""
MOST = 400 << 20


def draw_job(seed: int) -> Config:
    """A job of up to four ranks that `check` accepts."""
    draws = random.Random(seed)
    for _ in range(1000):
        try:
            cfg = _draw(draws)
        except ValueError:
            continue
        if not validate(cfg) and LEAST < estimate(cfg).total < MOST:
            return cfg
    raise ValueError(f"no job for seed {seed}")


def draw_shared(seed: int) -> Config:
    """One with parts of layers that are made again for some of the tokens."""
    draws = random.Random(f"tokens {seed}")
    while True:
        cfg = draw_job(draws.randrange(10**6))
        parts = ["norm", "activation", "attention", "ffn"]
        parts += ["latent"] * bool(cfg.model.mla.kv_rank) + ["moe"] * bool(cfg.model.moe.experts)
        memory = replace(
            cfg.memory,
            recompute="selective",
            recompute_parts=tuple(draws.sample(parts, draws.randint(2, len(parts)))),
            token_share=draws.choice([0.25, 0.5, 0.8]),
        )
        cfg = replace(cfg, memory=memory)
        if not validate(cfg) and LEAST < estimate(cfg).total < MOST:
            return cfg


def _draw(draws: random.Random) -> Config:
    kind = draws.choice(["dense", "dense", "moe", "mla"])
    heads = draws.choice([4, 8])
    hidden = heads * draws.choice([16, 32, 48])
    layers = draws.choice([3, 4, 6, 8])
    model: dict[str, Any] = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": heads if kind == "mla" else draws.choice([heads // 2, heads]),
        "head_dim": draws.choice([16, 32, 48]),
        "ffn": hidden * draws.choice([2, 3, 4]),
        "vocab": draws.choice([512, 1024, 4096, 8192]),
        "max_positions": 2048,
        "qk_norm": kind != "mla" and draws.random() < 0.3,
        "activation": draws.choice(["swiglu", "swiglu", "gelu"]),
        "tied": draws.random() < 0.3,
        "dropout": draws.choice([0.0, 0.0, 0.0, 0.1]),
    }
    if kind == "mla":
        q_rank = draws.choice([None, 64, 96])
        model["mla"] = MlaConfig(q_rank=q_rank, kv_rank=draws.choice([48, 64]), nope_dim=32, rope_dim=16, value_dim=32)
    if kind == "moe" or (kind == "mla" and draws.random() < 0.5):
        model["moe"] = MoeConfig(
            experts=8,
            top_k=draws.choice([1, 2, 3]),
            ffn=hidden * draws.choice([1, 2]),
            shared=draws.choice([0, hidden]),
            weigh=draws.choice(["before", "after"]),
        )
    world = draws.choice([1, 2, 2, 4, 4])
    degrees = draws.choice(_degrees(world))
    return job(
        model=model,
        **degrees,
        **_ranks(draws, degrees, bool(model.get("moe")), layers),
        context={"method": draws.choice(["ring", "ulysses", "allgather", "tokenring", "usp"])},
        **_again(draws, kind, bool(model.get("moe"))),
        group=draws.choice([None, None, 1, 2]),
        sharding=draws.choice(["ddp", "zero1"]),
        bucket_mib=draws.choice([0.5, 2.0, 32.0]),
        optim=draws.choice(["adamw", "adamw", "sgd"]),
        dtype=draws.choice(["fp32", "fp32", "fp64"]),
        seq_len=draws.choice([256, 512]),
        micro_batch=draws.choice([1, 2]),
        global_batch=8,
    )


def _again(draws: random.Random, kind: str, experts: bool) -> dict[str, Any]:
    """What is made again."""
    choice = draws.choice(["none", "none", "full", "selective"])
    parts = ["norm", "activation", "attention", "ffn", *["latent"] * (kind == "mla"), *["moe"] * experts]
    chosen = tuple(draws.sample(parts, draws.randint(1, 3)))
    return {"recompute": choice, "memory": {"recompute_parts": chosen} if choice == "selective" else {}}


def _degrees(world: int) -> Sequence[dict[str, int]]:
    sizes = (1, 2, 4)
    return [
        {"tp": tp, "pp": pp, "cp": cp, "dp": world // (tp * pp * cp)}
        for tp in sizes
        for pp in sizes
        for cp in sizes
        if world % (tp * pp * cp) == 0
    ]


def _ranks(draws: random.Random, degrees: dict[str, int], experts: bool, layers: int) -> dict[str, Any]:
    """Pipeline, offload and the experts' ranks."""
    found: dict[str, Any] = {"offload": draws.choice(["none", "none", "all", 0.5])}
    ranks = degrees["tp"] * degrees["cp"] * degrees["dp"]
    if experts:
        found["ep"] = draws.choice([ep for ep in (1, 2, 4) if ranks % ep == 0])
    if degrees["pp"] > 1:
        name = draws.choice(["1f1b", "1f1b", "gis", "zb-h1", "v-half", "interleaved", "gpipe", "po-h"])
        chunks = SCHEDULES[name].chunks or 2
        found["pipeline"] = {"schedule": name, "chunks": chunks}
        if SCHEDULES[name].balanced and draws.random() < 0.4:
            found["pipeline"] |= {"vocab": "balanced", "vocab_barriers": draws.choice([1, 2])}
    return found
