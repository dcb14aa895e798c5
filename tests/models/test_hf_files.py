"""Which files of a Hugging Face folder are read, and under which names, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model

from pentad.configs.errors import UserError
from pentad.models.hf.folder import load_hf
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
}
GPT2: dict[str, Any] = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENS = torch.arange(40).reshape(2, 20)
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def save(folder: Path, tied: bool = False, **how: Any) -> torch.nn.Module:
    return save_random("Llama", SIZES | {"tie_word_embeddings": tied}, folder, **how)


def configure(folder: Path, **keys: Any) -> None:
    """Sets keys of config.json; None leaves a key out."""
    path = folder / "config.json"
    given = json.loads(path.read_text()) | keys
    path.write_text(json.dumps({key: value for key, value in given.items() if value is not None}))


def rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return getattr(found, "logits", found)


def read_as_transformers_reads(folder: Path) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    torch.testing.assert_close(logits(load_hf(folder)), logits(theirs), rtol=0, atol=1e-5)


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_one_file_beside_an_index_is_taken_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path / "old", max_shard_size="20KB")
    for path in [*shards(tmp_path / "old"), tmp_path / "old" / INDEX]:
        (tmp_path / "new").mkdir(exist_ok=True)
        path.rename(tmp_path / "new" / path.name)
    for path in shards(tmp_path / "new"):  # other numbers than in the one file
        save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    expected = logits(save(tmp_path / "new"))
    assert (tmp_path / "new" / INDEX).exists()
    capsys.readouterr()
    torch.testing.assert_close(logits(load_hf(tmp_path / "new")), expected, rtol=0, atol=1e-5)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"has {SINGLE} and {INDEX}; {SINGLE} is read" in said
    read_as_transformers_reads(tmp_path / "new")


def test_stale_index_of_shards_that_are_gone(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="20KB")
    for path in shards(tmp_path):
        path.unlink()
    with pytest.raises(UserError, match=rf"{INDEX} lists \d+ missing files"):
        load_hf(tmp_path)
    index = (tmp_path / INDEX).read_text()
    save(tmp_path)
    (tmp_path / INDEX).write_text(index)
    read_as_transformers_reads(tmp_path)


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen3"])
def test_tied_model_whose_file_has_one_of_the_two_names(name: str, tmp_path: Path) -> None:
    options = GPT2 if name == "GPT2" else SIZES | {"tie_word_embeddings": True, "head_dim": 8}
    model = save_random(name, options, tmp_path)
    # Writes one of the shared names, and the other one as an alias in the metadata.
    save_model(model, str(tmp_path / SINGLE), metadata={"format": "pt"})
    found = load_file(tmp_path / SINGLE)
    assert "lm_head.weight" in found and not any("embed" in key or "wte" in key for key in found)
    read_as_transformers_reads(tmp_path)
    rewrite(tmp_path, found)  # without the metadata
    read_as_transformers_reads(tmp_path)
    embedding = "transformer.wte.weight" if name == "GPT2" else "model.embed_tokens.weight"
    rewrite(tmp_path, {embedding if key == "lm_head.weight" else key: tensor for key, tensor in found.items()})
    read_as_transformers_reads(tmp_path)
    rewrite(tmp_path, found | {embedding: found["lm_head.weight"].clone()})
    read_as_transformers_reads(tmp_path)


def test_aliases_hold_whatever_the_configuration_says(tmp_path: Path) -> None:
    expected = logits(model := save(tmp_path, tied=True))
    save_model(model, str(tmp_path / SINGLE), metadata={"format": "pt"})
    configure(tmp_path, tie_word_embeddings=False)
    torch.testing.assert_close(logits(load_hf(tmp_path)), expected, rtol=0, atol=1e-5)


def test_absent_head_without_the_key_says_which_key(tmp_path: Path) -> None:
    save(tmp_path, tied=True)
    configure(tmp_path, tie_word_embeddings=None)
    with pytest.raises(UserError, match=r"lacks 1 tensors: lm_head.weight; .* set tie_word_embeddings to true"):
        load_hf(tmp_path)


def test_defaults_of_tying_are_those_of_transformers(tmp_path: Path) -> None:
    save_random("GPT2", GPT2, tmp_path)
    configure(tmp_path, tie_word_embeddings=None)
    read_as_transformers_reads(tmp_path)


def test_two_different_tensors_under_a_tied_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    configure(tmp_path, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"tie_word_embeddings: true, but lm_head.weight differs .* set it to false"):
        load_hf(tmp_path)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
def test_names_behind_a_wrapper_are_found(wrapper: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = logits(save(tmp_path))
    rewrite(tmp_path, {wrapper + name: tensor for name, tensor in load_file(tmp_path / SINGLE).items()})
    torch.testing.assert_close(logits(load_hf(tmp_path)), expected, rtol=0, atol=1e-5)
    assert f"names begin with {wrapper}, which is left out" in capsys.readouterr().err


def test_backbone_without_its_prefix(tmp_path: Path) -> None:
    save(tmp_path, tied=True)
    rewrite(tmp_path, {k.removeprefix("model."): v for k, v in load_file(tmp_path / SINGLE).items()})
    read_as_transformers_reads(tmp_path)


def test_links_of_a_cache_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "plain", max_shard_size="20KB")
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "0123", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate((tmp_path / "plain").iterdir()):
        path.rename(blobs / f"{i:x}")
        (snapshot / path.name).symlink_to(Path("..") / ".." / "blobs" / f"{i:x}")
    read_as_transformers_reads(snapshot)
    with pytest.raises(UserError, match=r"is a model's cache; name its snapshot: .*snapshots/0123"):
        load_hf(tmp_path / "models--a--b")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    save(tmp_path, max_shard_size="20KB")
    first, second, *_ = shards(tmp_path)
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second, metadata={"format": "pt"})
    read_as_transformers_reads(tmp_path)
    save_file(load_file(second) | {name: tensor + 1}, second, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} is in {first.name} and in {second.name} with different values"):
        load_hf(tmp_path)


def indexed(folder: Path, **keys: Any) -> Path:
    save(folder, max_shard_size="20KB")
    path = folder / INDEX
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../model.safetensors"}, "names files outside of its folder: ../model.safetensors"),
        ({"a": "/etc/passwd"}, "names files outside of its folder: /etc/passwd"),
        ({"a": "x/../../model.safetensors"}, "names files outside of its folder"),
        ({"a": 3}, "names files that are not safetensors: 3"),
        ({"a": "pytorch_model.bin"}, "names files that are not safetensors: pytorch_model.bin"),
        ([], "has no weight_map"),
        ({}, "has no weight_map"),
    ],
)
def test_index_that_is_not_believed(weight_map: Any, message: str, tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    with pytest.raises(UserError, match=message):
        load_hf(indexed(tmp_path / "in", weight_map=weight_map))


def test_index_that_names_another_file_than_the_tensors(tmp_path: Path) -> None:
    folder = indexed(tmp_path)
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    (folder / INDEX).write_text(json.dumps({"weight_map": listed | {"model.absent": shards(folder)[0].name}}))
    with pytest.raises(UserError, match=r"says that model-00001-of-.* has model.absent, which is not there"):
        load_hf(folder)


def test_ways_on_where_nothing_can_be_read(tmp_path: Path) -> None:
    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            load_hf(tmp_path)
        assert "\n" not in str(error.value)

    save(tmp_path)
    (tmp_path / SINGLE).rename(tmp_path / "pytorch_model.bin")
    refused(r"other weight files: pytorch_model.bin\); pickles are not read.*save_pretrained")
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "model-00001-of-00001.safetensors")
    refused("the shards are there .*, copy their index too")
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("it holds an adapter; merge it into its base model first")
    (tmp_path / SINGLE).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused("pointer of Git LFS: run git lfs pull")
    (tmp_path / "config.json").write_text("[" * 100_000)
    refused("config.json cannot be read")


def test_quantised_tensors_without_a_word_in_the_configuration(tmp_path: Path) -> None:
    save(tmp_path)
    tensors = load_file(tmp_path / SINGLE)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(tmp_path, tensors | {name: tensors[name].to(torch.float8_e4m3fn)})
    with pytest.raises(UserError, match=f"1 tensors of type F8_E4M3, only .* convert quantised weights first: {name}"):
        load_hf(tmp_path)
