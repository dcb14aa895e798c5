"""Everything that a rank does before it has a mesh, in which the others would wait for it."""

from __future__ import annotations

import hashlib
import json
import socket
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch

from ...configs.reading.program_file import read_program_bytes
from ...configs.schema import Config
from ...configs.tables.schedules import is_program
from ...parallel.record import files
from ...parallel.record.device_clock import DeviceClock
from ...parallel.record.ring import Recorder
from ...parallel.record.stacks import show_stacks, stacks_file
from ...parallel.record.vitals import Heart
from ..processes.meeting import Stopped
from ..processes.start import Start
from ..processes.watch import WatchRequest, between_nodes
from ..recovery.ways import Ladder
from ..run_folder import run_folder
from ..session import Here
from ..setup import Ranks, make_recorder, prepare_device, record_stem


def arrive(cfg: Config, start: Start, ranks: Ranks, open_things: ExitStack) -> Here:
    """Everything that can fail on one rank alone, before the mesh, in which the others would wait for it. Who comes
    later than the job began meets nobody here."""
    moved = start.membership.store if start.membership is not None else ""
    store = start.meeting.move(moved, cfg.faults.timeout_s)
    device = prepare_device(cfg, ranks)
    if ranks.local_rank == 0:
        files.sweep()
    recorder = make_recorder(cfg, ranks)
    if device.type == "cuda":
        recorder.device = DeviceClock(partial(torch.cuda.Event, enable_timing=True))
    open_things.callback(recorder.close)
    request = _show_life(cfg, start, ranks, recorder, open_things)
    if start.membership is not None and ranks.rank >= ranks.world:
        start.stop.listen()
        open_things.callback(start.stop.close)
        return Here(ranks.rank, store, device, recorder, _node(start))
    if request is not None and ranks.rank == 0:
        if store is not None and ranks.local_world < ranks.world:
            request = between_nodes(request, 0, store, *_meeting_point(start))
        start.watch(request)
    start.meeting.come(_about(cfg), cfg.faults.timeout_s)
    if request is not None and ranks.rank and store is not None:
        start.watch(between_nodes(request, ranks.rank, store, *_meeting_point(start)))
    if start.stop.requested:
        raise Stopped
    start.stop.listen()
    open_things.callback(start.stop.close)
    return Here(ranks.rank, store, device, recorder, _node(start))


def _meeting_point(start: Start) -> tuple[tuple[str, int], Path | None]:
    """Where the ranks meet, and the folder of a launcher that has started a watcher."""
    folder = start.membership.folder if start.membership is not None else None
    return (start.env.get("MASTER_ADDR", ""), int(start.env.get("MASTER_PORT", 0))), folder


def _node(start: Start) -> str:
    """By what the processes of a node know each other, where their memory outlives them."""
    return f"{socket.gethostname()} {start.membership.folder}" if start.membership is not None else ""


def _show_life(
    cfg: Config, start: Start, ranks: Ranks, recorder: Recorder, open_things: ExitStack
) -> WatchRequest | None:
    """Shows this rank's signs of life from now on; what the first rank of a node asks a watcher for."""
    heart = Heart(recorder.vitals, recorder.flush)
    recorder.hold()
    open_things.callback(recorder.release)
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
    ladder = Ladder.of(cfg) if start.membership is not None else Ladder()
    return WatchRequest(stem, run_dir, ranks.world, ranks.local_world, *limits, rank=ranks.rank, ladder=ladder)


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
