"""The presets that come with the package load, and say what the released configurations say."""

from __future__ import annotations

import dataclasses
import math

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
    assert hardware.peak_tflops and hardware.memory_gib and hardware.host_gib_s


@pytest.mark.parametrize("name", preset_names("jobs"))
def test_jobs_load(name: str) -> None:
    assert isinstance(load(name), Config)


def test_demo_is_eight_ranks() -> None:
    config = load("demo", world_size=8)
    p = config.parallel
    assert (p.tp, p.pp, p.cp, p.ep, p.dp, config.model.vocab) == (2, 2, 2, 4, 1, 320)
    assert (p.pipeline.schedule, p.pipeline.chunks, p.pipeline.vocab) == ("gis", 2, "balanced")
    assert p.context.method == "ring"
    assert config.checkpoint.final and config.train.steps % config.eval.every == 0


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


MIXTURES = [n for n in preset_names("models") if model(n).moe.experts]


def test_every_published_mixture_is_there() -> None:
    assert set(MIXTURES) == {
        *("mixtral_8x7b", "mixtral_8x22b", "mixtral_8x22b_g8t8", "llama3_8b_e8t2", "llama3_8x70b"),
        *("qwen2_57b_a14b", "qwen3_30b_a3b", "qwen3_235b_a22b", "olmoe_1b_7b", "gpt_oss_20b", "gpt_oss_120b"),
        *("deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "deepseek_v3_mtp", "kimi_k2"),
    }


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_train_on_a_folded_mesh(name: str) -> None:
    layout = ["parallel.ep=8", "parallel.tp=2", "parallel.dp=4", "train.global_batch=8", "model.mtp=0"]
    config = load(None, [f"model.preset={name}", "data.name=stdlib", "optim.name=adamw", *layout], world_size=8)
    m = config.model
    assert m.head_dim and m.kv_heads and m.moe.ffn and m.moe.router.groups_kept
    assert m.layers - len(m.moe_layers) == m.moe.dense_layers
    assert m.ffn == m.moe.ffn or m.moe.dense_layers  # without dense layers both say the same


def test_released_values_of_mixtures() -> None:
    v3 = model("deepseek_v3")
    r = v3.moe.router
    assert (r.score, r.normalize, r.selection_bias, r.bias_rate, r.scale) == ("sigmoid", True, True, 1e-3, 2.5)
    assert (r.groups, r.groups_kept, r.group_members, r.aux_level, r.aux_loss) == (8, 4, 2, "sequence", 1e-4)
    assert (v3.mla.q_rank, v3.mla.kv_rank, v3.head_dim, v3.kv_heads, v3.mtp) == (1536, 512, 192, 128, 0)
    assert v3.moe_layers == tuple(range(3, 61)) and v3.rope.interleaved and v3.rope.attention_factor == 1.0
    assert dataclasses.replace(model("deepseek_v3_mtp"), mtp=0, preset="deepseek_v3") == v3
    v2 = model("deepseek_v2")
    r = v2.moe.router
    assert (r.score, r.normalize, r.scale, r.groups, r.groups_kept, r.group_members) == ("softmax", False, 16, 8, 3, 1)
    assert model("deepseek_v2_lite").mla.q_rank is None
    # deepseek-ai's modelling code: the square of 0.1 mscale ln(factor) + 1.
    assert v3.rope.score_factor == pytest.approx((0.1 * math.log(40) + 1) ** 2, rel=1e-12)
    assert v2.rope.score_factor == pytest.approx((0.1 * 0.707 * math.log(40) + 1) ** 2, rel=1e-12)
    assert model("kimi_k2").rope.score_factor == pytest.approx((0.1 * math.log(32) + 1) ** 2, rel=1e-12)
    assert (model("kimi_k2").moe.router.groups_kept, model("kimi_k2").moe.router.scale) == (1, 2.827)
    oss = model("gpt_oss_120b")
    assert (oss.sinks, oss.activation, oss.qkv_bias, oss.out_bias) == (True, "swiglu_clipped", True, True)
    assert (oss.moe.bias, oss.moe.router.logit_bias, oss.moe.router.normalize) == (True, True, True)
    assert [oss.window_of(i) for i in range(4)] == [128, None, 128, None]
    assert (oss.rope.scaling, oss.rope.factor, oss.rope.truncate, oss.rope.theta) == ("yarn", 32.0, False, 150000.0)
    assert oss.rope.attention_factor == pytest.approx(0.1 * math.log(32) + 1)
    olmoe = model("olmoe_1b_7b")
    assert (olmoe.qk_norm, olmoe.qk_norm_whole, olmoe.moe.router.normalize) == (True, True, False)
    assert (olmoe.moe.router.aux_loss, olmoe.moe.router.z_loss) == (0.01, 0.001)
    qwen2, qwen3 = model("qwen2_57b_a14b"), model("qwen3_30b_a3b")
    assert (qwen2.qkv_bias, qwen2.moe.shared, qwen2.moe.shared_gate) == (True, 20480, True)
    assert not qwen2.moe.router.normalize
    assert (qwen3.qk_norm, qwen3.qk_norm_whole, qwen3.head_dim, qwen3.moe.router.aux_loss) == (True, False, 128, 1e-3)
    assert qwen3.moe.router.normalize and model("mixtral_8x7b").rope.theta == 1e6
