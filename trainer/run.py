"""A whole job on one rank: set up, resume, train, save, leave."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..configs import Problem, UserError, as_dict, hide, to_yaml
from ..configs.reading.program_file import read_program_bytes
from ..configs.schema import Config
from ..configs.tables.imports import OPTION, missing_in_checkpoints
from ..configs.tables.schedules import is_program
from ..models.costs.flops import layer_windows
from ..models.hf.folder import to_stderr
from ..parallel.comm.collectives import all_reduce
from ..parallel.comm.mesh import Mesh
from ..parallel.comm.process_ids import ProcessId
from ..parallel.record import files
from ..parallel.record.device_clock import DeviceClock
from ..parallel.record.files import RingFile
from ..parallel.record.ring import Recorder
from ..parallel.record.stacks import show_stacks, stacks_file
from ..parallel.record.vitals import Heart
from .checkpoint.checkpointer import Checkpointer
from .checkpoint.hugging_face import load_initial
from .checkpoint.retention import Retention
from .data.dataset import Dataset, open_data
from .metrics.curves import draw_curves
from .metrics.introduction import introduction
from .metrics.notices import or_without, warn
from .metrics.page import write_page
from .metrics.peak import MeasuredPeaks, Peak, peak_tflops
from .metrics.probe import probe, probe_lines
from .metrics.products import ceiling_tflops, products_of
from .metrics.rows import RowExchange
from .metrics.sinks import EventLog, make_sinks
from .metrics.summary import summarize
from .metrics.waterfall_picture import draw_straggler_map, draw_waterfall
from .numerics.canary import canary, canary_lines, raise_if_wrong
from .processes.meeting import Stopped
from .processes.start import Start, soon
from .processes.watch import WatchRequest, between_nodes
from .run_folder import RunFile, checkpoint_folder, run_folder
from .session import Here, Session, row_exchange
from .setup import DTYPES, Ranks, make_recorder, prepare_device, record_stem
from .text.prompts import make_coder
from .text.samples import PromptSampler
from .text.tokenizer_files import TokenizerFiles, of_checkpoint, of_job
from .trainer import Outputs, Trainer

_WATCHER_S = 30.0
"""For the watcher to be there; it starts with the ranks, and is much faster."""


def run(cfg: Config, start: Start) -> int:
    """Runs the job on this rank.

    Args:
        cfg: resolved and validated for the number of ranks.
        start: how the rank was started.

    Returns:
        0 when training went to its end, `faults.stop_code` when it was stopped cleanly before.

    Raises:
        Exception: what ended the job on this rank; it was told to `start` before anything was closed.
    """
    ranks = Ranks.from_environment(start.env)
    with ExitStack() as open_things:
        try:
            here = arrive(cfg, start, ranks, open_things)
            finished = _in_mesh(cfg, start, ranks, here, open_things)
        except Exception as error:
            if not isinstance(error, Stopped):
                start.report(error, cfg)  # closing takes seconds, and makes other ranks fail
            raise
    return 0 if finished else cfg.faults.stop_code


def arrive(cfg: Config, start: Start, ranks: Ranks, open_things: ExitStack) -> Here:
    """Everything that can fail on one rank alone, before the mesh, in which the others would wait for it."""
    store = start.meeting.open(cfg.faults.timeout_s)
    device = prepare_device(cfg, ranks)
    if ranks.local_rank == 0:
        files.sweep()
    recorder = make_recorder(cfg, ranks)
    if device.type == "cuda":
        recorder.device = DeviceClock(partial(torch.cuda.Event, enable_timing=True))
    open_things.callback(recorder.close)
    request = _show_life(cfg, start, ranks, recorder, open_things)
    if request is not None and ranks.rank == 0:
        if store is not None and ranks.local_world < ranks.world:
            request = between_nodes(request, 0, store, "")
        start.watch(request)
    start.meeting.come(_about(cfg), cfg.faults.timeout_s)
    if request is not None and ranks.rank and store is not None:
        start.watch(between_nodes(request, ranks.rank, store, start.env.get("MASTER_ADDR", "")))
    if start.stop.requested:
        raise Stopped
    start.stop.listen()
    open_things.callback(start.stop.close)
    return Here(ranks.rank, store, device, recorder)


def _show_life(
    cfg: Config, start: Start, ranks: Ranks, recorder: Recorder, open_things: ExitStack
) -> WatchRequest | None:
    """Shows this rank's signs of life from now on; what the first rank of a node asks a watcher for."""
    heart = Heart(recorder.vitals)
    open_things.callback(heart.close)
    alone = ranks.world == 1 and "TORCHELASTIC_RUN_ID" not in start.env
    if not cfg.faults.watch or alone or recorder.path is None:
        return None
    start.vitals = recorder.vitals
    folder = files.record_folder(run_folder(cfg))
    open_things.callback(show_stacks(stacks_file(folder, ranks.rank), recorder.vitals))
    if ranks.local_rank:
        return None
    faults, run_dir = cfg.faults, str(run_folder(cfg).resolve())
    stem, limits = record_stem(cfg, ranks), (faults.alive_s, faults.hang_s, faults.pause_s)
    return WatchRequest(stem, run_dir, ranks.world, ranks.local_world, *limits, rank=ranks.rank)


