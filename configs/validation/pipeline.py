"""Checks of `parallel.pipeline`: what each schedule can do, and the layers of its stages."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config
from ..tables.schedules import schedule_problems
from ..vocabulary import padded

_SECTION = "parallel.pipeline"


def validate_pipeline(config: Config) -> list[Problem]:
    """Every problem of the resolved section that follows from the values alone."""
    if config.parallel.pp == 1:
        return []  # without effect, which is a warning (`advice.py`)
    return [*_schedule(config), *_vocab(config), *_layers(config), *_sharding(config)]


def _schedule(config: Config) -> list[Problem]:
    pipeline = config.parallel.pipeline
    return schedule_problems(
        pipeline.schedule or "",
        ranks=config.parallel.pp,
        chunks=1 if pipeline.chunks is None else pipeline.chunks,
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


def _layers(config: Config) -> list[Problem]:
    pp, pipeline, key = config.parallel.pp, config.parallel.pipeline, f"{_SECTION}.layers"
    given = pipeline.layers
    if isinstance(given, str):
        return []
    problems, stages = [], pp * (pipeline.chunks or 1)
    if len(given) != stages:
        message = (
            f"has {len(given)} counts, but parallel.pp={pp} x {_SECTION}.chunks={pipeline.chunks} are {stages} stages; "
            "give one count per stage, or auto"
        )
        problems.append(Problem(key, message, ("parallel.pp", f"{_SECTION}.chunks")))
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
    if p.data.sharding != "fsdp":
        return []
    message = (
        f"fsdp does not go with parallel.pp={p.pp}: every microbatch of every stage would gather its parameters "
        "again; set parallel.data.sharding=zero1 or parallel.pp=1"
    )
    return [Problem("parallel.data.sharding", message, ("parallel.pp",))]
