"""Triton's compiler, for editors and type checkers that do not know what it makes of a function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton

compiled: Callable[[Callable[..., object]], Any] = triton.jit
"""A kernel of a function in Triton's language: `kernel[grid](…)` launches it."""
