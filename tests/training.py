"""A small training run inside a test: any layout, synthetic text, the loss and grad-norm curve and the parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pentad.configs.resolve import resolve
from pentad.configs.schema import (
    AdamWConfig,
    CheckpointConfig,
    Config,
    ConstantSchedule,
    ContextConfig,
    DataParallelConfig,
    DeepSpeedConfig,
    EvalConfig,
    FaultsConfig,
    HardwareConfig,
    LogConfig,
    MemoryConfig,
    ModelConfig,
    NumericsConfig,
    OptimConfig,
    ParallelConfig,
    PipelineConfig,
    SgdConfig,
    StdlibData,
    TensorConfig,
    TrainConfig,
)
from pentad.parallel.comm.mesh import Mesh
from pentad.parallel.record.ring import Recorder
from pentad.trainer.checkpoint.checkpointer import Checkpointer
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.data.dataset import Dataset, Microbatch, open_data
from pentad.trainer.metrics.peak import Peak
from pentad.trainer.outcome import StepResult
from pentad.trainer.session import Here, Session
from pentad.trainer.setup import mesh_of
from pentad.trainer.trainer import Trainer
from tests.distributed import job_store

TINY = ModelConfig(
    layers=2,
    hidden=32,
    heads=4,
    kv_heads=4,
    head_dim=8,
    ffn=64,
    vocab=64,
    max_positions=32,
    init_std=0.1,
)


def job(
    *,
    model: dict[str, Any] | None = None,
    tp: int = 1,
    pp: int = 1,
    dp: int = 1,
    ep: int = 1,
    etp: int = 1,
    cp: int = 1,
    overlap: str = "none",
    context: dict[str, Any] | None = None,
    pipeline: dict[str, Any] | None = None,
    recompute: str = "none",
    offload: str | float = "none",
    group: int | None = None,
    memory: dict[str, Any] | None = None,
    sharding: str = "ddp",
    bucket_mib: float = 0.02,
    params: Any = None,
    per_node: int | None = None,
    grads: Any = None,
    states: Any = None,
    deepspeed: dict[str, Any] | None = None,
    optim: str | OptimConfig = "adamw",
    numerics: dict[str, Any] | None = None,
    **train: Any,
) -> Config:
    """A resolved config; `train` overrides keys of that section, `model` may hold a MoeConfig."""
    settings: dict[str, Any] = {"steps": 10, "global_batch": 8, "micro_batch": 2, "seq_len": 16, "dtype": "fp64"}
    schedule = ConstantSchedule()
    optims = {"adamw": AdamWConfig(lr=3e-3, schedule=schedule), "sgd": SgdConfig(lr=0.1, schedule=schedule)}
    config = Config(
        model=replace(TINY, **(model or {})),
        parallel=ParallelConfig(
            tp=tp,
            pp=pp,
            dp=dp,
            ep=ep,
            etp=etp,
            cp=cp,
            tensor=TensorConfig(overlap=overlap),  # type: ignore[arg-type]
            context=ContextConfig(**{"method": "allgather", "placement": "zigzag", **(context or {})}),
            data=DataParallelConfig(
                sharding=sharding,  # type: ignore[arg-type]
                bucket_mib=bucket_mib,
                params=params,
                grads=grads,
                states=states,
                deepspeed=DeepSpeedConfig(**(deepspeed or {})),
            ),
            pipeline=PipelineConfig(**{"schedule": "1f1b", "chunks": 1, **(pipeline or {})}),
        ),
        memory=MemoryConfig(
            **{"recompute": recompute, "offload_activations": offload, "group": group, **(memory or {})}
        ),
        train=TrainConfig(**{**settings, **train}),
        optim=optims[optim] if isinstance(optim, str) else optim,
        data=StdlibData(),
        eval=EvalConfig(),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
        faults=FaultsConfig(timeout_s=60, numerics=NumericsConfig(**(numerics or {}))),
        hardware=HardwareConfig(ranks_per_node=per_node),
    )
    return resolve(config)


def text(cfg: Config, step: int) -> np.ndarray:
    """(global_batch, seq_len + 1) tokens that a model can learn: walks with a few possible steps."""
    draws = np.random.default_rng([7, step])
    shape = (cfg.train.global_batch, cfg.train.seq_len + 1)
    return np.cumsum(draws.choice([1, 3, 3, 5], size=shape), axis=1) % cfg.model.used_vocab


def microbatches(cfg: Config, step: int, rank: int, size: int, *, masked: bool = False) -> list[Microbatch]:
    """Rank `rank` of `size`'s microbatches. `masked`: documents of uneven length, some labels without a loss."""
    whole, b = text(cfg, step), cfg.train.micro_batch
    batches = []
    for i in range(rank, cfg.train.global_batch // b, size):
        rows = torch.from_numpy(whole[i * b : (i + 1) * b].copy())
        tokens, labels = rows[:, :-1].contiguous(), rows[:, 1:].clone()
        positions = documents = None
        if masked:
            cuts = torch.from_numpy(np.random.default_rng([8, step, i]).random(tokens.shape) < 0.2)
            documents = torch.cumsum(cuts, dim=1, dtype=torch.int32)
            labels[:, :-1][cuts[:, 1:]] = -1
            column = torch.arange(tokens.shape[1]).expand_as(tokens)
            start = torch.where(cuts, column, 0).cummax(dim=1).values
            positions = column - start
        samples = torch.arange(i * b, (i + 1) * b) + step * cfg.train.global_batch
        batches.append(Microbatch(tokens, labels, positions, documents, samples, int((labels >= 0).sum()), 0))
    return batches


def world_of(cfg: Config) -> int:
    """Ranks of the job."""
    return cfg.parallel.ranks


def make_here(rank: int, cfg: Config, record: Path | None = None) -> Here:
    """This process, inside a worker of `run_distributed(…, group=False)` or alone."""
    world = world_of(cfg)
    recorder = Recorder(record, rank=rank, world=world, entries=4096)
    return Here(rank, job_store() if world > 1 else None, torch.device("cpu"), recorder)


def open_mesh(rank: int, cfg: Config, record: Path | None = None) -> Mesh:
    """The mesh of a test job without anything built on it."""
    here = make_here(rank, cfg, record)
    return mesh_of(cfg, store=here.store, rank=rank, device="cpu", recorder=here.recorder)


def open_session(rank: int, cfg: Config, record: Path | None = None, **given: Any) -> Session:
    """The first session of a test job; `given` goes to `Session.open`."""
    return Session.open(cfg, range(world_of(cfg)), 0, here=make_here(rank, cfg, record), **given)


def open_training(rank: int, cfg: Config, peak: Peak | None = None) -> Session:
    """The first session of a test job that reads its own data, for a `Trainer`."""

    def data() -> Dataset:
        train = cfg.train
        return open_data(cfg.data, seq_len=train.seq_len, vocab=cfg.model.used_vocab, seed=train.seed, progress=False)

    return open_session(rank, cfg, data=data, peak=lambda mesh: peak or Peak(None, ""))


def open_trainer(
    rank: int,
    cfg: Config,
    folder: Path,
    *,
    keep: int = 0,
    asynchronous: bool = False,
    on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    peak: Peak | None = None,
) -> tuple[Session, Trainer]:
    """A test job that trains in a folder, and its session, to be closed after its checkpointer."""
    session = open_training(rank, cfg, peak)
    checkpointer = Checkpointer(
        folder / "checkpoints",
        group=session.mesh.checkpoint_group,
        rank=rank,
        world=world_of(cfg),
        keep=Retention(keep),
        asynchronous=asynchronous,
        on_event=on_event,
    )
    return session, Trainer(session, checkpointer, run_dir=folder)


class Run:
    """A job set up on one rank, to be stepped by a test."""

    def __init__(
        self, rank: int, cfg: Config, *, masked: bool = False, record: Path | None = None, **given: Any
    ) -> None:
        self.cfg, self.masked = cfg, masked
        self.session = open_session(rank, cfg, record, **given)
        self.mesh, self.parts, self.stepper = self.session.mesh, self.session.parts, self.session.stepper
        self.optimizer = self.session.optimizer

    def step(self, step: int) -> tuple[float, float, float]:
        """(loss, grad norm, skipped) of one step."""
        result = self.issue(step)
        return float(result.loss), float(result.grad_norm), float(result.skipped)

    def issue(self, step: int) -> StepResult:
        """One step, its numbers still on the device."""
        return self.stepper.run(step, *self.batches(step), self.cfg.optim.lr)

    def batches(self, step: int) -> tuple[list[Microbatch], int]:
        """This rank's microbatches, and the valid tokens of the global batch."""
        dp = self.mesh.axis("dp")
        everyone = microbatches(self.cfg, step, 0, 1, masked=self.masked)
        mine = microbatches(self.cfg, step, dp.rank, dp.size, masked=self.masked)
        return mine, sum(b.valid for b in everyone)

    def close(self) -> None:
        self.session.close()


def curve(rank: int, world: int, cfg: Config, masked: bool = False) -> list[tuple[float, float, float]]:
    """(loss, grad norm, skipped) of every step of the job."""
    run = Run(rank, cfg, masked=masked)
    try:
        return [run.step(step) for step in range(cfg.train.steps)]
    finally:
        run.close()
