"""Lines for the person who watches a run."""

from __future__ import annotations

import contextlib
import sys


def warn(text: str) -> None:
    """Prints a line on the standard error stream; where that cannot be written either, nothing is left to say."""
    with contextlib.suppress(OSError):
        print(f"pentad: {' '.join(text.split())}", file=sys.stderr, flush=True)
