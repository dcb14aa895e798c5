"""How far a rank's state is. No torch here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ...configs.strict_json import expect_int, expect_number, expect_object, parse_json
from ..checkpoint.same_run import RunProgress

_COUNTS = ("step", "updates", "tokens", "skipped")


@dataclass(frozen=True)
class RunPoint:
    """The same on all ranks after the same step.

    Args:
        progress: of the run.
        evaluated: step and loss of the last evaluation; none: there was none, or its loss is no finite number.
        bad: steps in a row, up to this one, that were skipped.
    """

    progress: RunProgress
    evaluated: dict[str, Any] | None = None
    bad: int = 0

    @property
    def step(self) -> int:
        return self.progress.step

    def dump(self) -> bytes:
        """As JSON."""
        return json.dumps({**self.progress.as_dict(), "evaluated": self.evaluated, "bad": self.bad}).encode()

    @staticmethod
    def load(data: bytes) -> RunPoint:
        """What `dump` wrote.

        Raises:
            JsonError: it is something else.
        """
        found = expect_object(parse_json(data), "the point", (*_COUNTS, "evaluated", "bad"))
        evaluated = found["evaluated"]
        if evaluated is not None:
            known = expect_object(evaluated, "evaluated", ("step", "loss"))
            evaluated = {"step": expect_int(known["step"], "step"), "loss": expect_number(known["loss"], "loss")}
        progress = RunProgress(*(expect_int(found[name], name) for name in _COUNTS))
        return RunPoint(progress, evaluated, expect_int(found["bad"], "bad"))
