"""Checks of `parallel.pipeline`: what each schedule can do, and the layers of its stages."""

from __future__ import annotations

from ..errors import Problem
from ..schema import Config
from ..schema_parallel import BALANCED, GROUPED, ONE_CHUNK, VEE
from ..vocabulary import padded

_SECTION = "parallel.pipeline"


def validate_pipeline(config: Config) -> list[Problem]:
    """Every problem of the resolved section that follows from the values alone."""
    if config.parallel.pp == 1:
        return []  # without effect, which is a warning (`advice.py`)
    return [*_chunks(config), *_vocab(config), *_group(config), *_layers(config), *_sharding(config)]


def _chunks(config: Config) -> list[Problem]:
    pipeline = config.parallel.pipeline
    schedule, chunks, key = pipeline.schedule, pipeline.chunks or 1, f"{_SECTION}.chunks"
    if schedule in ONE_CHUNK and chunks != 1:
        message = (
            f"{_SECTION}.schedule={schedule} has 1 chunk per rank, got {chunks}; set {key}=1 or {_SECTION}.schedule=gis"
        )
        return [Problem(key, message, (f"{_SECTION}.schedule",))]
    if schedule in VEE and chunks != 2:
        message = f"{_SECTION}.schedule={schedule} has 2 chunks per rank, got {chunks}; set {key}=2"
        return [Problem(key, message, (f"{_SECTION}.schedule",))]
    return []


def _vocab(config: Config) -> list[Problem]:
    p, pipeline, vocab = config.parallel, config.parallel.pipeline, config.model.vocab
    if pipeline.vocab != "balanced":
        return []
    key, problems = f"{_SECTION}.vocab", []
    if pipeline.schedule not in BALANCED:
        message = (
            f"balanced has no passes for {_SECTION}.schedule={pipeline.schedule}, only for "
            f"{', '.join(sorted(BALANCED))}; set {key}=ends or one of these schedules"
        )
        problems.append(Problem(key, message, (f"{_SECTION}.schedule",)))
    ranks = p.tp * p.pp
    # A vocabulary that parallel.tp alone does not divide is another check's problem.
    if vocab is not None and ranks > 0 and vocab % ranks and vocab % p.tp == 0:
        message = (
            f"{vocab} is not a multiple of parallel.tp={p.tp} x parallel.pp={p.pp} = {ranks} "
            f"({key}=balanced splits it over both); set model.vocab={padded(vocab, ranks)}: weights that start the run "
            f"are padded, and an export is cut; or {key}=ends"
        )
        problems.append(Problem("model.vocab", message, ("parallel.tp", "parallel.pp", key)))
    return problems


def _group(config: Config) -> list[Problem]:
    pp, pipeline = config.parallel.pp, config.parallel.pipeline
    schedule, group, key = pipeline.schedule, pipeline.group, f"{_SECTION}.group"
    if group is None:
        return []
    if schedule not in GROUPED:
        message = (
            f"only gis and interleaved have groups, not {_SECTION}.schedule={schedule}, got {group}; set it to null"
        )
        return [Problem(key, message, (f"{_SECTION}.schedule",))]
    low, high = (-(-pp // 2), pp) if schedule == "gis" else (pp, None)
    if group >= low and (high is None or group <= high):
        return []
    allowed = f"at least parallel.pp={pp}" if high is None else f"from {low} to parallel.pp={pp}"
    message = f"must be {allowed} for {_SECTION}.schedule={schedule}, got {group}; set {key}={pp} or null"
    return [Problem(key, message, ("parallel.pp", f"{_SECTION}.schedule"))]


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
