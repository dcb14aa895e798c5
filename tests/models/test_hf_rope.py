"""Rotary embeddings of config.json, in both spellings, against those that transformers makes of the same file."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.models.hf.folder import model_config_from_hf, read_hf_config
from pentad.models.rope import frequencies

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}
ROUTED = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = SIZES | {
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 16,
}
FAMILIES = {"llama": ("Llama", SIZES), "gpt_oss": ("GptOss", ROUTED), "deepseek_v3": ("DeepseekV3", LATENT)}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LENGTH = "original_max_position_embeddings"

# (keys in the rotary embedding's object, keys beside it)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama3-inside": (LLAMA3 | {LENGTH: 64}, {}),
    "llama3-outside": (LLAMA3, {LENGTH: 32}),
    "llama3-both": (LLAMA3 | {LENGTH: 64}, {LENGTH: 32}),
    "llama3-neither": (LLAMA3, {}),
    "yarn-inside": (YARN | {LENGTH: 64}, {}),
    "yarn-outside": (YARN, {LENGTH: 32}),
    "yarn-both": (YARN | {LENGTH: 64}, {LENGTH: 32}),
    "yarn-neither": (YARN, {}),
    "yarn-both-mscale": (YARN | {LENGTH: 64, "mscale": 0.7, "mscale_all_dim": 1.0, "beta_fast": 16}, {LENGTH: 128}),
    "yarn-factor-of-lengths": (YARN | {"factor": None, LENGTH: 64}, {LENGTH: 32}),
    "yarn-type": ({"type": "yarn", "factor": 2.0, LENGTH: 64, "truncate": False}, {LENGTH: 32}),
    "linear-both": ({"rope_type": "linear", "factor": 2.0}, {LENGTH: 32}),
    "theta-inside": (YARN | {LENGTH: 64, "rope_theta": 500.0}, {"rope_theta": 700.0, LENGTH: 32}),
    "theta-outside": (LLAMA3 | {LENGTH: 64}, {"rope_theta": 700.0}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_equal_transformers(case: str, spelling: str, family: str, tmp_path: Path) -> None:
    inside, beside = CASES[case]
    name, sizes = FAMILIES[family]
    theta = {} if "rope_theta" in inside or "rope_theta" in beside else {"rope_theta": 1000.0}
    architecture = {"model_type": family, "architectures": [f"{name}ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(architecture | sizes | beside | theta | {spelling: inside}))

    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    theirs = getattr(module, f"{name}RotaryEmbedding")(transformers.AutoConfig.from_pretrained(tmp_path))
    rope = model_config_from_hf(read_hf_config(tmp_path)).rope
    ours, factor = frequencies(rope, 2 * len(theirs.inv_freq))
    torch.testing.assert_close(ours.float(), theirs.inv_freq, rtol=1e-6, atol=0)
    assert factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
