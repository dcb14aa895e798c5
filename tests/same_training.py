"""Trains a job and its twin in one process, and compares everything that can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from pentad.configs.schema import Config
from pentad.parallel.global_tensor import boxes
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op
from pentad.parallel.replicas.collecting import gathers
from pentad.trainer.checkpoint.state import units_by_key
from tests.distributed import run_distributed
from tests.training import Run, job

TOLERANCE = {"fp64": 1e-11, "fp32": 1e-5}


@dataclass(frozen=True)
class Trained:
    """What one rank has after the last step.

    Args:
        curve: (loss, grad norm, skipped) of every step.
        slices: name → (placement, value) of its part of every parameter.
        gradients: (name, placement, first element, values) of the parts of the last step's gradient that it owns.
        buffers: name → value.
        routed: what the routers counted in every step, over all ranks; none: a dense model.
    """

    curve: list[tuple[float, float, float]]
    slices: dict[str, tuple[Any, torch.Tensor]]
    gradients: list[tuple[str, Any, int, torch.Tensor]]
    buffers: dict[str, torch.Tensor]
    routed: list[torch.Tensor | None]


def train(rank: int, world: int, cfg: Config, masked: bool) -> Trained:
    """Runs all steps of the job on one rank."""
    run = Run(rank, cfg, masked=masked)
    try:
        results = [run.issue(step) for step in range(cfg.train.steps)]
        run.parts.replicas.wait_gathers()
        make_whole(run)
        where = run.parts.where
        return Trained(
            [(float(r.loss), float(r.grad_norm), float(r.skipped)) for r in results],
            {name: (where[name].placement, p.detach().clone()) for name, p in run.parts.model.named_parameters()},
            _gradients(run),
            {name: buffer.clone() for name, buffer in run.parts.buffers.items()},
            [None if r.moe is None else r.moe.clone() for r in results],
        )
    finally:
        run.close()


def make_whole(run: Run) -> None:
    """Gathers parameters that are spread, for good."""
    handlers = run.parts.replicas.handlers
    for stage in gathers(run.stepper.ops):
        for kind in (Kinds.COLLECT_FORWARD, Kinds.HAVE_FORWARD):
            handlers[kind](Op(kind, 0, stage))


def _gradients(run: Run) -> list[tuple[str, Any, int, torch.Tensor]]:
    units = units_by_key(run.parts.replicas)
    return [
        (p.name, p.sharding.placement, p.start, units[p.unit].grad[p.at : p.at + p.stop - p.start].clone())
        for p in run.parts.replicas.pieces()
    ]


def worst(curves: list[list[tuple[float, float, float]]], expected: list[tuple[float, float, float]]) -> float:
    """Largest relative difference of a loss or norm on any rank in any step."""
    return max(
        abs(got - want) / abs(want)
        for curve in curves
        for step, expected_step in zip(curve, expected, strict=True)
        for got, want in zip(step[:2], expected_step[:2], strict=True)
    )


def assembled(ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """Whole parameters; wherever several ranks hold the same elements, these must be the same bits."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, (placement, value) in rank.slices.items():
            target = whole.setdefault(name, torch.full(placement.global_shape, torch.nan, dtype=value.dtype))
            target = placement.of(target)
            assert torch.isnan(target).all() or torch.equal(target, value), name
            target.copy_(value)
    assert not any(torch.isnan(value).any() for value in whole.values())
    return whole


def assembled_gradients(ranks: list[Trained]) -> dict[str, torch.Tensor]:
    """The last step's whole gradients, as the optimizer read them."""
    whole: dict[str, torch.Tensor] = {}
    for rank in ranks:
        for name, placement, start, values in rank.gradients:
            target = whole.setdefault(name, torch.full(placement.global_shape, torch.nan, dtype=values.dtype))
            for box in boxes(placement, start, start + len(values)):
                part = target
                for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
                    part = part.narrow(dim, offset, size)
                part.copy_(values[box.local_flat_start - start :][: box.numel].view(box.sizes))
    assert not any(torch.isnan(value).any() for value in whole.values())
    return whole


_REFERENCES: dict[str, Trained] = {}


def reference(cfg: Config, masked: bool) -> Trained:
    """One process without a pipeline."""
    key = repr((cfg.model, cfg.train, cfg.optim, masked))
    if key not in _REFERENCES:
        _REFERENCES[key] = run_distributed(train, 1, cfg, masked, group=False)[0]
    return _REFERENCES[key]


def check(
    masked: bool = False,
    alone_model: dict[str, Any] | None = None,
    trains: Callable[..., Trained] = train,
    **wanted: Any,
) -> list[Trained]:
    """Trains the job and its single-process twin, and compares curves, parameters, buffers and routing.

    Args:
        masked: packed documents, some labels without a loss.
        alone_model: what the twin's model has instead.
        trains: what each of the job's ranks runs: `train`, or a function that prepares for it.
        wanted: arguments of `job`.

    Returns:
        What the ranks have.
    """
    cfg = job(**wanted)
    one = {
        "tp": 1,
        "pp": 1,
        "cp": 1,
        "dp": 1,
        "ep": 1,
        "etp": 1,
        "sharding": "ddp",
        "params": None,
        "grads": None,
        "states": None,
        "pipeline": None,
        "recompute": "none",
        "offload": "none",
    }
    alone = job(**{**wanted, **one, "model": {**wanted.get("model", {}), **(alone_model or {})}})
    world = cfg.parallel.ranks
    ranks = run_distributed(trains, world, cfg, masked, group=False)
    expected = reference(alone, masked)
    tolerance = TOLERANCE[cfg.train.dtype]
    _compare_routing(ranks, expected, tolerance)
    assert worst([rank.curve for rank in ranks], expected.curve) < tolerance
    _compare(assembled(ranks), assembled([expected]), tolerance)
    # A gradient's elements may cancel to little beside the terms they are sums of; the global norm has all of them.
    floor = tolerance * expected.curve[-1][1]
    _compare(assembled_gradients(ranks), assembled_gradients([expected]), 10 * tolerance, floor)
    return ranks


def _compare(
    mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float, floor: float = 0.0
) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        allowed = max(tolerance * torch.linalg.vector_norm(value).item(), floor)
        assert torch.linalg.vector_norm(mine[name] - value).item() <= allowed, name


def _compare_routing(ranks: list[Trained], expected: Trained, tolerance: float) -> None:
    for rank in ranks:
        for step, (mine, theirs) in enumerate(zip(rank.routed, expected.routed, strict=True)):
            if mine is not None and theirs is not None:
                torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=f"routing of step {step}")
        for name, buffer in rank.buffers.items():
            assert torch.equal(buffer, expected.buffers[name]), name
    assert {name for rank in ranks for name in rank.buffers} == expected.buffers.keys()
