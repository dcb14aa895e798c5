"""The drawing of one step of a run, planned over real, for the page."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from ....configs.errors import UserError
from ....parallel.pipeline import draw
from ....parallel.record.reader import RecordError
from ...pipeline.real_step import RealStep, read_real_step

_MOST_BYTES = 1 << 20
_MOST_OPERATIONS = 40_000


def step_drawing(run: Path, step: int | None) -> dict[str, Any]:
    """`{"step", "svg"}`, or `{"why"}` where there is nothing to draw.

    Args:
        run: its folder.
        step: from 1; None: the last one of which the record has everything.

    Raises:
        UserError: the record does not hold the step that was asked for.
    """
    try:
        found = read_real_step(run, step)
    except (UserError, OSError, RecordError) as error:
        if step is not None:
            raise
        return {"why": " ".join(str(error).split())}
    if sum(map(len, found.planned.program.ranks)) > _MOST_OPERATIONS:
        return {"why": _too_large(run, found)}
    picture = draw.svg(found.planned, actual=found.actual, unit="s", title=f"step {found.step}, planned and real")
    # Titles of boxes are told from those of the same operation of other runs by nothing: they need no ids.
    if len(picture) > _MOST_BYTES:
        return {"why": _too_large(run, found)}
    return {"step": found.step, "svg": picture}


def _too_large(run: Path, found: RealStep) -> str:
    count = sum(1 for _ in itertools.chain(*found.planned.program.ranks))
    return f"step {found.step} has {count:,} operations, too many for a page: pentad schedule {run} --svg FILE draws it"