def _about(cfg: Config) -> str:
    """What all ranks must have in common, as JSON."""
    parts: dict[str, object] = {
        "name": cfg.name,
        "model": cfg.model,
        "parallel": cfg.parallel,
        "train": cfg.train,
        "optim": cfg.optim,
    }
    if is_program(cfg.parallel.pipeline_in_use.schedule):
        parts["program"] = read_program_bytes(cfg.parallel.pipeline.schedule or "")  # each host has its own copy
    return json.dumps({key: hashlib.sha256(repr(part).encode()).hexdigest()[:8] for key, part in parts.items()})


def _in_mesh(cfg: Config, start: Start, ranks: Ranks, here: Here, open_things: ExitStack) -> bool:
    """Trains, and keeps the record; whether training went to its end."""
    run_dir, rings = run_folder(cfg), list[RingFile]()

    def met(mesh: Mesh) -> None:
        if start.vitals is not None and ranks.local_rank == 0:
            soon(lambda: here.recorder.vitals.watched, _WATCHER_S)  # what fails from here on is seen
        if mesh.is_first:
            _write_configs(run_dir, cfg, start.given)
        rings.extend(_index_record(run_dir, mesh, ranks.run_id))

    try:
        session = Session.open(
            cfg,
            range(ranks.world),
            0,
            here=here,
            met=met,
            data=partial(_open_data, cfg, here),
            peak=partial(_peak, cfg, here.device, MeasuredPeaks(run_dir / RunFile.PEAKS)),
            outer=open_things,
        )
        finished = _train(session, run_dir, start, row_exchange(session, rings, here.store))
        session.mesh.barrier()  # every ring is complete
        here.recorder.close()
        session.mesh.barrier()  # and says so: a copy of one that does not is of a rank that died
    except Exception as error:
        start.report(error, cfg)
        here.recorder.close()
        _keep_record(run_dir, ranks, rings)
        here.recorder.vitals.left()
        raise
    if ranks.local_rank == 0:
        with or_without(str(files.record_folder(run_dir))):
            files.collect(run_dir, rings, remove=True)
    return finished


def _open_data(cfg: Config, here: Here) -> Dataset:
    return open_data(
        cfg.data,
        seq_len=cfg.train.seq_len,
        vocab=cfg.model.used_vocab,
        seed=cfg.train.seed,
        windows=layer_windows(cfg.model),
        progress=here.rank == 0,
    )


