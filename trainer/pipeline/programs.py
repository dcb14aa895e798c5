"""The job's pipeline: who holds which stage, and the programs of a training step and of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...configs.reading.spread import dense_spread, is_flat
from ...configs.schema import Config
from ...configs.tables.schedules import SCHEDULES, is_program
from ...models.costs.flops import mean_pairs
from ...models.costs.kept import Choice
from ...models.costs.parts import StageSplit
from ...models.costs.recompute import flops_again, remade_layers
from ...models.costs.times import Rates
from ...parallel.pipeline import schedules
from ...parallel.pipeline.check import check_program
from ...parallel.pipeline.communication import is_lowered
from ...parallel.pipeline.lower import forward_only, lower
from ...parallel.pipeline.memory import ActivationBytes
from ...parallel.pipeline.offload import first_chunks, offload, selective, windows
from ...parallel.pipeline.program import Program, update
from ...parallel.pipeline.program_file import read_program
from ...parallel.pipeline.refine import part_stages, refine
from ...parallel.pipeline.times import Times
from ...parallel.pipeline.vocabulary import balanced
from ...parallel.replicas.collecting import collecting
from ...parallel.token_blocks import TokenBlocks
from .disk_tier import HostRoom
from .stage_layers import StageLayers

_LATENCY = 0.02
"""Guess of a hop's and a collective's latency, in forward passes of one rank's share, for orders that are searched."""


@dataclass(frozen=True)
class Pipeline:
    """What is decided about the pipeline before anything is built.

    Args:
        stages: the rank on the pipeline axis that holds each stage of the schedule.
        stage_times: estimated times of their passes, in forward passes of one rank's share.
        parts: part-stages of each of them (`memory.group`); all that follows counts these as stages.
        split: the layers of each part-stage.
        times: of their passes.
        remade: what each layer makes again in its backward pass.
        unit: FLOPs of a device in the unit of these times: a forward pass of one microbatch through a rank's share.
    """

    stages: tuple[int, ...]
    stage_times: Times
    parts: tuple[int, ...]
    split: StageSplit
    times: Times
    remade: Mapping[int, Choice]
    unit: float

    @staticmethod
    def of(cfg: Config) -> Pipeline:
        """The pipeline that the config asks for: layers split by their cost, or as it says."""
        stages, p = StageLayers.of(cfg), cfg.parallel
        unit = sum(stages.costs[0]) / (max(stages.placement) + 1)
        ahead = tuple(range(cfg.model.layers, cfg.model.layers + cfg.model.mtp))
        whole = StageSplit.of(stages.counts, balanced=stages.balanced)
        shared = cfg.model.tied or cfg.model.mtp > 0
        layers = [n for group in stages.groups for n in group]
        split = StageSplit.of(layers, balanced=stages.balanced, shared=shared)
        remade = remade_layers(cfg.memory, (*whole.layers[:-1], (*whole.layers[-1], *ahead)), token_block(cfg))

        def times(split: StageSplit) -> Times:
            return _times(cfg, split, unit, remade, *stages.costs)

        return Pipeline(
            stages=stages.placement,
            stage_times=times(whole),
            parts=tuple(map(len, stages.groups)),
            split=split,
            times=times(split),
            remade=remade,
            unit=unit * cfg.train.micro_batch / (p.tp * p.cp),
        )

    @property
    def placement(self) -> tuple[int, ...]:
        """The rank that holds each part-stage."""
        return tuple(rank for rank, count in zip(self.stages, self.parts, strict=True) for _ in range(count))

    @property
    def counts(self) -> tuple[int, ...]:
        """Layers of each stage of the schedule."""
        layers = self.split.layers
        return tuple(sum(len(layers[part]) for part in mine) for mine in part_stages(self.parts))

    def choice(self, layer: int) -> Choice:
        """What a layer makes again."""
        return self.remade.get(layer, "none")

    @property
    def ends(self) -> tuple[int, int]:
        """The ranks of the first and the last stage."""
        return self.stages[0], self.stages[-1]

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) ranks between which tensors travel, in one order on all ranks."""
        steps = {pair for pair in zip(self.stages, self.stages[1:], strict=False) if pair[0] != pair[1]}
        return tuple(sorted(steps | {(b, a) for a, b in steps}))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The part-stages that a rank of the pipeline axis holds."""
        return tuple(stage for stage, where in enumerate(self.placement) if where == rank)


