"""Checks of `parallel.pipeline`: what each schedule can do, and the layers of its stages."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config
from ..tables.schedules import is_program, schedule_problems
from ..vocabulary import padded
from .program_file import program_frame

_SECTION = "parallel.pipeline"


def validate_pipeline(config: Config) -> list[Problem]:
    """Every problem of the resolved section that follows from the values alone."""
    if config.parallel.pp == 1:
        return []  # without effect, which is a warning (`advice.py`)
    found = [*_vocab(config), *_sharding(config)]
    p = config.parallel
    if not is_program(p.pipeline.schedule):
        stages = p.pp * p.pipeline.chunks
        return [
            *_schedule(config),
            *_layers(config, stages, f"parallel.pp={p.pp} x {_SECTION}.chunks={p.pipeline.chunks} are"),
            *found,
        ]
    frame, problems = program_frame(config)
    if frame is not None:
        problems += _layers(config, len(frame.placement), f"{p.pipeline.schedule} has")
    return problems + found


def _schedule(config: Config) -> list[Problem]:
    pipeline = config.parallel.pipeline
    return schedule_problems(
        pipeline.schedule,
        ranks=config.parallel.pp,
        chunks=pipeline.chunks,
        group=pipeline.group,
        barriers=pipeline.vocab_barriers if pipeline.vocab == "balanced" else None,
    )


def _vocab(config: Config) -> list[Problem]:
    p, vocab, key = config.parallel, config.model.vocab, f"{_SECTION}.vocab"
    if p.pipeline.vocab != "balanced":
        return []
    ranks = p.tp * p.pp
    # A vocabulary that parallel.tp alone does not divide is another check's problem.
    if vocab is None or ranks < 1 or vocab % ranks == 0 or vocab % p.tp:
        return []
    message = (
        f"{vocab} is not a multiple of parallel.tp={p.tp} x parallel.pp={p.pp} = {ranks} "
        f"({key}=balanced splits it over both); set model.vocab={padded(vocab, ranks)}: weights that start the run "
        f"are padded, and an export is cut; or {key}=ends"
    )
    return [Problem("model.vocab", message, ("parallel.tp", "parallel.pp", key))]


def _layers(config: Config, stages: int, why: str) -> list[Problem]:
    pipeline, key = config.parallel.pipeline, f"{_SECTION}.layers"
    given = pipeline.layers
    if isinstance(given, str):
        return []
    problems = []
    if len(given) != stages:
        message = f"has {len(given)} counts, but {why} {stages} stages; give one count per stage, or auto"
        problems.append(Problem(key, message, ("parallel.pp", f"{_SECTION}.chunks", f"{_SECTION}.schedule")))
    if any(count < 0 for count in given):
        problems.append(Problem(key, f"counts must be at least 0, got {list(given)}"))
    elif sum(given) != config.model.layers:
        message = (
            f"{list(given)} sums to {sum(given)}, but model.layers={config.model.layers}; change the counts, or auto"
        )
        problems.append(Problem(key, message, ("model.layers",)))
    return problems


def _sharding(config: Config) -> list[Problem]:
    p = config.parallel
    if p.data.sharding != "fsdp2":
        return []
    message = (
        f"fsdp2 does not go with parallel.pp={p.pp}: every microbatch of every stage would gather its parameters "
        "again; set parallel.data.sharding=zero1 or parallel.pp=1"
    )
    return [Problem("parallel.data.sharding", message, ("parallel.pp",))]
