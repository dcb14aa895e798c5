"""Settings of the whole test session."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.distributed import close_pool


@pytest.fixture(scope="session", autouse=True)
def _signals() -> None:
    """A job inherits which signals are ignored, and rightly ignores them too: not those of who started the tests."""
    for number, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _worker_processes() -> Iterator[None]:
    """Ends the worker processes of `run_distributed` with the session."""
    yield
    close_pool()


@pytest.fixture(autouse=True)
def _denormals() -> Iterator[None]:
    """Jobs that run inside a test flush denormals for the whole process, in which hypothesis refuses to draw floats."""
    yield
    torch.set_flush_denormal(False)