def token_block(cfg: Config) -> int:
    """Tokens of the blocks of which parts of layers may be made again for some (`TokenBlocks`)."""
    p, t = cfg.parallel, cfg.train
    length = t.seq_len // p.cp
    return TokenBlocks.largest(length, t.micro_batch * length // p.tp)


@dataclass(frozen=True)
class Copies:
    """What is known of copies to the host and the disk and back before a step runs.

    Args:
        kept: bytes of a microbatch that each part-stage keeps on a device and can send away.
        rates: of a device.
    """

    kept: tuple[float, ...]
    rates: Rates

    def beside(self, pipeline: Pipeline) -> Times:
        """The times of the pipeline's passes with those of copies, in the same unit."""
        unit_s = pipeline.unit / self.rates.flops
        each, store, fetch = (
            tuple(nbytes / rate / unit_s for nbytes in self.kept)
            for rate in (self.rates.host_bytes, self.rates.stored, self.rates.fetched)
        )
        return replace(pipeline.times, offload=each, reload=each, store=store, fetch=fetch)


def compute_program(cfg: Config, pipeline: Pipeline, microbatches: int) -> Program:
    """In which order every rank of the pipeline axis computes in a step; a program from a file may communicate too.

    Raises:
        UserError: the file's program cannot run.
    """
    return refine(_of_schedule(cfg, pipeline, microbatches), pipeline.parts)


def _of_schedule(cfg: Config, pipeline: Pipeline, microbatches: int) -> Program:
    p, ranks = cfg.parallel.pipeline_in_use, cfg.parallel.pp
    if is_program(p.schedule):
        return read_program(p.schedule)
    if not pipeline.split.balanced:
        return schedules.generate(p.schedule, ranks=ranks, microbatches=microbatches, chunks=p.chunks, group=p.group)
    return balanced(
        p.schedule,
        ranks=ranks,
        microbatches=microbatches,
        chunks=p.chunks,
        group=p.group,
        barriers=p.vocab_barriers,
        times=pipeline.stage_times,
    )


def training_program(
    cfg: Config, pipeline: Pipeline, microbatches: int, buckets: Sequence[int], copies: Copies | None = None
) -> Program:
    """What every rank of the pipeline axis does in a step, checked.

    Args:
        cfg: the job.
        pipeline: its pipeline.
        microbatches: per step.
        buckets: how many buckets of parameters each rank updates.
        copies: for a job that `offloads`.
    """
    program = compute_program(cfg, pipeline, microbatches)
    program = program if is_lowered(program) else lower(program, times=pipeline.times)
    program = offloaded(cfg, program, pipeline, copies)
    program = collected(cfg, program, pipeline)
    tails = [ops + update(count) for ops, count in zip(program.ranks, buckets, strict=True)]
    program = replace(program, ranks=tuple(tails))
    check_program(program)
    return program


def offloads(cfg: Config) -> bool:
    """Whether activations of the job go to the host: its schedule's, or what `memory.offload_activations` says."""
    row = SCHEDULES.get(cfg.parallel.pipeline_in_use.schedule or "")
    return cfg.memory.offload_activations != "none" or (row is not None and row.offloads > 0)


def offloaded(cfg: Config, program: Program, pipeline: Pipeline, copies: Copies | None) -> Program:
    """The program of a training step with those activations on the host that the job wants there: its schedule's, and
    what `memory.offload_activations` adds.

    Args:
        cfg: the job.
        program: complete but for the update.
        pipeline: whose program it is.
        copies: of a job that `offloads`.

    Raises:
        ValueError: it does, and nothing is known of its copies.
        UserError: the host may not hold what is offloaded (`memory.host_gib`).
    """
    if not offloads(cfg):
        return program
    if copies is None:
        raise ValueError("a job that offloads activations needs what its copies take")
    wanted = cfg.memory.offload_activations
    row = SCHEDULES.get(cfg.parallel.pipeline_in_use.schedule or "")
    always = first_chunks(program, row.offloads, pipeline.parts) if row is not None else []
    times, room = copies.beside(pipeline), HostRoom(cfg, program, copies.kept)
    if wanted == "auto":
        found = selective(program, times, ActivationBytes(activation=copies.kept), always)
        chosen = room.held({*always, *found}, times)
    else:
        share = {"none": 0.0, "all": 1.0}[wanted] if isinstance(wanted, str) else wanted
        lived = [[window.pass_ for window in mine] for mine in windows(program, times)]
        chosen = [each for mine in lived for each in mine[: round(share * len(mine))]]
    away, times = room.stored({*always, *chosen}, times)
    return offload(program, {*always, *chosen}, times, stored=away)


def evaluation_program(cfg: Config, pipeline: Pipeline, microbatches: int) -> Program:
    """Forward passes only, checked."""
    barriers = cfg.parallel.pipeline.vocab_barriers if pipeline.split.balanced else 0
    program = refine(forward_only(pipeline.stages, microbatches, barriers), pipeline.parts)
    program = collected(cfg, lower(program, times=pipeline.times), pipeline)
    check_program(program)
    return program


def collected(cfg: Config, program: Program, pipeline: Pipeline) -> Program:
    """The program with gathers of parameters, where the job spreads them."""
    if not is_flat(cfg) or dense_spread(cfg).params == 1:
        return program
    return collecting(program, range(program.stages))


def _times(
    cfg: Config,
    split: StageSplit,
    unit: float,
    remade: Mapping[int, Choice],
    costs: Sequence[float],
    ahead: float,
    head: float,
) -> Times:
    """Of the passes through each stage, in `unit`, as are `costs`: of the layers, prediction modules and head."""
    forward, head = [sum(costs[layer] for layer in layers) / unit for layers in split.layers], head / unit
    forward[-1] += ahead / unit
    again = {
        layer: flops_again(cfg.model, cfg.train.seq_len, mean_pairs(cfg.model, [cfg.train.seq_len]), {layer: choice})
        for layer, choice in remade.items()
    }
    grad = [
        f + sum(again.get(layer, 0.0) for layer in layers) / unit
        for f, layers in zip(forward, split.layers, strict=True)
    ]
    grad[-1] += sum(flops for layer, flops in again.items() if layer >= cfg.model.layers) / unit
    weight = list(forward)
    if split.balanced:
        # Three GEMMs over the vocabulary: two of them in S with one barrier, in T with two.
        gemm = head / cfg.parallel.pp
        two_first = cfg.parallel.pipeline.vocab_barriers == 1
        return Times(
            forward=tuple(forward),
            backward=tuple(grad),
            weight=tuple(weight),
            head=(2 * gemm if two_first else gemm,),
            head_grad=(gemm if two_first else 2 * gemm,),
            embed=(0.0,),
            embed_grad=(0.0,),
            hop=_LATENCY,
            collective=_LATENCY,
        )
    forward[-1] += 3 * head  # the head's gradients are made in its forward pass
    return Times(forward=tuple(forward), backward=tuple(grad), weight=tuple(weight), hop=_LATENCY, collective=_LATENCY)
