"""The layouts that a job is to fall to where ranks are lost: each is a job that could be started."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ..errors import Problem, UserError
from ..reading.layout import relaid
from ..schema import Config


def sized(config: Config, layout: str) -> Iterator[str]:
    """The layout with every size of data parallelism that fewer ranks than the job has allow, the largest first; only
    the one that it names itself, where it does.

    Raises:
        UserError: as of `relaid`.
    """
    inner = relaid(config, layout).parallel.model_ranks
    if any(piece.startswith("dp=") for piece in layout.split()):
        yield layout
        return
    for size in range((config.parallel.ranks - 1) // inner if inner > 0 else 0, 0, -1):
        yield f"{layout} dp={size}"


def layout_problems(config: Config, problems_of: Callable[[Config], list[Problem]]) -> list[Problem]:
    """What is wrong with `faults.layouts`.

    Args:
        config: resolved.
        problems_of: finds those of a whole job.
    """
    p = config.parallel
    if not config.faults.recover or p.dp is None or min(p.tp, p.pp, p.cp, p.dp) < 1:  # which is told elsewhere
        return []
    found = ((layout, _wrong(config, layout, problems_of)) for layout in config.faults.layouts)
    return [
        Problem("faults.layouts", f"{layout!r}: {wrong[0]}", tuple(k for p in wrong for k in p.keys))
        for layout, wrong in found
        if wrong
    ]


def _wrong(config: Config, layout: str, problems_of: Callable[[Config], list[Problem]]) -> list[Problem]:
    """Why a job cannot fall to a layout."""
    ranks = config.parallel.ranks
    first: list[Problem] = []
    try:
        for text in sized(config, layout):
            laid = relaid(config, text)
            problems = problems_of(laid)
            if not problems and laid.parallel.ranks < ranks:
                return []
            first = first or problems
        needed = relaid(config, layout).parallel.model_ranks
    except UserError as error:
        return error.problems
    few = f"needs {needed} ranks at least, and fewer than the job's {ranks} are left when it is wanted"
    return first or [Problem("", few)]
