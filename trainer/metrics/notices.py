"""Lines for the person who watches a run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


def warn(text: str) -> None:
    """Prints a line on the standard error stream; where that cannot be written either, nothing is left to say."""
    with contextlib.suppress(OSError):
        print(f"pentad: {' '.join(text.split())}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def or_without(what: str) -> Iterator[None]:
    """Around the writing of something that a run can do without: where the disk does not take it, that is said."""
    try:
        yield
    except OSError as error:
        warn(f"{what} cannot be written ({error.strerror or error}); the run goes on without")