def _train(session: Session, run_dir: Path, start: Start, rows: RowExchange) -> bool:
    cfg, mesh, parts = session.cfg, session.mesh, session.parts
    events = EventLog(run_dir / RunFile.EVENTS) if mesh.is_first else None

    def report(event: dict[str, Any]) -> None:
        if events is not None:
            events.log(**event)

    checkpointer = Checkpointer(
        checkpoint_folder(cfg),
        group=mesh.checkpoint_group,
        rank=mesh.rank,
        world=mesh.degrees.world,
        keep=Retention.of(cfg.checkpoint),
        asynchronous=cfg.checkpoint.asynchronous,
        on_event=report,
        abort=mesh.abort,
        recorder=mesh.recorder,
    )
    _try_out(session, rows, events)
    trainer = Trainer(session, checkpointer, run_dir=run_dir, rows=rows)
    found = checkpointer.find_resume(cfg.checkpoint.resume) if cfg.checkpoint.resume else None
    if found is not None:
        trainer.restore(found)
    elif cfg.checkpoint.init:
        init, upcycle, seed = Path(cfg.checkpoint.init), cfg.checkpoint.upcycle, cfg.train.seed
        notice = to_stderr if mesh.is_first else (lambda _: None)
        load_initial(init, parts, checkpointer, upcycle=upcycle, seed=seed, notice=notice)
    trainer.tokenizer = _tokenizer(cfg, found)
    checkpointer.beside = trainer.tokenizer.files
    if cfg.eval.prompts:
        coder = make_coder(trainer.tokenizer, f"data.name={cfg.data.name}")
        trainer.sampler = PromptSampler(cfg, mesh, parts.pipeline, trainer.stepper, coder, trainer.tokenizer.stops)
    outputs = None
    if mesh.is_first and events is not None:
        known = introduction(cfg, trainer.data, trainer.peak, device=trainer.device.type, apart=mesh.apart)
        lines = [*known, _beginning(cfg, trainer, found)]
        print(hide(cfg, "\n".join(lines)), flush=True)
        sinks = make_sinks(cfg.log, run_dir, as_dict(cfg), cfg.train.steps, trainer.step)
        outputs = Outputs(sinks, events)
        with or_without(f"{run_dir}/{RunFile.PROGRAM}"):
            (run_dir / RunFile.PROGRAM).write_text(trainer.program.to_json() + "\n")
        events.log("start", step=trainer.step, world=mesh.degrees.world, program=trainer.program.hash)
    began_at, finished = trainer.step, False
    try:
        finished = trainer.train(outputs, start.stop)
        if outputs is not None:
            outputs.events.log("end" if finished else "stopped", step=trainer.step)
    except Exception as error:
        start.report(error, cfg)  # before anything is closed, which takes its time
        raise
    finally:
        checkpointer.close()
        if outputs is not None:
            outputs.sinks.close()
            outputs.events.close()
    if outputs is not None:
        _close(cfg, run_dir, trainer.step, began_at, finished)
    return finished


def _try_out(session: Session, rows: RowExchange, events: EventLog | None) -> None:
    """What the job wants to know of its devices before it trains on them."""
    faults = session.cfg.faults
    if faults.numerics.canary:
        _canary(session, events)
    if faults.probe_at_start:
        _probe(session, rows, events)


def _probe(session: Session, rows: RowExchange, events: EventLog | None) -> None:
    """Tries out products and links; the first rank says what was found."""
    found = probe(session.mesh, session.device, DTYPES[session.cfg.train.dtype], rows.hosts)
    if events is not None:
        print("\n".join(probe_lines(found)), flush=True)
        events.log("probe", **found.event)


def _canary(session: Session, events: EventLog | None) -> None:
    """Ends the job if a rank computes other bits than the others."""
    found = canary(session.mesh, session.device, DTYPES[session.cfg.train.dtype])
    if events is not None:
        events.log("canary", kinds=found.kinds, suspects=list(found.suspects), found=list(found.lines))
    raise_if_wrong(found)
    if events is not None:
        print("\n".join(canary_lines(found)), flush=True)


def _tokenizer(cfg: Config, found: Path | None) -> TokenizerFiles:
    """Of the checkpoint that the run goes on from, else of the job."""
    kept = TokenizerFiles() if found is None else of_checkpoint(found)
    return of_job(cfg) if kept.kind == "none" else kept


