"""Kernels in Triton compile for Hopper; no GPU is needed for that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("modules", [["gates", "rows"], pytest.param([], marks=pytest.mark.slow)])
def test_kernels_compile(modules: list[str], tmp_path: Path) -> None:
    """In another process: Triton was told here that it is to interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.parallel.kernels.triton.compile_all", *modules],
        cwd=Path(__file__).parents[4],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stdout + done.stderr
