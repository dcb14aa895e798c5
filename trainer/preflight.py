"""What a job needs from the machine that it starts on, looked at before any rank starts; without torch, unless the
job needs a GPU.

`pentad check` and `pentad train` ask the same questions, so that what the one accepts the other starts. Values of keys
that contradict each other are found earlier, by `configs.load`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from ..configs.advice import warnings
from ..configs.errors import Problem, UserError
from ..configs.output import hide
from ..configs.schema import Config, LogConfig
from ..configs.tables.schedules import is_program
from ..parallel.pipeline.program_file import read_program
from .checkpoint.check import checkpoint_problems
from .data.preflight import data_problems
from .devices.visible import missing_devices
from .pipeline.disk_space import tier_problems
from .pipeline.stage_layers import empty_stages
from .text.prompts import prompt_problems
from .text.tokenizer_files import of_job

_PACKAGES = {
    "log.wandb": ("wandb", "wandb", "false"),
    "log.tensorboard": ("tensorboard", "tensorboard", "false"),
    "log.prometheus": ("prometheus_client", "prometheus", "null"),
}
"""Key: the package that it needs, the extra of ours that installs it, and the value that does without."""


def preflight(cfg: Config, *, memory: bool = True) -> None:
    """Looks for everything that would stop the job soon after its start, and prints the warnings of one that starts.

    Args:
        cfg: resolved and valid.
        memory: also compare its memory with the device's, where `hardware.memory_gib` is known.

    Raises:
        UserError: every problem found.
    """
    problems = [
        *missing_packages(cfg.log),
        *_no_deepspeed(cfg),
        *missing_devices(cfg),
        *_folders(cfg),
        *_disk(cfg),
        *data_problems(cfg),
    ]
    problems += [*checkpoint_problems(cfg), *_program_problems(cfg)]
    if not problems:
        problems += tier_problems(cfg)
    if not problems:  # it reads what these have found to be good
        problems += _tokenizer_problems(cfg)
    if problems:
        raise UserError(*(Problem(p.key, hide(cfg, p.message)) for p in problems))
    for warning in [*warnings(cfg), *empty_stages(cfg)]:
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    if memory and (problems := memory_preflight(cfg)):
        raise UserError(*problems)


def memory_preflight(cfg: Config) -> list[Problem]:
    """Why the job cannot fit into `hardware.memory_gib`; where it may not, that is printed as a warning."""
    if cfg.hardware.memory_gib is None:
        return []
    from .memory.fit import memory_findings  # after everything that needs no torch

    problems, doubts = memory_findings(cfg)
    for doubt in doubts:
        print(f"warning: {doubt}", file=sys.stderr, flush=True)
    return problems


def _program_problems(cfg: Config) -> list[Problem]:
    """Why the program in a file cannot run."""
    schedule = cfg.parallel.pipeline_in_use.schedule
    if schedule is None or not is_program(schedule):
        return []
    try:
        read_program(schedule)
    except UserError as error:
        return error.problems
    return []


def _tokenizer_problems(cfg: Config) -> list[Problem]:
    """What is wrong with the tokenizer that the run's checkpoints will have, or with prompts for it."""
    try:
        return prompt_problems(cfg, of_job(cfg))
    except UserError as error:
        return error.problems


def missing_packages(cfg: LogConfig) -> list[Problem]:
    """The trackers that are asked for and not installed."""
    wanted = {"log.wandb": cfg.wandb, "log.tensorboard": cfg.tensorboard, "log.prometheus": cfg.prometheus}
    return [
        Problem(key, f"is set, but {package} is not installed; install pentad[{extra}] or set {key}={without}")
        for key, (package, extra, without) in _PACKAGES.items()
        if wanted[key] and importlib.util.find_spec(package) is None
    ]


def _no_deepspeed(cfg: Config) -> list[Problem]:
    """That DeepSpeed is asked for and not installed."""
    key = "parallel.data.sharding"
    if cfg.parallel.data.sharding != "deepspeed" or importlib.util.find_spec("deepspeed") is not None:
        return []
    return [Problem(key, "is deepspeed, which is not installed; install pentad[deepspeed] or set zero1 or fsdp")]


def _folders(cfg: Config) -> list[Problem]:
    """Folders that are to be written and cannot be."""
    run = Path(cfg.runs_dir) / cfg.name
    folders = {"runs_dir": run}
    if cfg.checkpoint.dir is not None and run not in Path(cfg.checkpoint.dir).parents:
        folders["checkpoint.dir"] = Path(cfg.checkpoint.dir)
    if cfg.checkpoint.local.dir is not None:
        folders["checkpoint.local.dir"] = Path(cfg.checkpoint.local.dir)
    return [problem for key, folder in folders.items() if (problem := _unwritable(key, folder)) is not None]


def _disk(cfg: Config) -> list[Problem]:
    """What is wrong with the folder for what goes to a disk, and whether it has room for masters and moments."""
    if cfg.memory.offload_disk is None:
        return []
    folder, key = Path(cfg.memory.offload_disk), "memory.offload_disk"
    if not folder.is_dir():
        return [Problem(key, f"there is no folder {folder}; make it, or set another one on a disk of the node")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Problem(key, f"{folder} is read-only for this user; set another folder")]
    if cfg.memory.offload_optimizer != "disk":
        return []
    from .memory.estimate import per_rank

    found = os.statvfs(folder)
    free, needed = found.f_bavail * found.f_frsize, max(memory.held.disk for memory in per_rank(cfg))
    if needed > free:
        gib = f"{needed / 2**30:.3g} GiB of masters and moments, and {free / 2**30:.3g} GiB are free"
        return [Problem(key, f"{folder} is to take a rank's {gib}; set another folder, or more ranks")]
    return []


def _unwritable(key: str, folder: Path) -> Problem | None:
    """Why nothing can be written into a folder that may not exist yet; nothing is made to find out."""
    existing = folder.absolute()
    while not os.path.lexists(existing):
        existing = existing.parent
    if not existing.is_dir():
        return Problem(key, f"{folder} cannot be written: {existing} is not a folder; set {key}")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Problem(key, f"{folder} cannot be written: {existing} is read-only for this user; set {key}")
    return None
