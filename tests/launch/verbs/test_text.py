"""From a Hugging Face folder through training to text, with nothing but the run's folder at hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.launch.cli import main
from pentad.models import load_hf
from pentad.trainer import load_checkpoint
from pentad.trainer.__main__ import main as run_rank
from tests.models.hf.random_hf import save_random

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SENTENCES = ["the cat sat on the mat", "a dog ran in the rain", "my bird sings a song", "the fish swims in a pond"]
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
MODEL = "layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 48, max_positions: 64, init_std: 0.02"
FAMILIES = {
    "llama": ("Llama", {}, "model: {family: llama, norm_eps: 1e-6, %s}"),
    "mixtral": (
        "Mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "model: {family: mixtral, norm_eps: 1e-5, rope: {theta: 1e6}, moe: {experts: 4, top_k: 2, ffn: 48}, %s}",
    ),
}
JOB = """
train: {steps: 40, global_batch: 4, seq_len: 16, dtype: fp32}
optim: {name: adamw, lr: 0.02, schedule: {name: constant}}
"""


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the models are too small for more
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that started from an imported model."""
    return trained(tmp_path_factory.mktemp(request.param), request.param)


def make_tokenizer(path: Path) -> int:
    """A small tokenizer that begins each text with <s>; its size."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=90, special_tokens=["<s>", "<|endoftext|>", "<pad>"])
    made.train_from_iterator(SENTENCES * 10, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    special = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(path)
    return made.get_vocab_size()


def trained(folder: Path, family: str) -> Path:
    """The folder of a run that started from an imported model, and everything else removed."""
    name, options, model = FAMILIES[family]
    size = make_tokenizer(folder / "hf")
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    save_random(name, SIZES | options | ids | {"vocab_size": size}, folder / "hf")
    with (folder / "text.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": f"<s>{sentence}"}) + "\n" for sentence in SENTENCES * 30)
    (folder / "job.yaml").write_text(model % MODEL + JOB)
    assert main(["import-hf", str(folder / "hf"), str(folder / "start")]) == 0
    places = [f"name={family}", f"runs_dir={folder}/runs", f"data.cache={folder}/cache"]
    data = ["data.name=jsonl", f"data.paths=[{folder}/text.jsonl]", f"data.tokenizer.path={folder}/hf/tokenizer.json"]
    assert run_rank([str(folder / "job.yaml"), *places, *data, f"checkpoint.init={folder}/start"]) == 0
    for path in folder.iterdir():
        if path.name != "runs":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return folder / "runs" / family


def generated(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["generate", *map(str, arguments), "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_import_train_export_generate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export-hf", str(run), str(out)]) == 0
    coder = transformers.AutoTokenizer.from_pretrained(out)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    prompts = ["the cat", "a dog", "my", "swims"]
    expected = []
    for prompt in prompts:
        read = coder(prompt, return_tensors="pt")
        whole = theirs.generate(read.input_ids, attention_mask=read.attention_mask, do_sample=False, max_new_tokens=30)
        expected.append(whole[0, read.input_ids.shape[1] :].tolist())
    assert [tokens[-1] for tokens in expected].count(1) >= 3  # it has learned where a sentence ends, and stops there

    options = [word for prompt in prompts for word in ("--prompt", prompt)]
    checkpoint = next((run / "checkpoints").iterdir())
    for source in (run, checkpoint, out):
        found = generated(capsys, source, *options, "--max-new-tokens", 30)
        assert [one["tokens"] for one in found] == expected
        assert [one["prompt_tokens"] for one in found] == [coder(prompt).input_ids for prompt in prompts]
        for one, tokens in zip(found, expected, strict=True):
            assert one["text"] == coder.decode(tokens, skip_special_tokens=True)
            assert one["stopped"] == ("end of text" if tokens[-1] == 1 else "length")
    assert main(["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "30"]) == 0
    assert capsys.readouterr().out == "the cat" + coder.decode(expected[0], skip_special_tokens=True) + "\n"

    module = load_checkpoint(run, torch.float64)
    read = torch.tensor([coder(prompts[0]).input_ids])
    with torch.no_grad():
        torch.testing.assert_close(module(read), load_hf(out, torch.float64)(read), rtol=0, atol=0)


@pytest.mark.sample(1)
def test_layout_of_the_run_gives_the_same_tokens(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolved = run / "config.resolved.yaml"
    before = resolved.read_text()
    routed = "experts: 4" in before
    resolved.write_text(before.replace("  tp: 1\n", "  tp: 2\n").replace("  ep: 1\n", f"  ep: {2 if routed else 1}\n"))
    try:
        arguments = ["generate", str(run), "--prompt", "the cat", "--prompt", "my", "--max-new-tokens", "8", "--json"]
        assert main(arguments) == 0
        expected = capfd.readouterr().out
        assert main([*arguments, "--layout", "run"]) == 0
        assert capfd.readouterr().out == expected
        assert main([*arguments, "--layout", "run", "--temperature", "1"]) == 2
        assert "leave out --temperature" in capfd.readouterr().err
    finally:
        resolved.write_text(before)


def test_sampling_is_repeatable_and_goes_by_the_seed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def drawn(seed: int, *how: object) -> list[int]:
        return generated(capsys, run, "--prompt", "the", "--temperature", 1.5, "--seed", seed, *how)[0]["tokens"]

    assert drawn(1) == drawn(1)
    assert len({tuple(drawn(seed)) for seed in range(4)}) > 1
    greedy = generated(capsys, run, "--prompt", "the")[0]["tokens"]
    assert drawn(7, "--top-p", 1e-9) == greedy  # the likeliest token alone is left


def test_byte_tokenizer_from_a_run_to_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i}.txt").write_text("où est le café?")
    (tmp_path / "job.yaml").write_text(f"model: {{family: llama, {MODEL}}}" + JOB)
    places = [f"runs_dir={tmp_path}/runs", f"data.cache={tmp_path}/cache"]
    data = ["data.name=text", f"data.paths=[{tmp_path}/text]", "train.steps=50"]
    assert run_rank([str(tmp_path / "job.yaml"), *places, *data]) == 0
    found = generated(capsys, tmp_path / "runs" / "run", "--prompt", "où est")
    assert (found[0]["text"], found[0]["tokens"][-1], found[0]["stopped"]) == (" le café?", 256, "end of text")

    assert main(["export-hf", str(tmp_path / "runs" / "run"), str(tmp_path / "out")]) == 0
    coder = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    read = coder("où est", return_tensors="pt")
    assert read.input_ids[0].tolist() == list("où est".encode())
    whole = theirs.generate(read.input_ids, attention_mask=read.attention_mask, do_sample=False, max_new_tokens=100)
    assert whole[0, read.input_ids.shape[1] :].tolist() == found[0]["tokens"]
    assert coder.decode(whole[0], skip_special_tokens=True) == "où est le café?"
