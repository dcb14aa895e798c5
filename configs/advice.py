"""What works, and probably not as it was meant: slower than it could be, or without effect. Said once, at the start."""

from __future__ import annotations

from collections.abc import Callable

from .errors import Problem
from .fields import value_of, with_value
from .inert import inert_keys
from .output import hide
from .resolve import resolve
from .schema import Config
from .tables.context_methods import CONTEXT_METHODS

Rule = Callable[[Config], list[Problem]]


def warnings(config: Config) -> list[Problem]:
    """Everything worth a warning about a resolved and valid configuration, the notes of its loading first."""
    found = [*config.origin.notes, *(problem for rule in RULES for problem in rule(config))]
    return [Problem(problem.key, hide(config, problem.message)) for problem in found]


def _context_method(config: Config) -> list[Problem]:
    """Methods of context parallelism that gain nothing under the job's placement of tokens."""
    m, p, context = config.model, config.parallel, config.parallel.context
    key = "parallel.context.method"
    if p.cp == 1 or not CONTEXT_METHODS[context.method].relays or not 0 < len(m.linear_layers) < m.layers:
        return []
    message = (
        f"{context.method} with contiguous tokens, which linear attention needs, leaves the first ranks idle; "
        "allgather and ulysses are faster"
    )
    return [Problem(key, message)]


def _context_placement(config: Config) -> list[Problem]:
    p, context = config.parallel, config.parallel.context
    if p.cp == 1 or context.placement != "by_length" or CONTEXT_METHODS[context.method].relays:
        return []
    message = (
        f"by_length saves nothing with parallel.context.method={context.method}, which sends the same wherever the "
        "documents are; ring does less"
    )
    return [Problem("parallel.context.placement", message)]


def _inert(config: Config) -> list[Problem]:
    """Keys that the user wrote and that change nothing, in one line."""
    reasons, origin = inert_keys(config), config.origin
    if not any(key in reasons for key in origin.given):
        return []
    without = config
    for key in set(reasons) & set(origin.otherwise):
        without = with_value(without, key, origin.otherwise[key])
    without = resolve(without)
    named: dict[str, list[str]] = {}
    for key in origin.given:
        if key in reasons and key in origin.otherwise and value_of(config, key) != value_of(without, key):
            named.setdefault(reasons[key], []).append(key)
    parts = [
        f"{', '.join(keys)} {'have' if len(keys) > 1 else 'has'} no effect with {why}" for why, keys in named.items()
    ]
    return [Problem("", "; ".join(parts))] if parts else []


RULES: tuple[Rule, ...] = (_context_method, _context_placement, _inert)
"""Each looks at one thing; a new warning is a new function here."""
