"""Whether a job has the sizes of the program in the file that `parallel.pipeline.schedule` names."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ..errors import Problem, UserError
from ..reading.program_file import KEY, ProgramFrame, read_frame
from ..schema import Config

_OFFLOAD = "OFF"
"""Begins the operations that start an offload (`parallel.pipeline.needs`)."""
_SECTION = "parallel.pipeline"


def program_frame(config: Config) -> tuple[ProgramFrame | None, list[Problem]]:
    """The frame of the job's program file, and what is wrong with it or with the job beside it."""
    file = config.parallel.pipeline.schedule or ""
    if not os.path.exists(file):
        return None, []  # which `check_files` says, with the nearest one that does
    try:
        frame = read_frame(file)
    except UserError as error:
        return None, error.problems
    idle = [rank for rank in range(len(frame.ranks)) if rank not in frame.placement]
    if idle:
        return frame, [Problem(KEY, f"{file} has no stage on rank {idle[0]}; give every rank one")]
    return frame, [*_sizes(config, file, frame), *_vocabulary(config, file, frame), *_offloads(config, file, frame)]


def _sizes(config: Config, file: str, frame: ProgramFrame) -> Iterator[Problem]:
    p, t = config.parallel, config.train
    if p.pp != len(frame.ranks):
        ranks = len(frame.ranks)
        yield Problem("parallel.pp", f"{p.pp}, but {file} has {ranks} ranks; set parallel.pp={ranks}", (KEY,))
    unit = t.micro_batch * (p.dp or 1)
    if unit > 0 and t.global_batch % unit == 0 and t.global_batch // unit != frame.microbatches:
        message = (
            f"{t.global_batch} / (train.micro_batch={t.micro_batch} x parallel.dp={p.dp}) = {t.global_batch // unit} "
            f"microbatches, but {file} has {frame.microbatches}; set train.global_batch={frame.microbatches * unit}"
        )
        yield Problem("train.global_batch", message, (KEY, "train.micro_batch", "parallel.dp"))
    if p.pipeline.chunks != frame.chunks:
        message = f"{p.pipeline.chunks}, but a rank of {file} has {frame.chunks} stages; leave it out"
        yield Problem(f"{_SECTION}.chunks", message, (KEY,))
    if p.pipeline.group is not None:
        message = f"{file} has its order already, without groups, got {p.pipeline.group}; leave it out"
        yield Problem(f"{_SECTION}.group", message, (KEY,))


def _offloads(config: Config, file: str, frame: ProgramFrame) -> Iterator[Problem]:
    wanted, key = config.memory.offload_activations, "memory.offload_activations"
    count = sum(token.startswith(_OFFLOAD) for ops in frame.ranks for token in ops)
    if wanted != "none" and count:
        message = f"{wanted}, but {file} has {count} offloads of its own, to which none can be added; set {key}=none"
        yield Problem(key, message, (KEY,))


def _vocabulary(config: Config, file: str, frame: ProgramFrame) -> Iterator[Problem]:
    pipeline, barriers = config.parallel.pipeline, frame.vocab_barriers
    key = f"{_SECTION}.vocab"
    if (pipeline.vocab == "balanced") != (barriers > 0):
        theirs = "balanced" if barriers else "ends"
        message = f"{pipeline.vocab}, but {file} has vocab_barriers {barriers}; set {key}={theirs}"
        yield Problem(key, message, (KEY,))
    elif barriers not in (0, pipeline.vocab_barriers):
        message = f"{pipeline.vocab_barriers}, but {file} has {barriers}; set {key}_barriers={barriers}"
        yield Problem(f"{key}_barriers", message, (KEY,))
