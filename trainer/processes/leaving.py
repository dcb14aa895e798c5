"""How a process of ours ends: whatever its threads are in the middle of."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """Ends the process with `code`, after what is registered for its end.

    The interpreter is not taken down. A rank that gives up leaves threads behind, in a sum or in a call of torch's that
    nobody can wake; Python ends such a thread as it comes back and asks for the interpreter, through C++ that does not
    allow it, and the process would abort (SIGABRT) where it means to say why it ends.
    """
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()  # Python runs these only on the way that is not taken
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
