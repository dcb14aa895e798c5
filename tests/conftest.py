"""Settings of the whole test session."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from itertools import groupby

import pytest
import torch

from tests.distributed import close_pool

# Before Triton is imported: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# As each worker process of `run_distributed` has: sums of several threads differ in their last bits, and tests run
# beside each other.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test marked `sample(count)`, `make test` runs so many, always the same; the rest are slow."""
    for name, group in groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = [item for item in group if item.get_closest_marker("slow") is None]
        sample = cases[0].get_closest_marker("sample") if cases else None
        if sample is not None and sample.args[0] < len(cases):
            kept = set(random.Random(name).sample(range(len(cases)), sample.args[0]))
            for number, item in enumerate(cases):
                if number not in kept:
                    item.add_marker("slow")


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
