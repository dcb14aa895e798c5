"""A job in another layout: `tp=1 pp=2 dp=3`, as overrides of its `parallel` section are written."""

from __future__ import annotations

from dataclasses import replace

from ..errors import Problem, UserError
from ..fields import flatten_schema, nearest_key, value_of, with_value
from ..resolve import resolve_parallel
from ..schema import Config
from ..schema_parallel import ParallelConfig
from ..sources import read_overrides
from .convert import WrongType, convert, expected

_DERIVED = (
    "pipeline.schedule",
    "pipeline.chunks",
    "pipeline.group",
    "context.method",
    "context.inner",
    "context.placement",
)
"""Keys of `parallel` that follow from others, in the order in which they do."""


def relaid(config: Config, layout: str) -> Config:
    """The resolved job with other values in its `parallel` section; `validate` says whether it can be.

    Keys that are as they would be derived are derived anew; all others stay, but the layouts to fall to, which are
    those of the job.

    Args:
        config: resolved.
        layout: overrides of `parallel`, apart by spaces, without that name: `pp=2 pipeline.schedule=1f1b dp=1`.

    Raises:
        UserError: it is something else; the problems have the keys `parallel.*`.
    """
    given = _given(layout)
    if not given:
        return config
    parallel = config.parallel
    for key in _DERIVED:
        if given.keys() - {"dp"} and key not in given:
            open_one = with_value(parallel, key, value_of(ParallelConfig(), key))
            if resolve_parallel(open_one, config.model) == resolve_parallel(parallel, config.model):
                parallel = open_one
    for key, value in given.items():
        parallel = with_value(parallel, key, value)
    memory = replace(config.memory, plan=None) if config.memory.recompute_is_planned else config.memory
    faults = replace(config.faults, layouts=())
    return replace(config, parallel=resolve_parallel(parallel, config.model), memory=memory, faults=faults)


def _given(layout: str) -> dict[str, object]:
    """The values, by keys within `parallel`."""
    keys, _ = flatten_schema({}, ParallelConfig)
    layer, problems = read_overrides([f"parallel.{piece}" for piece in layout.split()])
    found: dict[str, object] = {}
    for given in layer:
        key = given.key.removeprefix("parallel.")
        if key not in keys:
            near = nearest_key(key, keys)
            hint = (
                f"did you mean {near}?"
                if near
                else f"a layout has {', '.join(k for k in keys if '.' not in k)} and keys of sections"
            )
            problems.append(Problem(given.key, f"unknown key; {hint}"))
            continue
        try:
            found[key] = convert(keys[key], given.node)
        except WrongType as error:
            problems.append(Problem(given.key, expected(keys[key], given.node, str(error))))
    if problems:
        raise UserError(*problems)
    return found
