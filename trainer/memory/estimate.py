"""What a rank will need of its device's memory: the one model that `pentad check`, advice, the choice of what is made
again or offloaded, and the readings of a run share. No torch.

Bytes that tensors take while a step goes on, on the rank of the pipeline that needs most (docs/memory.md):

    parameters, gradients, masters, states    flat buckets, filled up to what the replicas share (`fixed`)
    gathered layers                           of spread parameters
    gradients to send                         of spread gradients
    inputs, buffers                           the step's microbatches; slots of what other stages send
    activations                               what microbatches in flight keep: rows of `models.costs.activations`,
                                              summed over layers (`stages`), counted by the program (`walk`)
    working                                   the most that an operation makes meanwhile: `models.costs.moments` goes
                                              through each layer's passes tensor by tensor
    communication                             what sums over ranks read the parts of all ranks into

The peak is that of one moment: of the operation of the program during which the sum is largest. Experts get as many
rows as at even load, unless a run's own numbers are given.

Not counted: fragmentation, and scratch that kernels keep for themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

from ...configs import Config
from ...configs.fields import with_value
from ...configs.schema import CODED_STATES, AdamWConfig
from ...configs.tables.schedules import SCHEDULES, is_program
from ...models.costs.moments.ways import Bench, Ways
from ...parallel.pipeline.communication import is_lowered, slots
from ...parallel.pipeline.kind import Kind, Role
from ...parallel.pipeline.lower import lower
from ...parallel.pipeline.program import Program
from ..pipeline.programs import Pipeline, collected, compute_program, offloaded
from .copies import copies_of
from .fixed import FlatBucket, Held, held, input_bytes, sum_bytes
from .stages import Conventions, Routed, StageBytes, StagePlace, VocabularyBytes, bench_of, stage_bytes, ways_of
from .walk import Course, Moment, Walk

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Args:
        rank: on the pipeline axis.
        held: parameters and what belongs to them.
        inputs: of the step's microbatches.
        buffers: slots of receives, and what is being sent.
        most: when the most is alive beside these.
        host, disk: the most that activations take there.
        in_flight: the most activations at once, of one microbatch at one stage each.
        context: of the device itself, before there is any tensor.
    """

    rank: int
    held: Held
    inputs: int
    buffers: int
    most: Moment
    host: int
    disk: int
    in_flight: int
    context: int

    @property
    def activations(self) -> int:
        """What microbatches keep at the moment of the peak."""
        return int(self.most.activations)

    @property
    def working(self) -> int:
        """What the operation at work makes then."""
        return int(self.most.working)

    @property
    def communication(self) -> int:
        """What collectives read into then."""
        return int(self.most.communication)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes on the device by what they are, in the order of tables and pictures."""
        h = self.held
        return {
            "parameters": h.parameters,
            "gradients": h.gradients,
            "masters": h.masters,
            "optimizer states": h.states,
            "gathered layers": h.gathered,
            "gradients to send": h.opened,
            "inputs": self.inputs,
            "buffers of stages": self.buffers,
            "activations": self.activations,
            "working memory": self.working,
            "communication": self.communication,
            "device context": self.context,
        }

    @property
    def elsewhere(self) -> dict[str, int]:
        """Bytes of activations, masters and states that are not on the device."""
        return {"host": self.host + self.held.host, "disk": self.disk + self.held.disk}

    @property
    def fixed(self) -> int:
        """What is there all the time."""
        return self.total - self.activations - self.working - self.communication

    @property
    def tensors(self) -> int:
        """What all tensors take."""
        return self.total - self.context

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def with_states_placed(cfg: Config) -> Config:
    """The job with `memory.offload_optimizer=auto` replaced by what it comes to: none where the job fits
    `hardware.memory_gib`, or that is not given, else host. Coded moments stay."""
    key = "memory.offload_optimizer"
    if cfg.memory.offload_optimizer != "auto":
        return cfg
    here, limit = with_value(cfg, key, "none"), cfg.hardware.memory_gib
    coded = isinstance(cfg.optim, AdamWConfig) and cfg.optim.states in CODED_STATES
    return here if limit is None or coded or estimate(here).total <= limit * GIB else with_value(cfg, key, "host")


def estimate(cfg: Config) -> Memory:
    """Memory of one rank of a resolved job, of the one that needs most."""
    return max(per_rank(cfg), key=lambda memory: memory.total)


def per_rank(
    cfg: Config,
    routed: Routed | None = None,
    *,
    program: Program | None = None,
    conventions: Conventions | None = None,
    ranks: Sequence[int] | None = None,
) -> list[Memory]:
    """Memory of each rank of the pipeline axis.

    Args:
        cfg: the job, resolved.
        routed: the rows of one rank's experts; none: of an even load.
        program: of a whole step, as a run has it; none: as many microbatches as it takes to be in the steady state.
        conventions: of another code, whose figures are wanted; none: of this one.
        ranks: only these.
    """
    cfg = with_states_placed(cfg)
    pipeline = Pipeline.of(cfg)
    microbatches = max(1, cfg.train.global_batch // (cfg.train.micro_batch * cfg.parallel.dp))
    if program is None:
        wanted = _Wanted.of(cfg, pipeline, enough(cfg, microbatches), conventions is None)
        # A file may be another one the next time.
        known = not is_program(cfg.parallel.pipeline_in_use.schedule or "")
        plain, buffers = _known_program(wanted) if known else _program(wanted)
        program = collected(cfg, offloaded(cfg, plain, pipeline, copies_of(cfg, pipeline)), pipeline)
    else:
        buffers = slots(program)
    b = bench_of(cfg, ways_of(cfg))
    job = _Job(cfg, pipeline, program, buffers, b, routed or {}, conventions)
    found = []
    for rank in range(cfg.parallel.pp) if ranks is None else ranks:
        mine = held(cfg, pipeline, rank, conventions.parameter if conventions else None)
        course = job.course(rank, mine)
        found.append(
            Memory(
                rank=rank,
                held=mine,
                inputs=0 if conventions else input_bytes(cfg, microbatches),
                buffers=0 if conventions else int(job.buffers(rank) * b.stream),
                most=course.most,
                host=int(course.host),
                disk=int(course.disk),
                in_flight=course.in_flight,
                context=0 if conventions else b.ways.context,
            )
        )
    return found


@dataclass(frozen=True)
class _Wanted:
    """What a program follows from; many jobs that are compared have the same.

    Args:
        keys: of the section, ranks, stages and times.
        microbatches: of the step.
        lowered: with its communication.
        cfg, pipeline: that these are of.
    """

    keys: tuple[Any, ...]
    microbatches: int
    lowered: bool
    cfg: Config = field(compare=False)
    pipeline: Pipeline = field(compare=False)

    @staticmethod
    def of(cfg: Config, pipeline: Pipeline, microbatches: int, lowered: bool) -> _Wanted:
        p = pipeline
        keys = (
            cfg.parallel.pipeline_in_use,
            cfg.parallel.pp,
            p.stages,
            p.parts,
            p.split,
            repr((p.times, p.stage_times)),
        )
        return _Wanted(keys, microbatches, lowered, cfg, pipeline)


def _program(wanted: _Wanted) -> tuple[Program, dict[tuple[int, int, Kind], int]]:
    """The program, without offloads, and how many buffers its receives need."""
    program = compute_program(wanted.cfg, wanted.pipeline, wanted.microbatches)
    if wanted.lowered and not is_lowered(program):
        program = lower(program, times=wanted.pipeline.times)
    return program, slots(program)


_known_program = lru_cache(maxsize=32)(_program)


def enough(cfg: Config, microbatches: int) -> int:
    """Microbatches after which every rank is in its steady state."""
    schedule = SCHEDULES.get(cfg.parallel.pipeline_in_use.schedule or "")
    if schedule is None or not schedule.steady:
        return microbatches
    pp = cfg.parallel.pp
    group = cfg.parallel.pipeline.group or pp
    whole_groups = -(-(pp + max(pp, group) + 2) // group) * group
    return min(microbatches, whole_groups)


@dataclass(frozen=True)
class _Job:
    """What all ranks of the pipeline have in common."""

    cfg: Config
    pipeline: Pipeline
    program: Program
    slots: dict[tuple[int, int, Kind], int]
    bench: Bench
    routed: Routed
    conventions: Conventions | None

    def course(self, rank: int, mine: Held) -> Course:
        """A step of one rank."""
        layers, last = self.pipeline.split.layers, len(self.pipeline.split.layers) - 1
        places = {stage: self._place(rank, stage) for stage in self.pipeline.stages_of(rank)}
        experts = {stage: _routed_layers(self.cfg, layers[stage], stage == last) for stage in places}

        @cache
        def of(stage: int, rows: tuple[tuple[int, int] | None, ...]) -> StageBytes:
            if self.conventions is not None:
                return self.conventions.stage(self.bench, places[stage])
            known = dict(zip(experts[stage], rows, strict=True))

            def bench(layer: int) -> Bench:
                return self.bench.with_rows(*(known.get(layer) or (None, None)))

            return stage_bytes(self.bench, places[stage], self.pipeline.choice, bench)

        def stage(index: int, microbatch: int) -> StageBytes:
            return of(index, tuple(self.routed.get((layer, microbatch)) for layer in experts[index]))

        def reduced(bucket: FlatBucket) -> float:
            return _reduced(self.cfg, self.bench.ways, bucket)

        ops, vocabulary = self.program.ranks[rank], self._vocabulary()
        return Walk(ops, stage, mine.buckets, reduced, vocabulary, float(mine.update)).course()

    def buffers(self, rank: int) -> int:
        """Tensors that stages send: slots of receives, and each way an output or gradient that has not left yet."""
        received = sum(count for (where, _, _), count in self.slots.items() if where == rank)
        return received + len({op.kind for op in self.program.ranks[rank] if op.kind.role is Role.SEND})

    def _place(self, rank: int, stage: int) -> StagePlace:
        split = self.pipeline.split
        comes = {kind.token for where, each, kind in self.slots if where == rank and each == stage}
        return StagePlace(
            layers=split.layers[stage],
            first=stage == 0,
            last=stage == len(split.layers) - 1,
            received="RF" in comes,
            returned="RB" in comes,
            balanced=split.balanced,
            split=any(op.kind.token == "W" for op in self.program.ranks[rank]),
        )

    def _vocabulary(self) -> VocabularyBytes:
        if not self.pipeline.split.balanced:
            return VocabularyBytes()
        if self.conventions is not None:
            return self.conventions.vocabulary(self.bench, self.cfg.parallel.pp)
        return vocabulary_bytes(self.cfg, self.bench)


def _routed_layers(cfg: Config, layers: tuple[int, ...], last: bool) -> tuple[int, ...]:
    ahead = tuple(range(cfg.model.layers, cfg.model.layers + cfg.model.mtp)) if last else ()
    wanted = set(cfg.model.routed_layers)
    return tuple(layer for layer in (*layers, *ahead) if layer in wanted)


def _reduced(cfg: Config, ways: Ways, bucket: FlatBucket) -> float:
    """A sum over replicas reads every rank's part of the bucket into a tensor as large as that."""
    sums = bucket.replicas > 1 or bucket.partial
    return bucket.elements * float(sum_bytes(cfg)) if ways.collects and sums else 0.0


def vocabulary_bytes(cfg: Config, b: Bench) -> VocabularyBytes:
    """Of a balanced vocabulary: from S to T the exponentials and the hidden states of all tokens."""
    p, tokens = cfg.parallel, b.work.tokens
    vocab = cfg.model.vocab // p.tp // p.pp
    exponentials, one = b.tokens(vocab), p.pipeline.vocab_barriers == 1
    wide = b.wide(min(tokens, 1024) * vocab * b.work.width) if b.half else 0.0
    return VocabularyBytes(
        kept=exponentials + b.whole,
        score=wide + (2 * b.whole if one else 0.0),
        gradient=wide + (b.whole if not one else 0.0) + b.product(vocab, cfg.model.hidden),
        embedding=b.whole,
    )
