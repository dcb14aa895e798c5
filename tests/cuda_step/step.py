"""One rank's training step on meta tensors."""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import torch

from pentad.configs.schema import Config
from pentad.parallel.record.ring import Recorder
from pentad.trainer import setup
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.devices import kernels
from pentad.trainer.optim.states import make_optimizer
from pentad.trainer.pipeline.programs import training_program
from pentad.trainer.setup import buckets_per_rank, make_model, mesh_of
from pentad.trainer.step import Stepper
from tests.cuda_step.trace import Answer, Trace, _no_answer, tracing

META = torch.device("meta")


def trace_step(cfg: Config, batch: Callable[[int], Microbatch], answer: Answer = _no_answer) -> Trace:
    """What one step of a job on one rank asks of its GPU.

    Args:
        cfg: the job.
        batch: makes a microbatch, by number.
        answer: as of `tracing`.
    """
    train = cfg.train
    recorder = Recorder(None, rank=0, world=1, entries=4096)
    mesh = mesh_of(cfg, store=None, rank=0, device="cpu", recorder=recorder)
    with (
        patch.object(setup, "initial_values", lambda *_: iter(())),
        patch.object(kernels, "triton_problem", lambda _: None),
    ):
        parts = make_model(cfg, mesh, META)
    optimizer = make_optimizer(cfg.optim, META)
    replicas = parts.replicas
    for bucket in range(replicas.buckets):
        for unit in replicas.units(bucket):
            optimizer.prepare(unit, replicas.shared(bucket))
    count = train.global_batch // train.micro_batch
    program = training_program(cfg, parts.pipeline, count, buckets_per_rank(replicas, mesh))
    stepper = Stepper(cfg, parts, optimizer, mesh, program)
    with tracing(answer) as trace:
        batches = [batch(i).pin() for i in range(count)]
        stepper.run(0, batches, sum(each.valid for each in batches), 1e-3)
    mesh.close()
    return trace
