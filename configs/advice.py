"""What works, and probably not as it was meant: slower than it could be, or without effect. Said once, at the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

from .errors import Problem
from .output import hide
from .schema import Config
from .schema_parallel import PipelineConfig

Rule = Callable[[Config], list[Problem]]


def warnings(config: Config) -> list[Problem]:
    """Everything worth a warning about a resolved and valid configuration, the notes of its loading first."""
    found = [*config.origin.notes, *(problem for rule in RULES for problem in rule(config))]
    return [Problem(problem.key, hide(config, problem.message)) for problem in found]


def _context_method(config: Config) -> list[Problem]:
    """Methods of context parallelism that gain nothing under the job's placement of tokens."""
    m, p, context = config.model, config.parallel, config.parallel.context
    key = "parallel.context.method"
    if p.cp == 1 or context.method in ("allgather", "ulysses") or not 0 < len(m.linear_layers) < m.layers:
        return []
    message = (
        f"{context.method} with contiguous tokens, which linear attention needs, leaves the first ranks idle; "
        "allgather and ulysses are faster"
    )
    return [Problem(key, message)]


def _context_placement(config: Config) -> list[Problem]:
    p, context = config.parallel, config.parallel.context
    if p.cp == 1 or context.placement != "by_length" or context.method not in ("allgather", "ulysses"):
        return []
    message = (
        f"by_length saves nothing with parallel.context.method={context.method}, which sends the same wherever the "
        "documents are; ring does less"
    )
    return [Problem("parallel.context.placement", message)]


def _no_pipeline(config: Config) -> list[Problem]:
    """Keys of the pipeline in a job without one."""
    p = config.parallel
    plain = PipelineConfig(schedule="1f1b", chunks=1)
    named = [f.name for f in fields(plain) if getattr(p.pipeline, f.name) not in (None, getattr(plain, f.name))]
    if p.pp > 1 or not named:
        return []
    return [Problem("parallel.pipeline", f"{', '.join(named)} have no effect with parallel.pp=1")]


RULES: tuple[Rule, ...] = (_context_method, _context_placement, _no_pipeline)
"""Each looks at one thing; a new warning is a new function here."""
