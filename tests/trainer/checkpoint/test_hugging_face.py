"""Hugging Face folders through Pentad checkpoints."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pentad.configs import load, preset_names
from pentad.configs.errors import UserError
from pentad.configs.resolve import resolve_model
from pentad.configs.schema import MlaConfig, ModelConfig, MoeConfig, RopeConfig, RouterConfig
from pentad.models.hf.config_json import links
from pentad.models.hf.folder import hf_config, load_hf, model_config_from_hf, write_hf
from pentad.trainer.checkpoint.checkpointer import Checkpointer, read_full, write_full
from pentad.trainer.checkpoint.hugging_face import export_hf, import_hf, load_initial
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.saved_model import check_same_model, model_config_from_state
from tests.distributed import run_distributed
from tests.training import job, open_session

SIZES: dict[str, Any] = {
    "layers": 2,
    "hidden": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "ffn": 48,
    "vocab": 96,
    "max_positions": 64,
}
LLAMA = ModelConfig(family="llama", rope=RopeConfig(scaling="llama3", factor=4.0, original_positions=16), **SIZES)
GPT2 = ModelConfig(
    family="gpt2",
    norm="layer",
    position="learned",
    activation="gelu_tanh",
    qkv_bias=True,
    out_bias=True,
    ffn_bias=True,
    tied=True,
    **{**SIZES, "kv_heads": 4},
)
ROUTED = replace(LLAMA, family="mixtral", moe=MoeConfig(experts=4, ffn=48, router=RouterConfig(groups_kept=1)))
LATENT = replace(
    LLAMA,
    family="deepseek_v3",
    norm_eps=1e-6,
    kv_heads=4,
    head_dim=12,
    rope=RopeConfig(interleaved=True),
    mla=MlaConfig(kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8),
    moe=MoeConfig(
        experts=4,
        ffn=16,
        shared=32,
        dense_layers=1,
        router=RouterConfig(score="sigmoid", selection_bias=True, groups=2, groups_kept=1),
    ),
)
LLAMA, GPT2, ROUTED, LATENT = (resolve_model(config, 64) for config in (LLAMA, GPT2, ROUTED, LATENT))


def random_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    """bf16 matrices and fp32 vectors, as some published checkpoints have them."""
    generator = torch.Generator().manual_seed(0)
    shapes = {name: shape for link in links(config) for name, shape in link.ours.items()}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {name: tensor.bfloat16() if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("config", [LLAMA, GPT2, ROUTED, LATENT], ids=lambda config: config.family)
def test_import_then_export_is_bit_equal(config: ModelConfig, tmp_path: Path) -> None:
    kept = {"bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": True}
    write_hf(tmp_path / "in", config, random_tensors(config), extra=kept)
    assert import_hf(tmp_path / "in", tmp_path / "checkpoint") == config
    assert export_hf(tmp_path / "checkpoint", tmp_path / "out") == config

    before, after = (load_file(tmp_path / side / "model.safetensors") for side in ("in", "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    first, second = (json.loads((tmp_path / side / "config.json").read_text()) for side in ("in", "out"))
    del first["use_cache"]
    assert second == first


def test_imported_tensors_have_global_names(tmp_path: Path) -> None:
    tensors = random_tensors(GPT2)
    write_hf(tmp_path / "in", GPT2, tensors)
    import_hf(tmp_path / "in", tmp_path / "checkpoint")
    found, state = read_full(tmp_path / "checkpoint")
    assert found.keys() == {f"model/{name}" for name in tensors}
    assert all(torch.equal(found[f"model/{name}"], tensor) for name, tensor in tensors.items())
    assert model_config_from_state(state) == GPT2


def test_export_of_a_training_checkpoint_in_another_dtype(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in random_tensors(LLAMA).items()}
    states = {f"optim/exp_avg/{name}": torch.zeros_like(tensor) for name, tensor in tensors.items()}
    saved = {f"model/{name}": tensor for name, tensor in tensors.items()} | states
    write_full(tmp_path / "checkpoint", saved, {"step": 7, "model": asdict(LLAMA)})
    export_hf(tmp_path / "checkpoint", tmp_path / "out", torch.bfloat16)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert len(written) == len(tensors)
    assert torch.equal(written["lm_head.weight"], tensors["head.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_weights_than_the_jobs_are_refused(tmp_path: Path) -> None:
    same = replace(LLAMA, max_positions=512, family="mistral", dropout=0.1, rope=replace(LLAMA.rope, beta_fast=9.0))
    check_same_model(LLAMA, same, tmp_path)
    other = replace(LLAMA, kv_heads=4, rope=replace(LLAMA.rope, factor=8.0))
    with pytest.raises(UserError) as error:
        check_same_model(LLAMA, other, tmp_path)
    assert [problem.key for problem in error.value.problems] == ["model.kv_heads", "model.rope.factor"]
    assert "set model.kv_heads=2" in str(error.value)
    with pytest.raises(UserError, match=r"model\.rope\.scaling: none"):
        check_same_model(LLAMA, replace(LLAMA, rope=RopeConfig()), tmp_path)


def test_differences_that_compute_the_same(tmp_path: Path) -> None:
    moe = MoeConfig(experts=4, ffn=24)
    routed = replace(LLAMA, moe=moe)
    loss = replace(moe.router, aux_loss=0.1, aux_level="global_batch", jitter=0.1, groups_kept=1)
    check_same_model(routed, replace(routed, ffn=999, moe=replace(moe, router=loss, capacity_factor=1.0)), tmp_path)
    # Layer 3 of 4, in other words.
    one, other = replace(moe, dense_layers=3), replace(moe, every=4)
    check_same_model(replace(routed, layers=4, moe=one), replace(routed, layers=4, moe=other), tmp_path)
    with pytest.raises(UserError) as error:
        check_same_model(routed, replace(routed, moe=replace(moe, dense_layers=1, shared=8)), tmp_path)
    assert {problem.key for problem in error.value.problems} == {"model.moe.dense_layers", "model.moe.shared"}


@pytest.mark.parametrize("name", preset_names("models"))
def test_presets_survive_a_config_json(name: str, tmp_path: Path) -> None:
    """Every preset of a published model has an architecture, whose config.json says the same network."""
    preset = load(None, [f"model.preset={name}", "train.seq_len=8"]).model
    if preset.mtp or preset.attention_every > 1:
        with pytest.raises(UserError, match=r"model\.(mtp|attention_every): . cannot be exported"):
            hf_config(preset)
        return
    check_same_model(model_config_from_hf(hf_config(preset)), preset, tmp_path)


def test_export_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such checkpoint"):
        export_hf(tmp_path / "none", tmp_path / "out")


def first_logits(rank: int, world: int, path: Path, config: ModelConfig, sharding: str, dtype: str) -> torch.Tensor:
    """Logits (B, T, V) of a job, over tp 2 with several ranks, that starts from `path`."""
    tp = 2 if world > 1 else 1
    ep = 2 if config.moe.experts and world > 1 else 1
    cfg = job(model=vars(config), tp=tp, dp=world // tp, ep=ep, sharding=sharding, dtype=dtype)
    session = open_session(rank, cfg, trains=False)
    group: Any = session.mesh.host_group if world > 1 else None
    checkpointer = Checkpointer(
        path.parent / "run",
        group=group,
        rank=rank,
        world=world,
        keep=Retention(1),
        asynchronous=False,
        on_event=lambda event: None,
    )
    try:
        load_initial(path, session.parts, checkpointer)
        with torch.no_grad():
            return session.parts.model(TOKENS).clone()
    finally:
        checkpointer.close()
        session.close()


TOKENS = torch.arange(40).reshape(2, 20) % 96


@pytest.mark.sample(3)
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("config", "sharding"),
    [
        *((config, sharding) for config in (LLAMA, GPT2) for sharding in ("ddp", "zero1", "fsdp2")),
        *((ROUTED, sharding) for sharding in ("ddp", "zero1")),
        (LATENT, "ddp"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.family,
)
def test_a_run_starts_from_either_kind(config: ModelConfig, sharding: str, tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", config, {name: 0.1 * tensor for name, tensor in random_tensors(config).items()})
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = load_hf(tmp_path / "hf", torch.float64)(TOKENS)
    for kind in ("hf", "checkpoint"):
        for logits in run_distributed(first_logits, 4, tmp_path / kind, config, sharding, "fp64", group=False):
            torch.testing.assert_close(logits, expected, rtol=1e-11, atol=1e-11)


def test_a_run_does_not_start_from_damaged_or_absent_weights(tmp_path: Path) -> None:
    write_hf(tmp_path / "hf", LLAMA, random_tensors(LLAMA))
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.init: .* does not exist"):
        first_logits(0, 1, tmp_path / "nothing", LLAMA, "ddp", "fp32")
    with pytest.raises(UserError, match=r"model\.ffn: 40, but checkpoint\.init=.* has 48; set model\.ffn=48"):
        first_logits(0, 1, tmp_path / "checkpoint", replace(LLAMA, ffn=40), "ddp", "fp32")
    data = next((tmp_path / "checkpoint").glob("*.safetensors"))
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"checkpoint\.init: .* is damaged"):
        first_logits(0, 1, tmp_path / "checkpoint", LLAMA, "ddp", "fp32")
