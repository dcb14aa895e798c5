"""`pentad check`: whether a job would start, and what it is and needs, without any device and without torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ...configs import UserError, load
from ...trainer.memory.plan import decided
from ...trainer.preflight import memory_preflight, preflight
from ...trainer.run_folder import used_folder
from .check_report import print_job


def check(config: str, overrides: Sequence[str], picture: Path | None = None) -> None:
    """Validates a job and prints its layout, parameters, FLOPs per token and memory per rank.

    Args:
        config: a file, or a job that comes with pentad.
        overrides: key=value.
        picture: where the memory of its ranks is drawn, as SVG.

    Raises:
        UserError: every problem found. What only its memory is against is printed all the same.
    """
    cfg = decided(load(config, overrides))
    preflight(cfg, memory=False)
    print_job(cfg, picture)
    used = used_folder(cfg)
    if used is not None:  # not wrong with the job: `--fresh` starts it as it is
        print(f"warning: {used}", file=sys.stderr)
    problems = memory_preflight(cfg)
    if problems:
        raise UserError(*problems)
