"""Hugging Face folders, against transformers on tiny random models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pentad.configs.errors import UserError
from pentad.configs.schema import ModelConfig
from pentad.models.hf.folder import hf_config, load_hf, model_config_from_hf, read_hf_config, read_hf_weights, write_hf
from tests.models.hf.random_hf import save_random

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 3,
    "eos_token_id": 5,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", SIZES | {"tie_word_embeddings": False}),
    "llama-tied-biased": (
        "Llama",
        SIZES | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-linear": ("Llama", SIZES | {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    "llama-llama3": ("Llama", SIZES | {"rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", SIZES | {"rope_parameters": YARN}),
    "llama-yarn-exact": ("Llama", SIZES | {"rope_parameters": YARN | {"truncate": False}}),
    "llama-yarn-mscale": ("Llama", SIZES | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}}),
    "mistral": ("Mistral", SIZES | {"sliding_window": 5}),
    "mistral-full": ("Mistral", SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2", SIZES),
    "qwen2-window": ("Qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}),
    "qwen3": ("Qwen3", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2-gelu": ("GPT2", GPT2 | {"activation_function": "gelu", "n_inner": 40}),
}


def make(case: str, directory: Path, dtype: torch.dtype = torch.float32, **save: Any) -> torch.nn.Module:
    """As `save_random`."""
    name, options = CASES[case]
    return save_random(name, options, directory, dtype, **save)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """A Llama folder with keys of its config.json replaced."""

    def edit(case: str = "llama", **keys: Any) -> Path:
        make(case, tmp_path / "edited")
        path = tmp_path / "edited" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | keys))
        return tmp_path / "edited"

    return edit


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
        assert tensor.dtype == after[name].dtype == dtype
        assert torch.equal(tensor, after[name]), name

    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "in")
    again, report = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(again) is type(theirs)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert again.dtype == dtype
    assert model_config_from_hf(read_hf_config(tmp_path / "out")) == config
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)


def test_shards_in_and_out(tmp_path: Path, tokens: torch.Tensor) -> None:
    make("llama", tmp_path / "in", max_shard_size="20KB")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists()
    config, tensors = read_hf_weights(tmp_path / "in")
    write_hf(tmp_path / "out", config, tensors, shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 24_000 for f in files)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, theirs(tokens).logits)
        torch.testing.assert_close(load_hf(tmp_path / "out")(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_version_4_spelling_of_the_rotary_embedding(edited: Callable[..., Path]) -> None:
    scaling = {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    config = json.loads((edited() / "config.json").read_text())
    del config["rope_parameters"]
    old = model_config_from_hf(config | {"rope_theta": 1000.0, "rope_scaling": scaling})
    assert old.rope == model_config_from_hf(config | {"rope_parameters": LLAMA3}).rope
    assert (old.rope.theta, old.rope.scaling, old.rope.factor, old.rope.original_positions) == (1000, "llama3", 4, 16)
    legacy = {"type": "linear", "factor": 2.0}
    assert model_config_from_hf(config | {"rope_scaling": legacy}).rope.scaling == "linear"
    assert model_config_from_hf(config | {"rope_theta": 5e5, "rope_scaling": None}).rope.theta == 5e5


def test_export_takes_an_architecture_that_can_express_the_model() -> None:
    sizes: dict[str, Any] = {
        "layers": 1,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn": 48,
        "vocab": 97,
    }
    base = ModelConfig(family="llama", max_positions=64, **sizes)
    assert hf_config(base)["architectures"] == ["LlamaForCausalLM"]
    assert hf_config(replace(base, window=8))["architectures"] == ["MistralForCausalLM"]
    assert hf_config(replace(base, qkv_bias=True))["architectures"] == ["Qwen2ForCausalLM"]
    assert hf_config(replace(base, qk_norm=True))["architectures"] == ["Qwen3ForCausalLM"]
    with pytest.raises(UserError, match=r"model\.activation: gelu cannot be exported"):
        hf_config(replace(base, activation="gelu"))


def test_bare_backbone_and_old_buffers(tmp_path: Path, tokens: torch.Tensor) -> None:
    theirs = make("gpt2", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(2)}
    save_file(tensors | masks, path, metadata={"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path).eval()(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_all_tensor_problems_at_once(tmp_path: Path) -> None:
    make("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors | {"model.layers.2.extra": torch.ones(1)}, path)
    with pytest.raises(UserError) as error:
        load_hf(tmp_path)
    assert len(error.value.problems) == 3
    text = str(error.value)
    assert "lacks 1 tensors: model.layers.1.mlp.up_proj.weight" in text
    assert "unexpected tensors: model.layers.2.extra" in text
    assert "model.norm.weight has shape (31,), the configuration says (32,)" in text


def test_untied_head_under_a_tied_configuration(tmp_path: Path) -> None:
    make("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))
    with pytest.raises(UserError, match=r"tie_word_embeddings: true, but lm_head.weight differs"):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, r"architectures: \['MambaForCausalLM'\] is not supported"),
        ({"hidden_act": "relu"}, "hidden_act: 'relu' is not supported, only 'silu'"),
        ({"hidden_size": None}, "hidden_size: missing"),
        ({"hidden_size": 32.5}, "hidden_size: 32.5 is not an integer"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide num_attention_heads 4"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type: 'longrope' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"rope_parameters": YARN | {"mrope_section": [1]}}, r"mrope_section: \[1\] is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4} is not supported"),
        ({"sliding_window": 8}, "sliding_window: 8 is not supported"),
    ],
)
def test_unsupported_configurations(keys: dict[str, Any], message: str, edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=message):
        load_hf(edited(**keys))


def test_alternating_layer_types(tmp_path: Path, tokens: torch.Tensor) -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    options = SIZES | {"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 5, "layer_types": kinds}
    theirs = save_random("Qwen2", options, tmp_path / "in")
    config, tensors = read_hf_weights(tmp_path / "in")
    assert (config.window, config.window_every) == (5, 2)
    write_hf(tmp_path / "out", config, tensors)
    assert read_hf_config(tmp_path / "out")["layer_types"] == kinds
    with torch.no_grad():
        torch.testing.assert_close(load_hf(tmp_path / "out")(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_mixed_layer_types(edited: Callable[..., Path]) -> None:
    kinds = ["full_attention", "sliding_attention"]
    with pytest.raises(
        UserError, match=r"layer_types: layers of different attention .* 1 × full_attention, 1 × sliding"
    ):
        load_hf(edited("qwen2", layer_types=kinds))


def test_all_configuration_problems_at_once(edited: Callable[..., Path]) -> None:
    with pytest.raises(UserError) as error:
        load_hf(edited(hidden_act="relu", vocab_size=-1, rms_norm_eps="small"))
    assert [p.key for p in error.value.problems] == [
        f"config.json {key}" for key in ("hidden_act", "vocab_size", "rms_norm_eps")
    ]


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json does not exist"):
        load_hf(tmp_path / "none")
    make("llama", tmp_path / "a", max_shard_size="20KB")
    shard = next((tmp_path / "a").glob("model-00002-*"))
    shutil.copy(shard, tmp_path / "kept")
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{shard.name} is damaged"):
        load_hf(tmp_path / "a")
    shard.unlink()
    with pytest.raises(UserError, match=f"1 missing files: {shard.name}"):
        load_hf(tmp_path / "a")
    make("gpt2", tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "b" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"neither model.safetensors .* pytorch_model.bin"):
        load_hf(tmp_path / "b")


def test_export_never_overwrites(tmp_path: Path) -> None:
    make("llama", tmp_path / "in")
    config, tensors = read_hf_weights(tmp_path / "in")
    with pytest.raises(UserError, match="is not an empty folder"):
        write_hf(tmp_path / "in", config, tensors)
    lacking = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"}
    with pytest.raises(UserError, match=r"lacks 1 tensors: norm\.weight"):
        write_hf(tmp_path / "out", config, lacking)
    assert not (tmp_path / "out").exists()
