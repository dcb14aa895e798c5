"""Job files that tests start from."""

from __future__ import annotations

from pathlib import Path

DENSE = str(Path(__file__).parent / "dense.yaml")
"""Four ranks, tensor parallel 2 x data parallel 2; its name is demo."""
