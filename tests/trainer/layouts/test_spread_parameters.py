"""Parameters that are spread: bytes that a rank holds and sends, and that nothing stays whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from pentad.configs.schema import AdamWConfig, ConstantSchedule
from pentad.parallel.pipeline.memory import ActivationBytes, peak_bytes
from pentad.parallel.record import reader
from pentad.parallel.replicas.collecting import gathers
from pentad.parallel.replicas.parameters import SpreadParameters
from pentad.trainer.memory.fixed import held
from pentad.trainer.memory.traffic import replica_traffic
from pentad.trainer.pipeline.programs import Pipeline, training_program
from tests.distributed import run_distributed
from tests.rows import without_copies
from tests.same_training import check
from tests.training import Run, job

_ADAM = AdamWConfig(lr=1e-3, schedule=ConstantSchedule())
_OF = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


class _Whole:
    """Counts the bytes of parameters that are whole at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        collect, drop = SpreadParameters.collect, SpreadParameters.drop

        def collected(mine: SpreadParameters) -> None:
            collect(mine)
            self.now += mine.flat.untyped_storage().nbytes()
            self.most = max(self.most, self.now)

        def dropped(mine: SpreadParameters) -> None:
            self.now -= mine.flat.untyped_storage().nbytes()
            drop(mine)

        self._patches = [
            patch.object(SpreadParameters, "collect", collected),
            patch.object(SpreadParameters, "drop", dropped),
        ]

    def __enter__(self) -> _Whole:
        for each in self._patches:
            each.start()
        return self

    def __exit__(self, *_: object) -> None:
        for each in self._patches:
            each.stop()


def _measured(
    rank: int, world: int, cfg: Any, folder: str
) -> tuple[int, dict[str, float], tuple[int, int], dict[int, int]]:
    """Bytes of parameters that a rank holds between steps; what it sends in a step by axis; the most that is whole at a
    time, and afterwards; how often each stage is gathered."""
    path = Path(folder) / f"{rank}.ring"
    run = Run(rank, cfg, record=path)
    try:
        run.step(0)
        with _Whole() as whole:
            run.step(1)
        run.parts.replicas.wait_gathers()
        kept = run.parts.replicas.keep()
        parameters = sum(each.nbytes for key, each in kept.items() if not key.endswith(".master"))
        sent: dict[str, float] = {}
        ring = reader.read(path)
        for entry in without_copies(ring):
            kind, axis = ring.name(entry["kind"]), ring.name(entry["axis"])
            if int(entry["step"]) == 1 and axis.startswith("data") and kind in _OF:
                size = run.mesh.axis(axis).size
                part = "copies" if kind == "all_reduce" else kind
                sent[part] = sent.get(part, 0.0) + _OF[kind] * (size - 1) / size * int(entry["nbytes"])
        return parameters, sent, (whole.most, whole.now), gathers(run.stepper.ops)
    finally:
        run.close()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("pipeline", "memory"),
    [
        ({"schedule": "1f1b"}, {"offload_activations": "all", "group": 1}),
        ({"schedule": "po-h", "chunks": 2}, {"recompute": "selective"}),
    ],
)
def test_activations_are_offloaded_beside_them(pipeline: dict[str, Any], memory: dict[str, Any]) -> None:
    layout = {"pp": 2, "dp": 2, "params": 2, "grads": 2, "states": 2, "model": {"layers": 4}}
    check(**layout, pipeline=pipeline, memory=memory, dtype="fp64", steps=2, micro_batch=2, global_batch=16)


@pytest.mark.distributed
@pytest.mark.parametrize(("params", "grads", "states"), [(2, 2, 2), (2, 2, "all"), (2, 4, 4), ("all", "all", "all")])
def test_bytes_are_those_of_the_closed_forms(tmp_path: Path, params: Any, grads: Any, states: Any) -> None:
    wanted = {"model": {"layers": 4}, "global_batch": 8, "micro_batch": 1, "bucket_mib": 0.01, "dtype": "bf16"}
    cfg = job(dp=4, params=params, grads=grads, states=states, optim=_ADAM, **wanted)
    found = run_distributed(_measured, 4, cfg, str(tmp_path), group=False)
    mine = held(cfg, Pipeline.of(cfg), 0)
    spread = [bucket for bucket in mine.buckets if bucket.part < bucket.elements]
    stages = [float(sum(2 * b.elements for b in spread if b.kind[-1] == stage)) for stage in range(4)]
    program = training_program(cfg, Pipeline.of(cfg), 2, [len(mine.buckets)])
    (planned,) = peak_bytes(program, ActivationBytes(activation=(0.0,), parameters=tuple(stages)))
    for parameters, sent, (most, after), count in found:
        # Two microbatches through four part-stages: passes that follow each other at a turn share a gather.
        assert count == {0: 3, 1: 4, 2: 4, 3: 2}
        traffic = replica_traffic(mine.buckets, 4, 2, microbatches=2, gathers=count)
        scattered = traffic.grads + sum((1 - bucket.share / bucket.kept) * bucket.kept * 4 for bucket in mine.buckets)
        assert parameters == mine.parameters < 2 * sum(bucket.elements for bucket in mine.buckets)
        assert sent.get("reduce_scatter", 0.0) == pytest.approx(scattered, abs=0.5)
        gathered = traffic.params + traffic.neighbours - (scattered - traffic.grads)
        assert sent["all_gather"] == pytest.approx(gathered, abs=0.5)
        assert sent.get("copies", 0.0) == pytest.approx(traffic.copies, abs=0.5)
        assert (most, after) == (planned, 0)
    assert planned <= mine.gathered < 2 * sum(bucket.elements for bucket in spread)
    width = 4 if params == "all" else params
    assert all(bucket.part * width == bucket.elements for bucket in spread)
