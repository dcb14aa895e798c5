"""What `parallel.data.sharding=deepspeed` demands of the rest of a job."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..reading.deepspeed import SECTION, json_problems, zero_offload, zero_stage
from ..schema import CODED_STATES, AdamWConfig, Config

_SHARDING = "parallel.data.sharding"


def validate_deepspeed(config: Config) -> list[Problem]:
    """Every problem that follows from the values alone, and from the user's own JSON."""
    if config.parallel.data.sharding != "deepspeed":
        return []
    return [*_layout(config), *_memory(config), *_numbers(config), *json_problems(config), *_stage(config)]


def _layout(config: Config) -> Iterator[Problem]:
    p, experts = config.parallel, config.model.moe.experts
    if p.pp > 1:
        message = (
            f"deepspeed does not go with parallel.pp={p.pp}: its engine wants a microbatch's backward pass right after "
            "its forward pass; set zero1, or parallel.pp=1"
        )
        yield Problem(_SHARDING, message, ("parallel.pp",))
    if experts and p.ep > 1:
        message = (
            f"deepspeed does not go with parallel.ep={p.ep}: it knows one kind of replicas; set zero1, or parallel.ep=1"
        )
        yield Problem(_SHARDING, message, ("parallel.ep",))
    elif experts and p.etp != p.tp:
        message = (
            f"deepspeed knows one kind of replicas, and with parallel.etp={p.etp} experts have others than parallel.tp="
            f"{p.tp} gives the rest; set parallel.etp={p.tp}, or zero1"
        )
        yield Problem(_SHARDING, message, ("parallel.etp", "parallel.tp"))
    if p.dp is not None and p.dp * p.cp == 1:
        message = (
            "deepspeed has nothing to share out with parallel.dp=1 x parallel.cp=1; start more ranks, or set zero1, "
            "which offloads too (memory.offload_optimizer)"
        )
        yield Problem(_SHARDING, message, ("parallel.dp", "parallel.cp"))


def _memory(config: Config) -> Iterator[Problem]:
    memory = config.memory
    if memory.offload_optimizer != "none":
        message = (
            f"{memory.offload_optimizer}, but masters and moments are DeepSpeed's to place; set none, and "
            f"{SECTION}.offload=optimizer"
        )
        yield Problem("memory.offload_optimizer", message, (_SHARDING,))
    if memory.offload_activations != "none":
        message = f"{memory.offload_activations} does not go with deepspeed; set none, or {_SHARDING}=zero1"
        yield Problem("memory.offload_activations", message, (_SHARDING,))
    if memory.group is not None:
        message = (
            f"{memory.group}: deepspeed runs whole models, not part-stages; leave it out, or set {_SHARDING}=zero1"
        )
        yield Problem("memory.group", message, (_SHARDING,))


def _numbers(config: Config) -> Iterator[Problem]:
    if config.train.dtype == "fp64":
        yield Problem("train.dtype", f"deepspeed has no fp64; set fp32 or bf16, or {_SHARDING}=zero1", (_SHARDING,))
    optim = config.optim
    if isinstance(optim, AdamWConfig) and optim.states in CODED_STATES:
        message = (
            f"{optim.states} needs rows and columns of whole parameters, which deepspeed does not tell of; set bf16 or "
            f"{_SHARDING}=zero1"
        )
        yield Problem("optim.states", message, (_SHARDING,))


def _stage(config: Config) -> Iterator[Problem]:
    stage = zero_stage(config)
    numerics = config.faults.numerics
    if numerics.spikes and numerics.on_spike != "tell":
        message = f"{numerics.on_spike}: deepspeed's steps are not run again; set tell, or {_SHARDING}=zero1"
        yield Problem("faults.numerics.on_spike", message, (_SHARDING,))
    if stage == 3 and config.faults.numerics.recompute and config.memory.recompute != "none":
        message = "true needs parameters in place while parts run again, which ZeRO 3 gathers; set false, or stage=2"
        yield Problem("faults.numerics.recompute", message, (f"{SECTION}.stage", "memory.recompute"))
    if zero_offload(config) == "all" and stage < 3:
        message = f"all: parameters lie on the host with stage 3 only, this is {stage}; set optimizer, or stage=3"
        yield Problem(f"{SECTION}.offload", message, (f"{SECTION}.stage",))