def _beginning(cfg: Config, trainer: Trainer, found: Path | None) -> str:
    """Where the run starts from."""
    if found is not None:
        done = "; that is the last one: raise train.steps to go on" if trainer.step >= cfg.train.steps else ""
        missing = " ".join(f"{OPTION} {name}" for name in missing_in_checkpoints(found))
        without = f"; now without {missing}, so that what it added is not there" if missing else ""
        return f"resumed from {found} at step {trainer.step}{done}{without}"
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
    pictures = {
        "curves": (RunFile.CURVES, draw_curves),
        "waterfall": (RunFile.WATERFALL, draw_waterfall),
        "stragglers": (RunFile.STRAGGLERS, draw_straggler_map),
    }
    for name, (file, draw) in pictures.items():
        with or_without(f"{run_dir}/{file}"):
            picture = draw(run_dir)
            if picture is not None:
                print(f"{name} {picture}", flush=True)
    try:
        print(f"report {write_page([run_dir])}", flush=True)
    except Exception as error:  # whatever is wrong with a page, the training is done
        warn(f"{run_dir}/{RunFile.REPORT} cannot be written ({error}); pentad report {run_dir} tries again")


def _peak(cfg: Config, device: torch.device, kept: MeasuredPeaks, mesh: Mesh) -> Peak:
    """The peak of one device, and the ceiling of the model's products: measured unless the job names the peak itself of
    a CPU."""
    peak = _peak_alone(cfg, device, kept, mesh)
    if device.type == "cpu" and cfg.hardware.peak_tflops is not None:
        return peak
    own = ceiling_tflops(products_of(cfg), device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    total = all_reduce(torch.tensor([own], dtype=torch.float64, device=device), mesh.axis("world")).wait().item()
    return replace(peak, ceiling=total / mesh.degrees.world)


def _peak_alone(cfg: Config, device: torch.device, kept: MeasuredPeaks, mesh: Mesh) -> Peak:
    """The peak of one device; where it is measured, the mean over the ranks, so that all compute the same MFU.

    It is measured once in a run's life on the same kind of machine: a resumed run goes on with the same denominator.
    """
    world = mesh.axis("world")
    if device.type == "cpu" and cfg.hardware.peak_tflops is None:
        before = (kept.find(cfg.train.dtype, world.size) if mesh.is_first else None) or 0.0
        before = all_reduce(torch.tensor([before], dtype=torch.float64), world).wait().item()
        if before:
            return Peak(before, "measured when the run began")
    peak = peak_tflops(cfg.hardware, device, DTYPES[cfg.train.dtype], barrier=mesh.barrier)
    if peak.source != "measured" or peak.tflops is None:
        return peak
    total = all_reduce(torch.tensor([peak.tflops], dtype=torch.float64), world).wait()
    mean = total.item() / world.size
    if mesh.is_first:
        with or_without("the measured peak"):
            kept.keep(cfg.train.dtype, world.size, mean)
    return Peak(mean, peak.source)


def _write_configs(run_dir: Path, cfg: Config, given: str) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RunFile.CONFIG).write_text(given)
        (run_dir / RunFile.RESOLVED).write_text(to_yaml(cfg))
    except OSError as error:
        raise UserError(Problem("runs_dir", f"{run_dir} cannot be written ({error.strerror}); set runs_dir")) from error


def _index_record(run_dir: Path, mesh: Mesh, run_id: str) -> list[RingFile]:
    """Tells everybody who may look, while the job runs or after it died, where each rank's ring is."""
    mine = RingFile(mesh.rank, socket.gethostname(), str(mesh.recorder.path), os.getpid(), mesh.epoch)
    rings = mesh.gather_objects(mine)
    if mesh.is_first:
        files.write_index(run_dir, rings, run_id)
    return rings


def _keep_record(run_dir: Path, ranks: Ranks, rings: list[RingFile]) -> None:
    """After a failure every rank keeps its own ring, and those of its host's ranks that died without a word."""
    host = socket.gethostname()
    mine = [r for r in rings if r.rank == ranks.rank or (r.host == host and not ProcessId(r.pid).alive)]
    with suppress(OSError):  # a full disk is no reason to hide the failure
        files.collect(run_dir, mine, remove=True)
