"""Whether the host and the disk have room for the activations of a job, before it starts. No torch."""

from __future__ import annotations

import os

from ...configs.errors import Problem, UserError
from ...configs.schema import Config
from ...configs.tables.schedules import is_program
from ...parallel.pipeline.memory import ActivationBytes, slot_bytes
from ...parallel.pipeline.needs import Kinds
from ...parallel.pipeline.program_file import read_program
from ..memory.copies import copies_of
from .disk_tier import GIB
from .programs import Pipeline, offloads, training_program


def tier_problems(cfg: Config) -> list[Problem]:
    """What is wrong with `memory.host_gib` and `memory.offload_disk`; of a job without other problems."""
    folder, key = cfg.memory.offload_disk, "memory.offload_disk"
    schedule = cfg.parallel.pipeline_in_use.schedule
    if schedule is not None and is_program(schedule) and folder is None:
        program = read_program(schedule)
        if any(op.kind is Kinds.STORE for ops in program.ranks for op in ops):
            return [Problem(key, f"{schedule} stores activations on a disk; set {key} to a folder on it")]
    if cfg.memory.host_gib is None or not offloads(cfg):
        return []
    pipeline = Pipeline.of(cfg)
    copies = copies_of(cfg, pipeline)
    microbatches = cfg.train.global_batch // (cfg.train.micro_batch * cfg.parallel.dp)
    try:
        program = training_program(cfg, pipeline, microbatches, [1] * cfg.parallel.pp, copies)
    except UserError as error:
        return error.problems
    sizes = ActivationBytes(activation=copies.kept)
    needed, free = max(slot_bytes(program, sizes, "file")), _free(folder)
    if needed <= free:
        return []
    message = (
        f"{folder} has {free / GIB:.4g} GiB free, and one rank needs {needed / GIB:.4g}; free some, or set a larger "
        "memory.host_gib"
    )
    return [Problem(key, message)]


def _free(folder: str | None) -> float:
    if folder is None:
        return 0.0
    found = os.statvfs(folder)
    return float(found.f_bavail * found.f_frsize)
