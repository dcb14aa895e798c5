"""What a rank holds all the time: parameters, gradients and states in buckets, and what the step's program is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...configs import Config
from ...configs.reading.deepspeed import zero_offload, zero_stage
from ...configs.reading.spread import SpreadDegrees, dense_spread, expert_spread
from ...configs.schema import CODED_STATES, AdamWConfig, SgdConfig
from ...configs.tables.schedules import SCHEDULES
from ...models.costs.parts import Part
from ...models.costs.tensors import Cut, Group, ParameterTensor, parameter_tensors
from ..pipeline.programs import Pipeline

WIDTHS = {"bf16": 2, "fp32": 4, "fp64": 8}
"""Bytes of an element by train.dtype."""
_CODED_BYTES = {"int8": 2 + 2 * 4 / 256, "int4": 1 + 4 / 128}
"""Of both moments of an element, with the scales of their blocks; rows and columns have a few."""
_SUBGROUPS = 3
"""Subgroups in the host's pool for a disk (`optim.disk_place.SLOTS`)."""
_WORDS = 2 * 8
"""Bytes of an exact sum's words (`kernels.exact_sums`)."""
BucketKey = tuple[bool, str, bool, int]
_ALIGN = 16
"""Elements to which every rank's share of a bucket is rounded (`replicas.buckets`)."""


@dataclass(frozen=True)
class FlatBucket:
    """One bucket of parameters.

    Args:
        elements: with what fills it up.
        share: of it that this rank updates.
        groups: whose gradients it has.
        kept: elements of gradient sums that are there all the time.
        part: of parameters that are.
        kind: what its parameters have in common: in experts, partial over, matrices; and the stage of their layers,
            where gradients are spread (else, and of those of no layer, −1).
        replicas: ranks that have the same parameters.
        partial: the gradients are summed over other ranks besides.
    """

    elements: int
    share: int
    groups: frozenset[Group]
    replicas: int
    partial: bool
    kept: int
    part: int
    kind: BucketKey

    @property
    def spread(self) -> bool:
        """Whether gradients are."""
        return self.kept < self.elements


def sum_bytes(cfg: Config) -> int:
    """Bytes of a gradient's element in sums over ranks, with flat buckets."""
    return _WORDS if cfg.train.deterministic == "elastic" else max(4, WIDTHS[cfg.train.dtype])


def cut_of(cfg: Config, pipeline: Pipeline) -> Cut:
    """Over how many ranks the job's parameters are cut."""
    p, balanced = cfg.parallel, pipeline.split.balanced
    shared = (cfg.model.tied or cfg.model.mtp > 0) and not balanced and p.pp > 1
    ends = shared and len(set(pipeline.ends)) > 1
    return Cut(tp=p.tp, ep=p.ep, etp=p.etp, vocab=p.pp if balanced else 1, ends=ends)


def rank_tensors(cfg: Config, pipeline: Pipeline, part: Part) -> list[ParameterTensor]:
    """The parameters of a rank."""
    return parameter_tensors(cfg.model, cut_of(cfg, pipeline), part)


def flat_buckets(cfg: Config, pipeline: Pipeline, tensors: Sequence[ParameterTensor]) -> list[FlatBucket]:
    """Flat buckets, as `replicas.buckets.make_buckets` fills them: from the last parameter on, each
    kind of gradient apart, closed as soon as they are full."""
    limit, width = int(cfg.parallel.data.bucket_mib * 2**20), WIDTHS[cfg.train.dtype]
    spreads = {False: dense_spread(cfg), True: expert_spread(cfg)}
    waiting: dict[BucketKey, list[ParameterTensor]] = {}
    found = []
    for tensor in reversed(tensors):
        stage = pipeline.split.stage_of(tensor.name) if spreads[tensor.expert].grads > 1 else -1
        kind = (tensor.expert, tensor.partial, tensor.matrix, stage)
        members = waiting.setdefault(kind, [])
        members.append(tensor)
        if sum(member.elements for member in members) * width >= limit:
            found.append(_bucket(spreads[tensor.expert], waiting.pop(kind), kind))
    return [*found, *(_bucket(spreads[kind[0]], members, kind) for kind, members in waiting.items())]


