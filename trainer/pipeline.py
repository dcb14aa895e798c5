"""The job's pipeline: who holds which stage, and the programs of a training step and of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..configs.schema import Config
from ..models.flops import step_flops, unmasked_pairs
from ..models.stages import Split
from ..parallel.pipeline import schedules
from ..parallel.pipeline.check import check
from ..parallel.pipeline.lower import forward_only, lower
from ..parallel.pipeline.partition import partition
from ..parallel.pipeline.program import Program, update
from ..parallel.pipeline.times import Times
from ..parallel.pipeline.vocabulary import balanced

_LATENCY = 0.02
"""Guess of a hop's and a collective's latency, in forward passes of one rank's share, for orders that are searched."""


@dataclass(frozen=True)
class Pipeline:
    """What is decided about the pipeline before anything is built.

    Args:
        placement: the rank on the pipeline axis that holds each stage.
        split: the layers of each stage.
        times: estimated times of the passes, in forward passes of one rank's share.
    """

    placement: tuple[int, ...]
    split: Split
    times: Times

    @staticmethod
    def of(cfg: Config) -> Pipeline:
        """The pipeline that the config asks for: layers split by their cost, or as it says."""
        p, ranks = cfg.parallel.pipeline, cfg.parallel.pp
        assert p.schedule is not None and p.chunks is not None
        placement = schedules.placement(p.schedule, ranks, p.chunks)
        is_balanced = p.vocab == "balanced" and ranks > 1
        layer, head = _costs(cfg)
        if p.layers == "auto":
            counts = partition(
                [layer] * cfg.model.layers, len(placement), last=0.0 if is_balanced else head, placement=placement
            )
        else:
            counts = tuple(p.layers)
        times = _times(cfg, counts, placement, layer, head, balanced=is_balanced)
        return Pipeline(placement, Split.of(counts, balanced=is_balanced), times)

    @property
    def ends(self) -> tuple[int, int]:
        """The ranks of the first and the last stage."""
        return self.placement[0], self.placement[-1]

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """The (source, destination) ranks between which tensors travel, in one order on all ranks."""
        steps = {pair for pair in zip(self.placement, self.placement[1:], strict=False) if pair[0] != pair[1]}
        return tuple(sorted(steps | {(b, a) for a, b in steps}))

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that a rank of the pipeline axis holds."""
        return tuple(stage for stage, where in enumerate(self.placement) if where == rank)


def compute_program(cfg: Config, pipeline: Pipeline, microbatches: int) -> Program:
    """In which order every rank of the pipeline axis computes in a step, without communication."""
    p, ranks = cfg.parallel.pipeline, cfg.parallel.pp
    assert p.schedule is not None
    if not pipeline.split.balanced:
        return schedules.generate(p.schedule, ranks=ranks, microbatches=microbatches, chunks=p.chunks, group=p.group)
    return balanced(
        p.schedule,
        ranks=ranks,
        microbatches=microbatches,
        chunks=p.chunks,
        group=p.group,
        barriers=p.vocab_barriers,
        times=pipeline.times,
    )


def training_program(cfg: Config, pipeline: Pipeline, microbatches: int, buckets: Sequence[int]) -> Program:
    """What every rank of the pipeline axis does in a step, checked.

    Args:
        cfg: the job.
        pipeline: its pipeline.
        microbatches: per step.
        buckets: how many buckets of parameters each rank updates.
    """
    program = lower(compute_program(cfg, pipeline, microbatches), times=pipeline.times)
    tails = [ops + update(count) for ops, count in zip(program.ranks, buckets, strict=True)]
    program = replace(program, ranks=tuple(tails))
    check(program)
    return program


def evaluation_program(cfg: Config, pipeline: Pipeline, microbatches: int) -> Program:
    """Forward passes only, checked."""
    barriers = cfg.parallel.pipeline.vocab_barriers if pipeline.split.balanced else 0
    program = lower(forward_only(pipeline.placement, microbatches, barriers), times=pipeline.times)
    check(program)
    return program


def _costs(cfg: Config) -> tuple[float, float]:
    """FLOPs of a forward pass of one sequence in one layer, and in the head."""
    length = cfg.train.seq_len
    flops = step_flops(cfg.model, length, unmasked_pairs([length], cfg.model.window))
    return (flops.projections + flops.attention + flops.ffn) / cfg.model.layers / 3, flops.head / 3


def _times(
    cfg: Config, counts: Sequence[int], placement: Sequence[int], layer: float, head: float, *, balanced: bool
) -> Times:
    ranks = max(placement) + 1
    unit = cfg.model.layers * layer / ranks
    layer, head = layer / unit, head / unit
    forward = [count * layer for count in counts]
    again = 1.0 if cfg.memory.recompute == "full" else 0.0
    grad = [(1.0 + again) * f for f in forward]
    weight = list(forward)
    if balanced:
        # Three GEMMs over the vocabulary: two of them in S with one barrier, in T with two.
        gemm = head / ranks
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
