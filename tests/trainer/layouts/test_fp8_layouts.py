"""Products in 8 bits give every layout the curve of one process: scales are those of whole operands."""

from __future__ import annotations

from typing import Any

import pytest

from pentad.configs.schema import LinearAttentionConfig, MlaConfig, MoeConfig
from tests.same_training import check

MOE = MoeConfig(experts=4, top_k=2, ffn=32, shared=16, shared_gate=True)
BIASES = {"qkv_bias": True, "out_bias": True, "ffn_bias": True}
MLA = {"mla": MlaConfig(kv_rank=16, q_rank=12, nope_dim=8, rope_dim=4, value_dim=8), "head_dim": 12}
LINEAR = {"attention_every": 2, "linear": LinearAttentionConfig(key_dim=8, value_dim=8, gate_rank=4)}
WIDE = {"hidden": 128, "heads": 4, "kv_heads": 4, "head_dim": 64, "ffn": 256}
SPLIT = {"schedule": "zb-h1"}
CASES: dict[str, dict[str, Any]] = {
    "tensor-tp": {"fp8": "tensor", "tp": 2, "model": BIASES},
    "tensor-all": {"fp8": "tensor", "tp": 2, "cp": 2, "pp": 2, "pipeline": SPLIT, "recompute": "full"},
    "tensor-experts": {"fp8": "tensor", "ep": 2, "etp": 2, "tp": 2, "dp": 2, "model": {"moe": MOE}},
    "tensor-latents": {"fp8": "tensor", "tp": 2, "dp": 2, "model": {**MLA, "mtp": 1}, "sharding": "zero1"},
    "row-tp": {"fp8": "row", "tp": 4, "model": BIASES},
    "row-offload": {"fp8": "row", "tp": 2, "dp": 2, "sharding": "zero1", "offload": "all"},
    "row-all": {"fp8": "row", "tp": 2, "cp": 2, "pp": 2, "pipeline": SPLIT, "recompute": "selective"},
    "row-experts": {"fp8": "row", "ep": 2, "etp": 2, "pp": 2, "pipeline": SPLIT, "dp": 4, "model": {"moe": MOE}},
    "row-linear": {"fp8": "row", "tp": 2, "cp": 2, "context": {"placement": "contiguous"}, "model": LINEAR},
    "block-tp": {"fp8": "block", "tp": 2, "pp": 2, "pipeline": SPLIT, "model": WIDE, "seq_len": 96},
    "block-experts": {"fp8": "block", "ep": 2, "etp": 2, "dp": 4, "model": {"moe": MOE}},
}


@pytest.mark.parametrize("name", CASES)
def test_layouts(name: str) -> None:
    check(**{"steps": 4, **CASES[name]})
