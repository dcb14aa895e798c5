"""Saved-tensor hooks, as recompute and offload install them, leave parameters what they are: their gradients go to
their slots, and weight gradients that a split backward defers stay deferred."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from pentad.configs.schema import MoeConfig
from pentad.parallel.gradients import WeightGradients
from pentad.parallel.pipeline.needs import Kinds
from pentad.parallel.pipeline.program import Op, Program
from pentad.trainer.step import Stepper
from tests.training import Run, job

MODELS: dict[str, dict[str, Any]] = {"dense": {}, "experts": {"moe": MoeConfig(experts=4, top_k=2, ffn=32)}}


def _split(program: Program) -> Program:
    """B and W instead of BW."""

    def halves(op: Op) -> tuple[Op, ...]:
        if op.kind is not Kinds.BACKWARD:
            return (op,)
        return Op(Kinds.INPUT_GRAD, op.index, op.stage), Op(Kinds.WEIGHT_GRAD, op.index, op.stage)

    return replace(program, ranks=tuple(tuple(each for op in ops for each in halves(op)) for ops in program.ranks))


class Hooked(Stepper):
    """Runs forward passes inside hooks that give back copies."""

    hooks = False

    def _forward(self, stage: int, index: int, x: Tensor | None) -> Tensor:
        inside: AbstractContextManager[None] = nullcontext()
        if self.hooks:
            inside = saved_tensors_hooks(lambda t: t.clone(), lambda t: t)
        with inside:
            return super()._forward(stage, index, x)


@pytest.mark.parametrize("model", MODELS)
def test_weight_gradients_stay_deferred(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    deferred: list[int] = []
    put = WeightGradients.put
    monkeypatch.setattr(WeightGradients, "put", lambda store, each: deferred.append(0) or put(store, each))
    found = []
    for hooks, recompute in ((False, "none"), (False, "full"), (True, "none")):
        deferred.clear()
        monkeypatch.setattr(Hooked, "hooks", hooks)
        cfg = job(model=MODELS[model], steps=1, recompute=recompute)
        run = Run(0, cfg, stepper=lambda c, parts, opt, mesh, program: Hooked(c, parts, opt, mesh, _split(program)))
        try:
            result = run.step(0)
            assert all(param.grad is None for param in run.parts.model.parameters())
            found.append((len(deferred), result))
        finally:
            run.close()
    assert found[0][0] >= 4 * 2 * 4  # microbatches, layers, projections
    assert found[1:] == found[:1] * 2
