"""Hugging Face folders with experts, against transformers on tiny random models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pentad.configs.errors import UserError
from pentad.configs.schema import ModelConfig
from pentad.models.hf.folder import (
    HfFolder,
    hf_config,
    hf_weights,
    load_hf,
    model_config_from_hf,
    read_hf_config,
    read_hf_weights,
    write_hf,
)
from pentad.parallel.global_tensor import Placement
from tests.models.hf.random_hf import save_random

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "bos_token_id": 3,
    "eos_token_id": 5,
    "pad_token_id": None,
    "initializer_range": 0.1,
}
LATENT = SIZES | {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
GROUPED = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
QWEN = {"num_experts": 4, "moe_intermediate_size": 24}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", SIZES | {"num_local_experts": 4}),
    "mixtral-window": ("Mixtral", SIZES | {"num_local_experts": 4, "sliding_window": 5, "head_dim": 16}),
    "qwen2_moe": ("Qwen2Moe", SIZES | QWEN | {"shared_expert_intermediate_size": 40}),
    "qwen2_moe-sparse": (
        "Qwen2Moe",
        SIZES | QWEN | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("Qwen3Moe", SIZES | QWEN | {"head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-dense-first": ("Qwen3Moe", SIZES | QWEN | {"mlp_only_layers": [0], "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", SIZES | {"num_experts": 4}),
    "deepseek_v2": ("DeepseekV2", LATENT | {"rope_parameters": YARN}),
    "deepseek_v2-groups": (
        "DeepseekV2",
        LATENT | GROUPED | {"topk_method": "group_limited_greedy", "q_lora_rank": None},
    ),
    "deepseek_v3": ("DeepseekV3", LATENT | GROUPED),
    "deepseek_v3-yarn": (
        "DeepseekV3",
        LATENT
        | GROUPED
        | {"rope_parameters": YARN | {"mscale": 1.0}, "rope_interleave": False, "attention_bias": True},
    ),
    "gpt_oss": (
        "GptOss",
        SIZES | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 5, "num_hidden_layers": 4},
    ),
}
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


def make(case: str, directory: Path, dtype: torch.dtype = torch.float32, **save: Any) -> torch.nn.Module:
    name, options = CASES[case]
    return save_random(name, options, directory, dtype, **save)


def edit(directory: Path, **keys: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = make(case, tmp_path)
    ours = load_hf(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_round_trip_is_bit_equal_and_loads(case: str, dtype: torch.dtype, tmp_path: Path, tokens: torch.Tensor) -> None:
    make(case, tmp_path / "in", dtype)
    config, tensors = read_hf_weights(tmp_path / "in")
    write_hf(tmp_path / "out", config, tensors)

    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name

    assert model_config_from_hf(read_hf_config(tmp_path / "out")) == config
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "in", attn_implementation="eager")
    again, report = auto.from_pretrained(tmp_path / "out", attn_implementation="eager", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize("case", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_experts_in_one_tensor_per_matrix(case: str, tmp_path: Path) -> None:
    """As transformers 5 holds them in memory, and saves them on demand."""
    make(case, tmp_path / "single")
    make(case, tmp_path / "fused", save_original_format=False)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.gate_up_proj"].dim() == 3
    assert not any(".experts.0." in name for name in stored)
    config, expected = read_hf_weights(tmp_path / "single")
    fused_config, fused = read_hf_weights(tmp_path / "fused")
    assert fused_config == config and fused.keys() == expected.keys()
    assert all(torch.equal(fused[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_slices_are_those_of_the_whole(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any slice, and for experts no other expert's tensor is touched."""
    make(case, tmp_path)
    config, whole = read_hf_weights(tmp_path)
    where = {
        name: Placement.whole(tuple(t.shape)).cut(0, 1, 2).cut(t.dim() - 1, t.dim() > 1, 2 if t.dim() > 1 else 1)
        for name, t in whole.items()
        if all(size % 2 == 0 for size in t.shape)
    }
    found = dict(hf_weights(tmp_path, config, where))
    assert len(found) > len(whole) / 2 and found.keys() == where.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, where[name].of(whole[name])), name
    if case == "gpt_oss":
        return
    with HfFolder(tmp_path, config) as folder:
        touched: list[str] = []
        for theirs, tensor in folder._stored.items():
            folder._stored[theirs] = Spy(tensor, touched)  # pyright: ignore[reportArgumentType]
        folder.read("layers.1.moe.experts.up.weight", where["layers.1.moe.experts.up.weight"])
    experts = config.moe.experts
    assert [int(name.split("experts.")[1].split(".")[0]) for name in touched] == [*range(experts // 2, experts)]


class Spy:
    """A stored tensor that notes when it is read."""

    def __init__(self, tensor: Any, touched: list[str]) -> None:
        self.tensor, self.touched = tensor, touched

    def part(self, index: tuple[slice, ...]) -> torch.Tensor:
        self.touched.append(self.tensor.name)
        return self.tensor.part(index)


def test_export_in_several_files_cuts_between_experts(tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = make("mixtral", tmp_path / "in")
    config, tensors = read_hf_weights(tmp_path / "in")
    write_hf(tmp_path / "out", config, tensors, shard_bytes=15_000)  # a layer's experts have 72 KiB
    assert len(files := sorted((tmp_path / "out").glob("*.safetensors"))) > 10
    assert all(f.stat().st_size < 20_000 for f in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
        torch.testing.assert_close(load_hf(tmp_path / "out")(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_prediction_modules_are_passed_over_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("deepseek_v3", tmp_path)
    _, before = read_hf_weights(tmp_path)
    capsys.readouterr()
    path = tmp_path / "model.safetensors"
    extra = {"model.layers.3.eh_proj.weight": torch.ones(32, 64), "model.layers.3.enorm.weight": torch.ones(32)}
    save_file(load_file(path) | extra, path)
    _, after = read_hf_weights(tmp_path)
    assert before.keys() == after.keys()
    assert "2 tensors of multi-token prediction are not read: model.layers.3.eh_proj.weight" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("step", "dense", "layers", "expected"),
    [
        (1, [], 4, (0, 1)),
        (2, [], 4, (0, 2)),
        (2, [0, 1], 6, (2, 2)),
        (1, [0, 1], 4, (2, 1)),
        (1, [0, 2], 4, (0, 2)),  # every second layer, said in other words
    ],
)
def test_which_layers_have_experts(step: int, dense: list[int], layers: int, expected: tuple[int, int]) -> None:
    config = hf_config(tiny()) | {"num_hidden_layers": layers, "decoder_sparse_step": step, "mlp_only_layers": dense}
    found = model_config_from_hf(config)
    assert (found.moe.dense_layers, found.moe.every) == expected
    sparse = [i for i in range(layers) if i not in dense and (i + 1) % step == 0]
    assert list(found.moe_layers) == sparse
    again = model_config_from_hf(hf_config(found))
    assert again.moe_layers == found.moe_layers


def tiny(**changes: Any) -> ModelConfig:
    """A Qwen 3 with experts."""
    sizes: dict[str, Any] = {
        "layers": 4,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocab": 97,
    }
    base = ModelConfig(family="qwen3_moe", qk_norm=True, max_positions=64, **sizes)
    base = replace(base, moe=replace(base.moe, experts=4, ffn=24))
    return replace(base, **changes)


def test_export_takes_an_architecture_that_can_express_the_model() -> None:
    moe = tiny().moe
    assert hf_config(tiny())["architectures"] == ["Qwen3MoeForCausalLM"]
    assert hf_config(tiny(qk_norm=False, family="llama"))["architectures"] == ["MixtralForCausalLM"]
    gated = tiny(qk_norm=False, moe=replace(moe, shared=16, shared_gate=True))
    assert hf_config(gated)["architectures"] == ["Qwen2MoeForCausalLM"]
    with pytest.raises(UserError, match=r"model\.moe\.router\.score: sigmoid cannot be exported as Qwen3Moe"):
        hf_config(tiny(moe=replace(moe, router=replace(moe.router, score="sigmoid"))))
    with pytest.raises(UserError, match=r"model\.mtp: 1 cannot be exported"):
        hf_config(tiny(mtp=1))


@pytest.mark.parametrize(
    ("case", "keys", "message"),
    [
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0 is not supported"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is more than the 4 experts"),
        ("mixtral", {"num_local_experts": None}, "num_experts: missing"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers: \[1\] is not supported; .* found \[0, 2\] of 3"),
        ("gpt_oss", {"swiglu_limit": 5.0}, "swiglu_limit: 5.0 is not supported, only 7.0"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config: .* is not supported"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: True is not supported"),
        ("deepseek_v2", {"rms_norm_eps": 1e-5}, "rms_norm_eps: 1e-05 is not supported, only 1e-06"),
        ("deepseek_v3", {"n_group": 3}, "n_group: 3 does not divide the 8 experts"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: 'softmax' is not supported, only 'sigmoid'"),
        ("deepseek_v3", {"qk_rope_head_dim": 3}, "qk_rope_head_dim: 3 is odd"),
    ],
)
def test_unsupported_configurations(case: str, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    make(case, tmp_path)
    edit(tmp_path, **keys)
    with pytest.raises(UserError, match=message):
        load_hf(tmp_path)


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    save_file(tensors, path)
    with pytest.raises(UserError, match=r"lacks 1 tensors: model\.layers\.1\.block_sparse_moe\.experts\.2\.w3"):
        load_hf(tmp_path)
