"""`pentad train`: from a config to running ranks, and back to one exit code."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...configs import Config, Problem, UserError, load
from ...configs.tables.imports import OPTION, import_arguments, import_modules
from ...trainer.__main__ import main as run_rank
from ...trainer.devices.visible import visible_gpus
from ...trainer.memory.plan import decided
from ...trainer.preflight import preflight
from ...trainer.processes.launchers import place
from ...trainer.run_folder import FRESH, claim, run_folder
from .supervisor import keep_record, supervise
from .worker_files import STOPPED

_MALLOC = "glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=17179869184"


_WORKER = "pentad.launch.supervise.worker"


def train(
    config: str, overrides: Sequence[str], *, fresh: bool = False, imports: Sequence[str] = (), worker: str = _WORKER
) -> int:
    """Runs a job: as one of its ranks under a launcher, otherwise all of them, on this machine.

    Args:
        config: a YAML file, or the name of a job that comes with Pentad.
        overrides: `key=value`.
        fresh: move an earlier run in the job's folder aside.
        imports: modules that this process and every rank imports before the config is read.
        worker: the module that is a rank.

    Returns:
        The exit code: 0 after the last step, `faults.stop_code` after a clean stop before it, 2 for a user's mistake,
        the failing rank's otherwise.

    Raises:
        UserError: what is wrong with the config, before anything is started.
    """
    if "RANK" in place(os.environ) or "RANK" in os.environ:
        options = [argument for name in imports for argument in (OPTION, name)]
        return run_rank([*([FRESH] if fresh else []), *options, config, *overrides])
    import_modules(imports)
    cfg = decided(load(config, overrides))
    preflight(cfg)
    ranks = world_size(cfg)
    cuda = uses_gpus(cfg, ranks)
    claim(cfg, fresh=fresh, config=config).close()  # rank 0 takes the folder again, and keeps it while it lives
    with tempfile.TemporaryDirectory(prefix="pentad-", dir=_memory() if cfg.faults.recover else None) as folder:
        command = [worker, folder, *import_arguments(), config, *overrides]
        try:
            environment = rank_environment(ranks, cuda=cuda)
            spares = cfg.faults.spares if cfg.faults.recover else None
            code = supervise(Path(folder), ranks, command, environment, watch=cfg.faults.watch, spares=spares)
            return code or (cfg.faults.stop_code if (Path(folder) / STOPPED).exists() else 0)
        finally:
            keep_record(run_folder(cfg), Path(folder))


def _memory() -> str | None:
    """A folder in memory, for the copies of the ranks' state; None: there is none, and they go to the usual one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def world_size(cfg: Config) -> int:
    """Ranks that the layout needs."""
    p = cfg.parallel
    return p.ranks


def uses_gpus(cfg: Config, ranks: int) -> bool:
    """Whether the job runs on GPUs.

    Raises:
        UserError: it should, and there are fewer than ranks.
    """
    wanted = cfg.train.device
    if wanted == "cpu":
        return False
    gpus = visible_gpus()
    if gpus >= ranks or (wanted == "auto" and gpus == 0):
        return gpus > 0
    p = cfg.parallel
    layout = f"parallel.tp={p.tp} x parallel.pp={p.pp} x parallel.cp={p.cp} x parallel.dp={p.dp}"
    message = f"{layout} needs {ranks} GPUs and {gpus} are visible; set smaller degrees, or train.device=cpu"
    raise UserError(Problem("train.device", message))


def rank_environment(ranks: int, *, cuda: bool) -> dict[str, str]:
    """The environment of the ranks: ours, and what has to be known before a process starts. The user's own wins.

    Threads: the machine's cores are shared out, since every rank would take all of them.

    Memory, on a CPU: glibc gives blocks above 32 MiB back to the kernel as soon as they are freed, so that every step
    gets its activations as fresh pages, which must be zeroed: for a 2-layer model of hidden size 512 at 8192 tokens
    439,000 page faults and 1.8 s of kernel time a step of 8.5 s. With higher thresholds they are reused: 4,000 faults
    and no kernel time, for a quarter more memory.
    """
    env = dict(os.environ)
    env.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // ranks)))
    if not cuda:
        env.setdefault("GLIBC_TUNABLES", _MALLOC)
    return env


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
