"""The time of a step by module: it sums to the step, has every module, and recording it changes nothing."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from pentad.configs.schema import MoeConfig
from pentad.models.costs.flops import flops_per_step
from pentad.parallel.record import kinds, reader
from pentad.parallel.record.modules import by_module, operation_names, recorded_steps, whole_steps
from pentad.trainer.metrics.module_costs import Work, module_work
from pentad.trainer.metrics.module_spans import ModuleSpans
from tests.training import Run, job

JOBS: dict[str, dict[str, Any]] = {
    "dense": {},
    "recomputed": {"recompute": "full"},
    "experts": {"model": {"moe": MoeConfig(experts=4, top_k=2, ffn=32, shared=16)}},
}
_BOTH = ("attention", "ffn", "norms")


def _losses(name: str, path: Path, steps: tuple[int, ...]) -> list[float]:
    run = Run(0, job(**JOBS[name]), record=path)
    recorder = run.mesh.recorder
    spans, losses = ModuleSpans(run.parts.model, recorder, steps), []
    for step in range(4):
        recorder.step = step
        with spans.step(step + 1):
            with recorder.span(recorder.intern(kinds.DATA)):
                run.batches(step)
            issued = run.issue(step)
            with recorder.span(recorder.intern(kinds.DRAIN)):
                losses.append(float(issued.loss))
        time.sleep(0.001)
    run.close()
    return losses


@pytest.mark.parametrize("name", JOBS)
def test_the_parts_sum_to_the_step_and_recording_them_changes_nothing(name: str, tmp_path: Path) -> None:
    assert _losses(name, tmp_path / "with.ring", (2, 3)) == _losses(name, tmp_path / "without.ring", ())
    ring = reader.read(tmp_path / "with.ring")
    assert recorded_steps(ring) == [1, 2] and recorded_steps(reader.read(tmp_path / "without.ring")) == []
    parts, seconds = by_module(ring, 2)
    assert sum(parts.values()) == pytest.approx(seconds, rel=1e-6)
    drains = ring.entries[[ring.name(kind) == kinds.DRAIN for kind in ring.entries["kind"]]]["end"]
    assert seconds == pytest.approx((drains[2] - drains[1]) / 1e9)
    found = {label for label, value in parts.items() if value > 0}
    modules = (*_BOTH, "experts", "experts' way") if name == "experts" else _BOTH
    wanted = {f"{way} {each}" for way in ("forward", "backward") for each in modules}
    wanted |= {"forward head", "optimizer", "data"} | ({"forward router"} if name == "experts" else set())
    assert wanted <= found, wanted - found
    assert 0.001 <= parts["other"] < seconds
    # A second run passes through the modules again, and is theirs; none is left open over the step's end.
    assert not [ring.name(e["kind"]) for e in ring.open() if ring.name(e["kind"]).startswith("forward")]


def test_a_step_without_modules_is_divided_by_operation(tmp_path: Path) -> None:
    _losses("recomputed", tmp_path / "plain.ring", ())
    ring, run = reader.read(tmp_path / "plain.ring"), Run(0, job(**JOBS["recomputed"]))
    names = operation_names([str(op) for op in run.stepper.ops], staged=False)
    run.close()
    assert whole_steps(ring) == [1, 2, 3], "of the first one it is not known when it began"
    parts, seconds = by_module(ring, 2, names)
    assert sum(parts.values()) == pytest.approx(seconds, rel=1e-6)
    assert {"forward", "backward", kinds.RECOMPUTE, "optimizer", "data", "report", "other"} <= parts.keys()
    spent = [ring.entries[[ring.name(kind) == token for kind in ring.entries["kind"]]] for token in ("F", "BW")]
    for label, entries in zip(("forward", "backward"), spent, strict=True):
        mine = entries[entries["step"] == 2]
        own = (mine["end"] - mine["start"]).sum() / 1e9
        again = parts[kinds.RECOMPUTE] if label == "backward" else 0.0
        assert parts[label] + again == pytest.approx(own, rel=1e-6)


@pytest.mark.parametrize("name", JOBS)
def test_the_modules_work_is_the_models(name: str) -> None:
    cfg = job(dp=2, **JOBS[name])
    work = module_work(cfg)
    tokens = cfg.train.global_batch * cfg.train.seq_len
    pairs = cfg.train.global_batch * cfg.train.seq_len**2 / 2
    assert sum(each.flops for each in work.values()) == pytest.approx(flops_per_step(cfg.model, tokens, pairs) / 2)
    assert all(each.intensity > 0 for each in work.values())


def test_what_bounds_a_product() -> None:
    assert Work(1000.0, 10.0).bound_s(100.0, 2.0) == (10.0, "compute")
    assert Work(1000.0, 10.0).bound_s(1000.0, 2.0) == (5.0, "memory")
    # One square matrix of 8 times 32 tokens, fp64, once.
    head = module_work(job(model={"hidden": 8, "heads": 1, "kv_heads": 1, "vocab": 8}, global_batch=2))["forward head"]
    assert head.flops == 3 * 2 * 32 * 8 * 8 and head.nbytes == 3 * 8 * (32 * 16 + 64)
