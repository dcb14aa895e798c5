"""torch.distributed.pipelining as an oracle: the same layers under its runtime and ours give the same gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from pentad.models.costs.parts import StageSplit
from pentad.models.parallelize import build_model, initial_values
from pentad.models.sequences import Inputs
from pentad.models.stages import run_stage
from pentad.models.transformer import Transformer
from pentad.parallel.gradients import slot_of
from pentad.trainer.data.dataset import Microbatch
from tests.distributed import run_distributed
from tests.training import Run, job

LAYERS = 8
THEIRS = {
    "gpipe": (schedules.ScheduleGPipe, 1),
    "1f1b": (schedules.Schedule1F1B, 1),
    "interleaved": (schedules.ScheduleInterleaved1F1B, 2),
    "gis": (schedules.ScheduleInterleavedZeroBubble, 2),
    "zb-v": (schedules.ScheduleZBVZeroBubble, 2),
    "dualpipev": (schedules.ScheduleDualPipeV, 2),
}


class Stage(nn.Module):
    """One stage of our model without gradient slots: autograd accumulates the parameters' gradients."""

    def __init__(
        self, model: Transformer, split: StageSplit, stage: int, shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.model, self.stage, self.dtype = model, stage, dtype
        self.split = replace(split, balanced=True)  # the head is torch's loss function
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        tokens = x if self.stage == 0 else torch.zeros(self.shape, dtype=torch.long)
        if self.stage == 0:
            x = self.model.embedding_op(tokens.reshape(-1), self.model.embed_weight)
        return run_stage(self.model, self.split, self.stage, x, Inputs(tokens, tokens, 1.0), self.dtype)


def _make_stage(run: Run, stage: int) -> Stage:
    cfg, split = run.cfg, run.parts.pipeline.split
    model, where = build_model(
        cfg.model, run.mesh, device=torch.device("cpu"), dtype=torch.float64, part=split.part((stage,))
    )
    params = dict(model.named_parameters())
    for name, value in initial_values(model, where, cfg.train.seed):
        params[name].data.copy_(value)
    shape = torch.Size((cfg.train.micro_batch, cfg.train.seq_len))
    return Stage(model, split, stage, shape, torch.float64)


def theirs(run: Run, name: str, batches: list[Microbatch], valid: int) -> tuple[dict[str, Tensor], float]:
    """The gradients of this rank's parameters under torch's runtime, and the loss where the last stage is."""
    schedule, _ = THEIRS[name]
    pipeline, cfg = run.parts.pipeline, run.cfg
    modules = {stage: _make_stage(run, stage) for stage in pipeline.stages_of(run.mesh.axis("pp").rank)}
    hidden = torch.empty(batches[0].tokens.numel(), cfg.model.hidden, dtype=torch.float64, requires_grad=True)
    last = len(pipeline.placement) - 1
    stages = [
        PipelineStage(
            module,
            stage,
            last + 1,
            torch.device("cpu"),
            input_args=batches[0].tokens if stage == 0 else hidden,
            output_args=hidden,
        )
        for stage, module in modules.items()
    ]

    def loss_of(x: Tensor, labels: Tensor) -> Tensor:
        model = modules[last].model
        return model.head_op.loss(x, model.head_weight, labels.reshape(-1), 1.0 / valid)

    options: dict[str, Any] = {"n_microbatches": len(batches), "loss_fn": loss_of, "scale_grads": False}
    single = issubclass(schedule, schedules.PipelineScheduleSingle)
    runner = schedule(stages[0] if single else stages, **options)  # type: ignore[arg-type]
    losses: list[Tensor] = []
    tokens = torch.cat([batch.tokens for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    arguments = (tokens,) if 0 in modules else ()
    runner.step(*arguments, target=labels if last in modules else None, losses=losses, return_outputs=False)
    grads = {
        name: param.grad
        for module in modules.values()
        for name, param in module.model.named_parameters()
        if param.grad is not None
    }
    return grads, float(sum(losses)) if losses else float("nan")


def compare(rank: int, world: int, name: str, microbatches: int) -> tuple[dict[str, float], float, float]:
    """Relative distance of every gradient of this rank between the runtimes; the losses of both."""
    cfg = job(
        pp=world,
        pipeline={"schedule": name, "chunks": THEIRS[name][1]},
        model={"layers": LAYERS},
        optim="sgd",
        micro_batch=1,
        global_batch=microbatches,
    )
    run = Run(rank, cfg)
    try:
        batches, valid = run.batches(0)
        grads, loss = theirs(run, name, batches, valid)
        our_loss, _, skipped = run.step(0)
        assert not skipped
        distances = {}
        for param_name, param in run.parts.model.named_parameters():
            slot, grad = slot_of(param), grads.pop(param_name)
            assert slot is not None
            distances[param_name] = float((slot.buffer - grad).norm() / grad.norm())
        assert not grads, f"torch has gradients of {sorted(grads)}, Pentad has not"
        return distances, our_loss, loss
    finally:
        run.close()


@pytest.mark.parametrize(
    ("name", "ranks", "microbatches"),
    [(name, 2, 6) for name in THEIRS] + [("1f1b", 4, 8), ("interleaved", 4, 8), ("gis", 4, 8), ("zb-v", 4, 8)],
)
def test_gradients_equal_torch_pipelining(name: str, ranks: int, microbatches: int) -> None:
    found = run_distributed(compare, ranks, name, microbatches, group=False)
    distances = {key: value for each, *_ in found for key, value in each.items()}
    assert len({key.split(".")[1] for key in distances if key.startswith("layers.")}) == LAYERS
    worst = max(distances, key=lambda key: distances[key])
    assert distances[worst] < 1e-11, (worst, distances[worst])
    theirs_loss = next(loss for *_, loss in found if loss == loss)
    for _, our_loss, _ in found:
        assert our_loss == pytest.approx(theirs_loss, rel=1e-11)
