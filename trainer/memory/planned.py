"""What the ranks of a run should hold over a step, by the memory model. No torch."""

from __future__ import annotations

from pathlib import Path

from ...configs.load import load
from ...parallel.pipeline.memory import ActivationBytes, byte_curve
from ...parallel.pipeline.simulate import Curve, Timeline
from ..pipeline.programs import Pipeline
from ..run_folder import RunFile
from .stages import StageBytes, StagePlace, bench_of, stage_bytes, ways_of


def planned_bytes(folder: Path, timeline: Timeline) -> tuple[Curve, ...]:
    """The activations that each rank holds over time.

    Args:
        folder: of the run.
        timeline: of its program.

    Raises:
        UserError: its configuration cannot be read.
    """
    cfg = load(str(folder / RunFile.RESOLVED), [])
    pipeline, placement = Pipeline.of(cfg), timeline.program.placement
    later = any(op.kind.token == "W" for ops in timeline.program.ranks for op in ops)
    bench, last = bench_of(cfg, ways_of(cfg)), timeline.program.stages - 1

    def of(stage: int) -> StageBytes:
        place = StagePlace(
            layers=pipeline.split.layers[stage],
            first=stage == 0,
            last=stage == last,
            received=stage > 0 and placement[stage - 1] != placement[stage],
            returned=stage < last and placement[stage + 1] != placement[stage],
            balanced=pipeline.split.balanced,
            split=later,
        )
        return stage_bytes(bench, place, pipeline.choice, lambda layer: bench)

    each = [of(stage) for stage in range(last + 1)]
    deferred = tuple(stage.deferred for stage in each) if later else None
    return byte_curve(timeline, ActivationBytes(activation=tuple(stage.kept for stage in each), deferred=deferred))
