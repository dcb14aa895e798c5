"""What `faults.*` asks for and cannot have, given the other keys."""

from __future__ import annotations

from ..errors import Problem
from ..fields import value_of
from ..schema import CODED_STATES, AdamWConfig, Config

STOP_CODES = range(3, 128)
"""What `faults.stop_code` may be besides 0: 1 and 2 are errors, those from 128 on are signals."""


def fault_problems(config: Config) -> list[Problem]:
    """Every value of the section that contradicts another one."""
    problems = [*_limits(config), *_numerics(config), *_recovery(config)]
    if config.faults.stop_code and config.faults.stop_code not in STOP_CODES:
        message = f"{config.faults.stop_code} means something else; set 0, or one from 3 to 127"
        problems.append(Problem("faults.stop_code", message))
    return problems


def _limits(config: Config) -> list[Problem]:
    """Whoever waits must not give up before it is known for whom: each limit is below the next."""
    names = ("faults.alive_s", "faults.hang_s", "faults.pause_s", "faults.timeout_s")
    values = [value_of(config, name) for name in names]
    problems = []
    for lower, higher, low, high in zip(names, names[1:], values, values[1:], strict=False):
        if low is not None and high is not None and low >= high and config.faults.watch:
            message = f"must be below {higher}={high:g}, got {low:g}; set {lower} below it, or a larger {higher}"
            problems.append(Problem(lower, message, (higher,)))
    return problems


def _numerics(config: Config) -> list[Problem]:
    p = config.parallel
    theirs = p.data.sharding if p.data.sharding in ("fsdp2", "deepspeed") else ""
    if not config.faults.numerics.checksums or not theirs or (p.dp or 1) * p.cp == 1:
        return []
    message = (
        f"{theirs} sums gradients in memory of its own, where nobody can look at them; set "
        "parallel.data.sharding=zero1, or faults.numerics.replicas_every alone"
    )
    return [Problem("faults.numerics.checksums", message, ("parallel.data.sharding",))]


def _recovery(config: Config) -> list[Problem]:
    """What a job with `faults.recover` cannot be: its ranks leave a mesh and go on in the next with what they have."""
    if not config.faults.recover:
        return []
    sharding = config.parallel.data.sharding
    rows = (
        ("faults.watch", "true", not config.faults.watch, "needs the watcher, which sees who is lost"),
        (
            "parallel.data.sharding",
            "zero1",
            sharding in ("fsdp2", "deepspeed"),
            f"cannot re-form {sharding}'s groups",
        ),
        (
            "memory.offload_optimizer",
            "host",
            config.memory.offload_optimizer == "disk",
            "does not copy masters and moments from files",
        ),
        (
            "optim.states",
            "bf16",
            isinstance(config.optim, AdamWConfig) and config.optim.states in CODED_STATES,
            "copies moments as they lie in memory, not coded ones",
        ),
        ("train.device", "cpu", config.train.device == "cuda", "is for CPUs so far"),
    )
    ladder = config.faults.ladder
    twice = sorted({rung for rung in ladder if ladder.count(rung) > 1})
    problems = [Problem("faults.ladder", f"names {rung} {ladder.count(rung)} times; name it once") for rung in twice]
    return problems + [
        Problem("faults.recover", f"true {why}; set {key}={nearest}, or faults.recover=false", (key,))
        for key, nearest, wrong, why in rows
        if wrong
    ]
