"""The presets that come with the package load, and say what the released configurations say."""

from __future__ import annotations

import pytest

from pentad.configs import Config, ModelConfig, load, preset_names
from pentad.configs.schema import RopeConfig


def model(name: str) -> ModelConfig:
    return load(None, [f"model.preset={name}"]).model


@pytest.mark.parametrize("name", preset_names("models"))
def test_models_load(name: str) -> None:
    assert model(name).vocab


@pytest.mark.parametrize("name", preset_names("hardware"))
def test_hardware_loads(name: str) -> None:
    hardware = load("demo", [f"hardware.preset={name}", "train.dtype=bf16"]).hardware
    assert hardware.peak_tflops and hardware.memory_gib


@pytest.mark.parametrize("name", preset_names("jobs"))
def test_jobs_load(name: str) -> None:
    assert isinstance(load(name), Config)


def test_demo_is_eight_ranks() -> None:
    config = load("demo", world_size=8)
    p = config.parallel
    assert (p.tp, p.pp, p.dp, config.model.vocab) == (2, 2, 2, 320)
    assert (p.pipeline.schedule, p.pipeline.chunks, p.pipeline.vocab) == ("gis", 2, "balanced")
    assert config.checkpoint.final and config.eval.every == 100


def test_released_values() -> None:
    # config.json of each model on the Hugging Face hub.
    llama = model("llama3.1_8b")
    assert llama.rope == RopeConfig(theta=500000.0, scaling="llama3", factor=8.0, attention_factor=1.0)
    assert (llama.max_positions, llama.norm_eps, llama.tied, llama.kv_heads) == (131072, 1e-5, False, 8)
    assert model("llama3.2_1b").rope.factor == 32.0 and model("llama3.2_1b").tied
    assert model("llama2_7b").rope.theta == 10000.0 and model("llama2_7b").max_positions == 4096
    assert model("llama3_8b").rope == RopeConfig(theta=500000.0, attention_factor=1.0)
    qwen2 = model("qwen2.5_7b")
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.norm_eps, qwen2.rope.theta) == (True, False, 1e-6, 1e6)
    assert [model(f"qwen2.5_{n}").norm_eps for n in ("14b", "32b", "72b")] == [1e-5] * 3
    qwen3 = model("qwen3_32b")
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim, qwen3.heads, qwen3.hidden) == (False, True, 128, 64, 5120)
    assert [n for n in preset_names("models") if n.startswith("qwen3") and model(n).tied] == [
        "qwen3_0.6b",
        "qwen3_1.7b",
        "qwen3_4b",
    ]
    assert model("mistral_7b").window == 4096
    gpt2 = model("gpt2_xl")
    assert (gpt2.norm, gpt2.position, gpt2.activation, gpt2.max_positions) == ("layer", "learned", "gelu_tanh", 1024)
    assert gpt2.tied and gpt2.qkv_bias and gpt2.out_bias and gpt2.ffn_bias and gpt2.norm_eps == 1e-5
