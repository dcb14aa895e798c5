"""What a rank holds all the time: parameters, gradients and states in buckets, and what the step's program is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...configs import Config
from ...configs.schema import AdamWConfig, SgdConfig
from ...models.costs.parts import Part
from ...models.costs.tensors import Cut, Group, ParameterTensor, parameter_tensors
from ..pipeline.programs import Pipeline

WIDTHS = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an element by train.dtype."""
_ALIGN = 16
"""Elements to which every rank's share of a bucket is rounded (`replicas.buckets`)."""


@dataclass(frozen=True)
class FlatBucket:
    """One bucket of parameters.

    Args:
        elements: with what fills it up.
        share: of it that this rank updates.
        groups: whose gradients it has.
        replicas: ranks that have the same parameters.
        partial: the gradients are summed over other ranks besides.
    """

    elements: int
    share: int
    groups: frozenset[Group]
    replicas: int
    partial: bool


def expert_replicas(cfg: Config) -> int:
    """Ranks of a pipeline stage that hold the same experts."""
    p = cfg.parallel
    return max(1, p.tp * p.cp * p.dp // (p.ep * p.etp))


def cut_of(cfg: Config, pipeline: Pipeline) -> Cut:
    """Over how many ranks the job's parameters are cut."""
    p, balanced = cfg.parallel, pipeline.split.balanced
    shared = (cfg.model.tied or cfg.model.mtp > 0) and not balanced and p.pp > 1
    ends = shared and len(set(pipeline.ends)) > 1
    return Cut(tp=p.tp, ep=p.ep, etp=p.etp, vocab=p.pp if balanced else 1, ends=ends)


def rank_tensors(cfg: Config, pipeline: Pipeline, part: Part) -> list[ParameterTensor]:
    """The parameters of a rank."""
    return parameter_tensors(cfg.model, cut_of(cfg, pipeline), part)


def flat_buckets(cfg: Config, tensors: Sequence[ParameterTensor]) -> list[FlatBucket]:
    """The buckets of `ddp` and `zero1`, as `replicas.buckets.make_buckets` fills them: from the last parameter on, each
    kind of gradient apart, closed as soon as they are full."""
    limit, width = int(cfg.parallel.data.bucket_mib * 2**20), WIDTHS[cfg.train.dtype]
    waiting: dict[tuple[bool, str, bool], list[ParameterTensor]] = {}
    found = []
    for tensor in reversed(tensors):
        kind = (tensor.expert, tensor.partial, tensor.matrix)
        members = waiting.setdefault(kind, [])
        members.append(tensor)
        if sum(member.elements for member in members) * width >= limit:
            found.append(_bucket(cfg, waiting.pop(kind)))
    return [*found, *(_bucket(cfg, members) for members in waiting.values())]


def _bucket(cfg: Config, members: Sequence[ParameterTensor]) -> FlatBucket:
    p, first = cfg.parallel, members[0]
    replicas = expert_replicas(cfg) if first.expert else p.dp * p.cp
    unit = replicas * _ALIGN
    elements = -(-sum(member.elements for member in members) // unit) * unit
    sharded = p.data.sharding == "zero1" and replicas > 1
    groups = frozenset(member.group for member in members)
    return FlatBucket(elements, elements // replicas if sharded else elements, groups, replicas, bool(first.partial))


@dataclass(frozen=True)
class Held:
    """Bytes on one rank, all the time.

    Args:
        parameters, gradients, masters, states: of the optimizer's units.
        gathered: of fsdp: the layers that are whole at a time.
        update: what an update of the largest bucket makes beside them.
        buckets: of flat replicas; none with fsdp.
        local: parameters of the rank; `experts` of them in routed experts.
        experts: as said.
        host: of masters and states that lie on the host (memory.offload_optimizer).
    """

    parameters: int
    gradients: int
    masters: int
    states: int
    gathered: int
    update: int
    buckets: tuple[FlatBucket, ...]
    local: int
    experts: int
    host: int = 0


def held(cfg: Config, pipeline: Pipeline, rank: int, each: float | None = None) -> Held:
    """What a rank of the pipeline axis holds of a resolved job; `each`: bytes of a parameter with all that belongs to
    it, where that is not ours."""
    part = pipeline.split.part(pipeline.stages_of(rank))
    tensors = rank_tensors(cfg, pipeline, part)
    local = sum(tensor.elements for tensor in tensors)
    experts = sum(tensor.elements for tensor in tensors if tensor.expert)
    if each is not None:
        return Held(int(each * local), 0, 0, 0, 0, 0, (), local, experts)
    if cfg.parallel.data.sharding == "fsdp" and cfg.parallel.dp * cfg.parallel.cp > 1:
        return _sharded(cfg, tensors, local, experts)
    width = WIDTHS[cfg.train.dtype]
    precise, buckets = max(4, width), flat_buckets(cfg, tensors)
    whole, shares = (sum(each) for each in ([b.elements for b in buckets], [b.share for b in buckets]))
    masters, states = shares * precise if width < precise else 0, state_bytes(cfg, shares)
    away = masters + states if cfg.memory.offload_optimizer != "none" else 0
    return Held(
        parameters=whole * width,
        gradients=whole * precise,
        masters=0 if away else masters,
        states=0 if away else states,
        gathered=0,
        update=update_bytes(cfg, max((b.share for b in buckets), default=0)),
        buckets=tuple(buckets),
        local=local,
        experts=experts,
        host=away,
    )


def _sharded(cfg: Config, tensors: Sequence[ParameterTensor], local: int, experts: int) -> Held:
    """FSDP2: masters are the parameters; the layer in use and the next one are gathered, and what is outside the
    layers all the time."""
    t, share = cfg.train, cfg.parallel.dp * cfg.parallel.cp
    width, precise = WIDTHS[t.dtype], max(4, WIDTHS[t.dtype])
    kept = local * precise
    inside = [tensor for tensor in tensors if tensor.group[0] not in ("begin", "end")]
    layers = {tensor.group[1] for tensor in inside}
    sizes = [sum(tensor.elements for tensor in inside if tensor.group[1] == layer) for layer in layers]
    accumulates = t.global_batch > t.micro_batch * cfg.parallel.dp
    return Held(
        parameters=kept // share,
        gradients=kept if accumulates else kept // share,
        masters=0,
        states=state_bytes(cfg, local // share),
        gathered=(min(2, len(sizes)) * max(sizes, default=0) + local - sum(sizes)) * width,
        update=0,
        buckets=(),
        local=local,
        experts=experts,
    )


def state_bytes(cfg: Config, elements: int) -> int:
    """Bytes of the optimizer's states of so many parameters."""
    return elements * max(4, WIDTHS[cfg.train.dtype]) * states_per_parameter(cfg)


def states_per_parameter(cfg: Config) -> int:
    """Moments, or a momentum, or nothing."""
    match cfg.optim:
        case AdamWConfig():
            return 2
        case SgdConfig(momentum=momentum):
            return 1 if momentum else 0
        case _:
            return 0


def update_bytes(cfg: Config, elements: int) -> int:
    """Bytes that the update of so many parameters makes beside them; fused kernels make none."""
    fused = isinstance(cfg.optim, AdamWConfig) and cfg.optim.impl != "foreach"
    return 0 if fused else 2 * elements * max(4, WIDTHS[cfg.train.dtype])


def input_bytes(cfg: Config, microbatches: int) -> int:
    """Of a step's microbatches: token ids and labels of whole sequences, and what a rank has of them."""
    t, cp = cfg.train, cfg.parallel.cp
    whole = t.micro_batch * t.seq_len * 8
    labels = 1 + cfg.model.mtp + (1 if cfg.model.mtp else 0)
    mine = whole // cp * (2 + labels) if cp > 1 else 0
    return microbatches * (whole * (1 + labels) + mine)
