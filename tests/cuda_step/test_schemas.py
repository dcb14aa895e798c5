"""torch's inner operators that only GPUs run take and give what was written down when their calls were."""

from __future__ import annotations

import json
from pathlib import Path

import torch

PINNED: dict[str, dict[str, str]] = json.loads((Path(__file__).parent / "schemas.json").read_text())
"""By version of torch: signature of each operator."""


def test_inner_operators_have_the_signatures_that_are_pinned() -> None:
    version = ".".join(torch.__version__.split(".")[:2])
    assert version in PINNED, f"torch {version}: look at what changed for our calls, then add its signatures"
    for name, signature in PINNED[version].items():
        operator, _, overload = name.partition(".")
        schema = str(getattr(getattr(torch.ops.aten, operator), overload or "default")._schema)
        assert schema == f"aten::{name}{signature}", name
