"""How long a step will take, roughly, to rank changes of a job by what they cost. No torch.

    compute          the simulated program, in seconds: FLOPs over the peak, lowered where a layer's products are small
    tp               the stream's tokens gathered and scattered, four times a layer and pass, over the links of a node
    replicas         gradients reduced and parameters gathered once a step; with fsdp2 for every layer and pass. Gathers
                     of our own spread parameters are of the program: what they take is what the passes do not hide
    optimizer        on the host 1 ns a parameter (Deep Optimizer States' measured 0.9 to 1.2), on the device nothing

The constants are of an H100 and its links, and only differences between similar jobs are to be trusted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...configs import Config
from ...configs.reading.deepspeed import zero_stage
from ...configs.reading.spread import dense_spread, is_flat
from ...models.costs.flops import layer_flops
from ...models.costs.times import Rates
from ...parallel.pipeline.simulate import simulate
from ..pipeline.programs import Pipeline, collected, compute_program, offloaded
from .copies import copies_of
from .fixed import WIDTHS, held
from .traffic import replica_traffic

_LINK = 370e9
"""Bytes a second of a collective between the GPUs of a node."""
_NETWORK = 40e9
"""The same between nodes."""
_NODE = 8
_HOST_UPDATE = 1e-9
"""Seconds in which a rank's host updates a parameter."""
_REACHED, _SMALL = 0.73, 189e9
"""Share of the peak that large layers reach, and FLOPs of a layer on a rank with which half of that is left (fitted to
published runs: research in the planner's tables)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and of all devices together for a token."""

    seconds: float
    device_seconds_per_token: float


def step_time(cfg: Config) -> StepTime:
    """Of a resolved job."""
    p, t = cfg.parallel, cfg.train
    pipeline = Pipeline.of(cfg)
    microbatches = max(1, t.global_batch // (t.micro_batch * p.dp))
    shown = min(microbatches, 2 * p.pp)
    program = compute_program(cfg, pipeline, shown)
    copies = copies_of(cfg, pipeline)
    program = collected(cfg, offloaded(cfg, program, pipeline, copies), pipeline)
    gathers = _gathers(cfg, pipeline)
    spans = simulate(program, replace(copies.beside(pipeline), collect=gathers)).makespan
    # What is left out are whole microbatches of the busiest rank.
    times = pipeline.times
    passes = [sum(each) for each in zip(times.forward, times.backward, times.weight, strict=True)]
    hidden = [max(each, 2 * gather) for each, gather in zip(passes, gathers, strict=True)]
    busy = [sum(hidden[stage] for stage in pipeline.stages_of(rank)) for rank in range(p.pp)]
    spans += (microbatches - shown) * max(busy)
    seconds = spans * _unit_s(cfg) + microbatches * _tensor_s(cfg, pipeline) + _replica_s(cfg, pipeline, microbatches)
    if cfg.memory.offload_optimizer != "none":
        shares = (sum(b.share for b in held(cfg, pipeline, rank).buckets) for rank in range(p.pp))
        seconds += max(shares) * _HOST_UPDATE
    return StepTime(seconds, seconds * p.ranks / (t.global_batch * t.seq_len))


def _gathers(cfg: Config, pipeline: Pipeline) -> tuple[float, ...]:
    """What a gather of each part-stage's parameters takes, in the unit of the pipeline's times."""
    nbytes = [0.0] * len(pipeline.placement)
    spread = is_flat(cfg) and dense_spread(cfg).params > 1
    for rank in range(cfg.parallel.pp) if spread else ():
        for bucket in held(cfg, pipeline, rank).buckets:
            if bucket.part < bucket.elements:
                nbytes[bucket.kind[-1]] += (bucket.elements - bucket.part) * WIDTHS[cfg.train.dtype]
    link = _LINK if cfg.parallel.tp * dense_spread(cfg).params <= _NODE else _NETWORK
    return tuple(each / link / _unit_s(cfg) for each in nbytes)


def _unit_s(cfg: Config) -> float:
    """Of a forward pass of one microbatch through a rank's share of the layers."""
    p, t = cfg.parallel, cfg.train
    costs = layer_flops(cfg.model, t.seq_len)[: cfg.model.layers]
    peak = Rates.of(cfg.hardware, t.dtype).flops
    layer = sum(costs) / len(costs) * t.micro_batch / (p.tp * p.cp)
    return sum(costs) * t.micro_batch / (p.tp * p.cp * p.pp) / peak / (_REACHED * layer / (layer + _SMALL))


def _tensor_s(cfg: Config, pipeline: Pipeline) -> float:
    p, t = cfg.parallel, cfg.train
    if p.tp == 1:
        return 0.0
    stream = t.micro_batch * t.seq_len / p.cp * cfg.model.hidden * WIDTHS[t.dtype]
    again = 1.0 + sum(choice == "full" for choice in pipeline.remade.values()) / 2 / cfg.model.layers
    link = _LINK if p.tp <= _NODE else _NETWORK
    return 8 * again * stream * (p.tp - 1) / p.tp * cfg.model.layers / p.pp / link


def _replica_s(cfg: Config, pipeline: Pipeline, microbatches: int) -> float:
    p, width = cfg.parallel, WIDTHS[cfg.train.dtype]
    replicas = p.dp * p.cp
    if replicas == 1:
        return 0.0
    local, share = max(held(cfg, pipeline, rank).local for rank in range(p.pp)), (replicas - 1) / replicas
    link = _LINK if p.tp * replicas <= _NODE else _NETWORK
    if p.data.sharding == "fsdp2" or (p.data.sharding == "deepspeed" and zero_stage(cfg) == 3):
        return microbatches * 3 * local * width * share / link
    if p.data.sharding == "deepspeed":
        return local * share * (max(4, width) + width) / link
    dense, wide = dense_spread(cfg), max(4, width)
    near, among = (_LINK if p.tp * degree <= _NODE else _NETWORK for degree in (dense.grads, dense.states))
    found = (replica_traffic(held(cfg, pipeline, rank).buckets, wide, width, microbatches) for rank in range(p.pp))
    return max(each.grads / near + each.neighbours / among + each.copies / link for each in found)
