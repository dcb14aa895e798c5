"""A whole job on one rank: set up, resume, train, save, leave."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..configs import Problem, UserError, as_dict, to_yaml
from ..configs.schema import Config
from ..models.flops import layer_windows
from ..models.hf import to_stderr
from ..parallel import record_view
from ..parallel.collectives import all_reduce
from ..parallel.mesh import Mesh
from .checkpoint import Checkpointer
from .curves import draw_curves
from .data.dataset import open_data
from .hf_io import load_initial
from .introduction import introduction
from .peak import MeasuredPeaks, Peak, peak_tflops
from .setup import DTYPES, Ranks, make_mesh, make_model, prepare_device
from .signals import StopRequest
from .sinks import EventLog, make_sinks
from .summary import summarize
from .trainer import Outputs, Trainer


def run(cfg: Config, given: str) -> int:
    """Runs the job on this rank.

    Args:
        cfg: resolved and validated for the number of ranks.
        given: the configuration as the user gave it, kept beside the resolved one.

    Returns:
        0 when training went to its end or stopped cleanly.
    """
    ranks = Ranks.from_environment()
    stop = StopRequest().listen()
    device = prepare_device(cfg, ranks)
    run_dir = Path(cfg.runs_dir) / cfg.name
    mesh = make_mesh(cfg, ranks, device)
    try:
        if mesh.is_first:
            _write_configs(run_dir, cfg, given)
        _index_record(run_dir, mesh)
        _train(cfg, mesh, device, run_dir, stop)
        _barrier(mesh)  # every ring is complete
        if ranks.local_rank == 0:
            record_view.collect(run_dir, remove=True)
    finally:
        mesh.recorder.close()
        mesh.close()
        stop.close()
    return 0


def _train(cfg: Config, mesh: Mesh, device: torch.device, run_dir: Path, stop: StopRequest) -> None:
    data = open_data(
        cfg.data,
        seq_len=cfg.train.seq_len,
        vocab=cfg.model.used_vocab,
        seed=cfg.train.seed,
        windows=layer_windows(cfg.model),
        progress=mesh.is_first,
    )
    parts = make_model(cfg, mesh, device)
    events = EventLog(run_dir / "events.jsonl") if mesh.is_first else None

    def report(event: dict[str, Any]) -> None:
        if events is not None:
            events.log(**event)

    checkpointer = Checkpointer(
        Path(cfg.checkpoint.dir or run_dir / "checkpoints"),
        group=mesh.checkpoint_group,
        rank=mesh.rank,
        world=mesh.degrees.world,
        keep=cfg.checkpoint.keep,
        asynchronous=cfg.checkpoint.asynchronous,
        on_event=report,
        abort=mesh.abort,
    )
    peak = _peak(cfg, mesh, device, MeasuredPeaks(run_dir / "peaks.json"))
    trainer = Trainer(cfg, mesh, parts, data, checkpointer, peak=peak, run_dir=run_dir)
    found = checkpointer.find_resume(cfg.checkpoint.resume) if cfg.checkpoint.resume else None
    if found is not None:
        trainer.restore(found)
    elif cfg.checkpoint.init:
        init = Path(cfg.checkpoint.init)
        notice = to_stderr if mesh.is_first else (lambda _: None)
        upcycle, seed = cfg.checkpoint.upcycle, cfg.train.seed
        load_initial(init, parts, checkpointer, upcycle=upcycle, seed=seed, notice=notice)
    outputs = None
    if mesh.is_first and events is not None:
        print("\n".join([*introduction(cfg, trainer, peak), _beginning(cfg, trainer, found)]), flush=True)
        sinks = make_sinks(cfg.log, run_dir, as_dict(cfg), cfg.train.steps, trainer.step)
        outputs = Outputs(sinks, events)
        (run_dir / "program.json").write_text(trainer.program.to_json() + "\n")
        events.log("start", step=trainer.step, world=mesh.degrees.world, program=trainer.program.hash)
    began_at, finished = trainer.step, False
    try:
        finished = trainer.train(outputs, stop)
        if outputs is not None:
            outputs.events.log("end" if finished else "stopped", step=trainer.step)
    finally:
        checkpointer.close()
        if outputs is not None:
            outputs.sinks.close()
            outputs.events.close()
    if outputs is not None:
        _close(cfg, run_dir, trainer.step, began_at, finished)


def _beginning(cfg: Config, trainer: Trainer, found: Path | None) -> str:
    """Where the run starts from."""
    if found is not None:
        done = "; that is the last one: raise train.steps to go on" if trainer.step >= cfg.train.steps else ""
        return f"resumed from {found} at step {trainer.step}{done}"
    if cfg.checkpoint.init:
        made = ", its experts made of the dense model there" if cfg.checkpoint.upcycle else ""
        return f"starting at step 0 with the weights of {cfg.checkpoint.init}{made}"
    none = f"; {cfg.checkpoint.resume} found no checkpoint" if cfg.checkpoint.resume else ""
    return f"starting at step 0 with random weights (train.seed={cfg.train.seed}){none}"


def _close(cfg: Config, run_dir: Path, step: int, began_at: int, finished: bool) -> None:
    """What the run came to, on the console and as a picture."""
    if not finished:
        print(f"stopped after step {step} of {cfg.train.steps}; go on with checkpoint.resume=latest", flush=True)
    if step == began_at:
        return
    print("\n".join(summarize(run_dir)), flush=True)
    picture = draw_curves(run_dir)
    if picture is not None:
        print(f"curves {picture}", flush=True)


def _peak(cfg: Config, mesh: Mesh, device: torch.device, kept: MeasuredPeaks) -> Peak:
    """The peak of one device; where it is measured, the mean over the ranks, so that all compute the same MFU.

    It is measured once in a run's life on the same kind of machine: a resumed run goes on with the same denominator.
    """
    world = mesh.axis("world")
    if device.type == "cpu" and cfg.hardware.peak_tflops is None:
        before = (kept.find(cfg.train.dtype, world.size) if mesh.is_first else None) or 0.0
        before = all_reduce(torch.tensor([before], dtype=torch.float64), world).wait().item()
        if before:
            return Peak(before, "measured when the run began")
    peak = peak_tflops(cfg.hardware, device, DTYPES[cfg.train.dtype], barrier=lambda: _barrier(mesh))
    if peak.source != "measured" or peak.tflops is None:
        return peak
    total = all_reduce(torch.tensor([peak.tflops], dtype=torch.float64), world).wait()
    mean = total.item() / world.size
    if mesh.is_first:
        kept.keep(cfg.train.dtype, world.size, mean)
    return Peak(mean, peak.source)


def _barrier(mesh: Mesh) -> None:
    if mesh.degrees.world > 1:
        dist.barrier(mesh.host_group)


def _write_configs(run_dir: Path, cfg: Config, given: str) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(given)
        (run_dir / "config.resolved.yaml").write_text(to_yaml(cfg))
    except OSError as error:
        raise UserError(Problem("runs_dir", f"{run_dir} cannot be written ({error.strerror}); set runs_dir")) from error


def _index_record(run_dir: Path, mesh: Mesh) -> None:
    """Tells everybody who may look, while the job runs or after it died, where each rank's ring is."""
    mine = record_view.RingFile(mesh.rank, socket.gethostname(), str(mesh.recorder.path), os.getpid(), mesh.epoch)
    rings = [mine] * mesh.degrees.world
    if mesh.degrees.world > 1:
        dist.all_gather_object(rings, mine, group=mesh.host_group)
    if mesh.is_first:
        record_view.write_index(run_dir, rings)
