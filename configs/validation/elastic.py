"""What `train.deterministic=elastic` cannot keep: the same bits at any size of data parallelism. No torch."""

from __future__ import annotations

from ..errors import Problem
from ..schema import CODED_STATES, AdamWConfig, Config

_MOST_GRADIENTS = 2**15
"""That are added up for one parameter in a step (`parallel.kernels.exact_sums`)."""


def validate_elastic(config: Config) -> list[Problem]:
    """Every reason for which the bits would depend on `parallel.dp`."""
    if config.train.deterministic != "elastic":
        return []
    p, moe = config.parallel, config.model.moe
    coded = isinstance(config.optim, AdamWConfig) and config.optim.states in CODED_STATES
    spread = moe.experts > 0 and (p.ep > 1 or p.etp > 1)
    rows = (
        (
            p.data.sharding in ("fsdp2", "deepspeed"),
            "parallel.data.sharding",
            f"{p.data.sharding} sums gradients itself, in an order that follows from parallel.dp",
            "zero1",
        ),
        (spread, "parallel.ep", "experts on several ranks multiply rows of several microbatches at once", "1"),
        (coded, "optim.states", "coded moments have blocks that follow from what a rank owns", "fp32"),
        (
            config.memory.offload_optimizer != "none",
            "memory.offload_optimizer",
            "which part of an update a host computes follows from what a rank owns",
            "none",
        ),
        (
            config.faults.numerics.checksums,
            "faults.numerics.checksums",
            "checksums of gradients do not cover the words in which they are summed up",
            "false",
        ),
    )
    problems = [
        Problem("train.deterministic", f"elastic: {why}; set {key}={instead}, or train.deterministic=true", (key,))
        for wrong, key, why, instead in rows
        if wrong
    ]
    return [*problems, *_count(config)]


def _count(config: Config) -> list[Problem]:
    """More gradients than sums of words are exact for."""
    train, p = config.train, config.parallel
    if min(train.micro_batch, p.tp, p.cp) < 1:
        return []
    # A tied table has two uses, and one more for each prediction module.
    count = train.global_batch // train.micro_batch * p.tp * p.cp * (2 + config.model.mtp)
    if count <= _MOST_GRADIENTS:
        return []
    message = (
        f"elastic: {count} gradients of one parameter in a step, and {_MOST_GRADIENTS} can be added exactly; set a "
        "larger train.micro_batch"
    )
    return [Problem("train.deterministic", message, ("train.micro_batch", "train.global_batch"))]
