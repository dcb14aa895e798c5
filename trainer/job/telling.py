"""What a run says at its beginning and its end, and what it leaves in its folder."""

from __future__ import annotations

import json
import os
import socket
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ...configs import Problem, UserError, to_yaml
from ...configs.schema import Config
from ...configs.tables.imports import OPTION, missing_in_checkpoints
from ...parallel.comm.mesh import Mesh
from ...parallel.comm.process_ids import ProcessId
from ...parallel.record import files
from ...parallel.record.files import RingFile
from ..metrics.curves import draw_curves
from ..metrics.notices import or_without, warn
from ..metrics.page import write_page
from ..metrics.summary import summarize
from ..metrics.waterfall_picture import draw_straggler_map, draw_waterfall
from ..run_folder import RunFile
from ..setup import Ranks
from ..trainer import Trainer

if TYPE_CHECKING:
    import torch.distributed as dist


def beginning(cfg: Config, trainer: Trainer, found: Path | None) -> str:
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


def conclude_run(cfg: Config, run_dir: Path, step: int, began_at: int, finished: bool) -> None:
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


def write_configs(run_dir: Path, cfg: Config, given: str) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / RunFile.CONFIG).write_text(given)
        (run_dir / RunFile.RESOLVED).write_text(to_yaml(cfg))
    except OSError as error:
        raise UserError(Problem("runs_dir", f"{run_dir} cannot be written ({error.strerror}); set runs_dir")) from error


def index_record(run_dir: Path, mesh: Mesh, number: int, run_id: str, store: dist.Store | None) -> list[RingFile]:
    """Tells everybody who may look, while the job runs or after it died, where the ring of each slot's process is.

    Returns:
        Those of this rank's host; on the first rank all.
    """
    host = socket.gethostname()
    mine = RingFile(mesh.rank, host, str(mesh.recorder.path), os.getpid(), mesh.epoch, number)
    key = f"rings-{mesh.epoch}/{host}"
    if store is not None and mesh.degrees.world > 1:
        store.append(key, f"{json.dumps(asdict(mine))}\n")  # pyright: ignore[reportAttributeAccessIssue]
    rings = mesh.gather_on_first(mine)
    if mesh.is_first:
        files.write_index(run_dir, rings, run_id)
        return rings
    assert store is not None
    near = [RingFile(**json.loads(line)) for line in store.get(key).decode().splitlines()]
    return sorted(near, key=lambda ring: ring.rank)


def keep_own_record(run_dir: Path, ranks: Ranks, rings: list[RingFile]) -> None:
    """After a failure every rank keeps its own ring, and those of its host's ranks that died without a word."""
    host = socket.gethostname()
    mine = [r for r in rings if r.rank == ranks.rank or (r.host == host and not ProcessId(r.pid).alive)]
    with suppress(OSError):  # a full disk is no reason to hide the failure
        files.collect(run_dir, mine, remove=True)