def _bucket(spread: SpreadDegrees, members: Sequence[ParameterTensor], kind: BucketKey) -> FlatBucket:
    unit = spread.replicas * _ALIGN
    elements = -(-sum(member.elements for member in members) // unit) * unit
    groups = frozenset(member.group for member in members)
    share, kept, partial = elements // spread.states, elements // spread.grads, bool(members[0].partial)
    part = elements // (spread.params if kind[-1] >= 0 else 1)
    return FlatBucket(elements, share, groups, spread.replicas, partial, kept, part, kind)


def opened(cfg: Config, pipeline: Pipeline, rank: int, buckets: Sequence[FlatBucket]) -> int:
    """The most elements of spread gradients that are whole at a time: of one stage two buckets of each kind (gradients
    come in nearly the order in which buckets were filled), those of no stage, the one that is being sent, its copy in
    another order, and what arrives of it. Where weight gradients are left for later, microbatches overlap, and every
    bucket may be there."""
    mine = [bucket for bucket in buckets if bucket.spread]
    largest = max(mine, key=lambda bucket: bucket.elements, default=None)
    if largest is None:
        return 0
    sizes: dict[BucketKey, list[int]] = {}
    for each in mine:
        sizes.setdefault(each.kind, []).append(each.elements)
    if _splits(cfg):
        whole = sum(each.elements for each in mine)
    else:
        stages = dict.fromkeys(pipeline.stages_of(rank), 0)
        for kind, each in sizes.items():
            if kind[-1] >= 0:
                stages[kind[-1]] += sum(sorted(each)[-2:])
        whole = stages.pop(len(pipeline.split.layers) - 1, 0)  # with the head, whose gradient is made in forward
        whole += max(stages.values(), default=0) + sum(sum(each) for kind, each in sizes.items() if kind[-1] < 0)
    as_they_are = largest.part == largest.kept or (largest.kept == largest.share and largest.part == largest.elements)
    reordered = 0 if as_they_are else largest.elements
    return whole + largest.elements + reordered + largest.kept


def _collected(buckets: Sequence[FlatBucket]) -> int:
    """The most elements of spread parameters that are whole at a time: of the stage at work and the next one."""
    stages: dict[int, int] = {}
    for each in buckets:
        if each.part < each.elements:
            stages[each.kind[-1]] = stages.get(each.kind[-1], 0) + each.elements
    return sum(sorted(stages.values())[-2:])


def _splits(cfg: Config) -> bool:
    """Whether weight gradients may be left for later."""
    row = SCHEDULES.get(cfg.parallel.pipeline_in_use.schedule or "")
    return row is None or row.splits


@dataclass(frozen=True)
class Held:
    """Bytes on one rank, all the time.

    Args:
        parameters, gradients, masters, states: of the optimizer's units.
        gathered: of parameters that are spread: the layers that are whole at a time.
        opened: of spread gradients: sums that are whole at a time, at most.
        update: what an update of the largest bucket makes beside them.
        buckets: of flat replicas; none with fsdp2.
        local: parameters of the rank; `experts` of them in routed experts.
        experts: as said.
        host, disk: of masters and states that lie elsewhere (memory.offload_optimizer), and what the host has of those
            on the disk.
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
    disk: int = 0
    opened: int = 0


def held(cfg: Config, pipeline: Pipeline, rank: int, each: float | None = None) -> Held:
    """What a rank of the pipeline axis holds of a resolved job; `each`: bytes of a parameter with all that belongs to
    it, where that is not ours."""
    part = pipeline.split.part(pipeline.stages_of(rank))
    tensors = rank_tensors(cfg, pipeline, part)
    local = sum(tensor.elements for tensor in tensors)
    experts = sum(tensor.elements for tensor in tensors if tensor.expert)
    if each is not None:
        return Held(int(each * local), 0, 0, 0, 0, 0, (), local, experts)
    if cfg.parallel.data.sharding == "fsdp2" and cfg.parallel.dp * cfg.parallel.cp > 1:
        return _sharded(cfg, tensors, local, experts)
    if cfg.parallel.data.sharding == "deepspeed":
        return _engine(cfg, tensors, local)
    width = WIDTHS[cfg.train.dtype]
    precise, buckets = max(4, width), flat_buckets(cfg, pipeline, tensors)
    shares = sum(b.share for b in buckets)
    masters, states = shares * precise if width < precise else 0, state_bytes(cfg, shares, coded_share(cfg, tensors))
    away, largest = cfg.memory.offload_optimizer, max((b.share for b in buckets), default=0)
    there = masters + states if away != "none" else 0
    return Held(
        parameters=sum(b.part for b in buckets) * width,
        gradients=sum(b.kept for b in buckets) * (precise + (0 if sum_bytes(cfg) == precise else sum_bytes(cfg))),
        masters=0 if there else masters,
        states=0 if there else states,
        gathered=_collected(buckets) * width,
        update=update_bytes(cfg, largest),
        buckets=tuple(buckets),
        local=local,
        experts=experts,
        host=_SUBGROUPS * subgroup_bytes(cfg, largest) if away == "disk" else there,
        disk=there if away == "disk" else 0,
        opened=opened(cfg, pipeline, rank, buckets) * precise,
    )


def _sharded(cfg: Config, tensors: Sequence[ParameterTensor], local: int, experts: int) -> Held:
    """FSDP2: masters are the parameters; the layer in use and the next one are gathered, and what is outside the
    layers all the time."""
    t, share = cfg.train, cfg.parallel.dp * cfg.parallel.cp
    width, precise = WIDTHS[t.dtype], max(4, WIDTHS[t.dtype])
    kept = local * precise
    accumulates = t.global_batch > t.micro_batch * cfg.parallel.dp
    states, away = state_bytes(cfg, local // share), cfg.memory.offload_optimizer
    return Held(
        parameters=kept // share,
        gradients=kept if accumulates else kept // share,
        masters=0,
        states=0 if away != "none" else states,
        gathered=_gathered(tensors) * width,
        update=0,
        buckets=(),
        local=local,
        experts=experts,
        host=states if away == "host" else 0,
        disk=states if away == "disk" else 0,
    )


def _gathered(tensors: Sequence[ParameterTensor]) -> int:
    """Elements that are whole at a time: of the layer in use and the next one, and of what is outside the layers."""
    inside = [tensor for tensor in tensors if tensor.group[0] not in ("begin", "end")]
    layers = {tensor.group[1] for tensor in inside}
    sizes = [sum(tensor.elements for tensor in inside if tensor.group[1] == layer) for layer in layers]
    outside = sum(tensor.elements for tensor in tensors) - sum(sizes)
    return min(2, len(sizes)) * max(sizes, default=0) + outside


def _engine(cfg: Config, tensors: Sequence[ParameterTensor], local: int) -> Held:
    """DeepSpeed: of each kind of tensor all or a share, by its stage, with a copy of fp32 parameters as masters (not
    with ZeRO 3); gathered layers as FSDP2's, and on the host what it offloads."""
    width, stage, away = WIDTHS[cfg.train.dtype], zero_stage(cfg), zero_offload(cfg)
    share = -(-local // (cfg.parallel.dp * cfg.parallel.cp))
    masters = 0 if width == 4 and stage == 3 else 4 * share
    states, gradients = state_bytes(cfg, share), 4 * (local if stage == 1 else share)
    parameters = width * (share if stage == 3 else local)
    optimizer = away != "none"
    return Held(
        parameters=0 if away == "all" else parameters,
        gradients=0 if optimizer and stage > 1 else gradients,
        masters=0 if optimizer else masters,
        states=0 if optimizer else states,
        gathered=_gathered(tensors) * width if stage == 3 else 0,
        update=0,
        buckets=(),
        local=local,
        experts=0,
        host=(masters + states + 4 * share) * optimizer + parameters * (away == "all"),
    )


def state_bytes(cfg: Config, elements: int, coded: float = 0.0) -> int:
    """Bytes of the optimizer's states of so many parameters, of which a share has coded moments."""
    kept = cfg.optim.states if isinstance(cfg.optim, AdamWConfig) else "fp32"
    if kept == "bf16":
        return 2 * elements * states_per_parameter(cfg)
    plain = max(4, WIDTHS[cfg.train.dtype]) * states_per_parameter(cfg)
    return round(elements * (coded * _CODED_BYTES.get(kept, plain) + (1 - coded) * plain))


def coded_share(cfg: Config, tensors: Sequence[ParameterTensor]) -> float:
    """The share of a rank's parameters whose moments are coded."""
    if not isinstance(cfg.optim, AdamWConfig) or cfg.optim.states not in CODED_STATES:
        return 0.0
    coded = sum(t.elements for t in tensors if t.matrix and t.elements > cfg.optim.states_above)
    return coded / max(1, sum(t.elements for t in tensors))


def subgroup_bytes(cfg: Config, largest: int) -> int:
    """Masters and states of one subgroup of a unit of so many parameters."""
    each = (4 if cfg.train.dtype == "bf16" else 0) + state_bytes(cfg, 1)
    return min(int(cfg.memory.optimizer_subgroup_mib * 2**20), largest * each)


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
    """Bytes that the update of so many parameters makes beside them."""
    precise, memory = max(4, WIDTHS[cfg.train.dtype]), cfg.memory
    kept = cfg.optim.states if isinstance(cfg.optim, AdamWConfig) else "fp32"
    if memory.offload_optimizer != "none":
        on_device = memory.offload_optimizer == "host" and memory.optimizer_stride != 0
        return 2 * subgroup_bytes(cfg, elements) if on_device else 0
    if kept in CODED_STATES:
        return 3 * elements * precise  # both moments, and each element's scale
    fused = isinstance(cfg.optim, AdamWConfig) and cfg.optim.impl != "foreach" and kept == "fp32"
    return 0 if fused else 2 * elements * precise


def input_bytes(cfg: Config, microbatches: int) -> int:
    """Of a step's microbatches: token ids and labels of whole sequences, and what a rank has of them."""
    t, cp = cfg.train, cfg.parallel.cp
    whole = t.micro_batch * t.seq_len * 8
    labels = 1 + cfg.model.mtp + (1 if cfg.model.mtp else 0)
    mine = whole // cp * (2 + labels) if cp > 1 else 0
    return microbatches * (whole * (1 + labels) + mine)
