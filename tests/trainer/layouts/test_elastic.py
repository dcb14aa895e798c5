"""`train.deterministic=elastic`: the same bits at any size of data parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pentad.configs.schema import Config, MoeConfig
from pentad.parallel.comm.collectives import all_reduce
from pentad.trainer.pipeline.programs import evaluation_program
from tests.distributed import run_distributed
from tests.training import Run, job

WANTED: dict[str, Any] = {"global_batch": 12, "micro_batch": 1, "dtype": "fp32", "deterministic": "elastic"}
ROUTED = {"moe": MoeConfig(experts=4, top_k=2, ffn=24)}


def test_one_processs_microbatches_may_come_in_any_order() -> None:
    plain = Run(0, job(**{**WANTED, "deterministic": True}))
    elastic = Run(0, job(**WANTED))
    found: dict[str, set[tuple[float, ...]]] = {"plain": set(), "elastic": set()}
    for name, run in (("plain", plain), ("elastic", elastic)):
        batches, valid = run.batches(0)
        for order in (batches, batches[::-1], batches[5:] + batches[:5]):
            result = run.stepper.run(0, order, valid, 0.0)
            grads = [unit.grad.double().sum().item() for unit in run.stepper.replicas.units(0)]
            found[name].add((result.loss.item(), result.grad_norm.item(), *grads))
    assert len(found["elastic"]) == 1 and len(found["plain"]) > 1
    one, two = found["elastic"].pop(), found["plain"].pop()
    assert one[:2] == pytest.approx(two[:2], rel=1e-6)


def trained(rank: int, world: int, cfg: Config) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Losses, norms and held-out losses of a few steps, and the parameters."""
    run, numbers = Run(rank, cfg), []
    for step in range(4):
        batches, valid = run.batches(step)
        result = run.stepper.run(step, batches, valid, 1e-2)
        program = evaluation_program(cfg, run.parts.pipeline, len(batches))
        parts = all_reduce(run.stepper.evaluate(batches, program), run.mesh.axis("world")).wait()
        numbers.append((result.loss.item(), result.grad_norm.item(), run.stepper.sums.whole(parts).item()))
    run.parts.replicas.wait_gathers()
    params = {name: value.detach().clone() for name, value in run.parts.model.named_parameters()}
    run.close()
    return numbers, params


@pytest.mark.distributed
@pytest.mark.parametrize(
    "wanted",
    [
        {"sharding": "zero1"},
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in (
                {"sharding": "ddp", "model": {"tied": True}},
                {"sharding": "zero1", "dtype": "bf16", "optim": "sgd"},
                {"sharding": "zero1", "dtype": "fp64", "model": ROUTED},
            )
        ),
    ],
    ids=lambda wanted: " ".join(map(str, wanted)),
)
def test_all_sizes_have_the_same_bits(wanted: dict[str, Any]) -> None:
    first, *others = (
        run_distributed(trained, dp, job(**{**WANTED, **wanted, "dp": dp}), group=False) for dp in (1, 2, 3, 4)
    )
    numbers, params = first[0]
    assert numbers[-1][0] < numbers[0][0]
    for found in (each for ranks in others for each in ranks):
        assert found[0] == numbers
        assert all(torch.equal(found[1][name], value) for name, value in params.items())
