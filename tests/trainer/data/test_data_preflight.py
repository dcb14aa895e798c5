"""What is said before a run starts: problems by the run's own rules, and what it will see."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pentad.configs import load
from pentad.configs.errors import UserError
from pentad.configs.schema import BinData, BlendData, Config, DataConfig, JsonlData, TextData, TokenizerConfig
from pentad.trainer.data import preflight
from pentad.trainer.data.dataset import open_data
from pentad.trainer.data.indexed import IndexedWriter
from pentad.trainer.data.plan import describe_data, plan_data
from pentad.trainer.data.preflight import data_problems

T = 16


@pytest.fixture
def job(tmp_path: Path) -> Config:
    cfg = load("demo", [f"data.cache={tmp_path / 'cache'}"])
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seq_len=T))


def write(prefix: Path, tokens: int, largest: int = 99) -> str:
    with IndexedWriter(str(prefix), np.dtype("u2")) as writer:
        writer.add(np.resize(np.arange(largest + 1, dtype=np.uint16)[::-1], tokens))
    return str(prefix)


def folder(path: Path, texts: list[str]) -> str:
    path.mkdir()
    for i, text in enumerate(texts):
        (path / f"{i}.txt").write_text(text)
    return str(path)


def make_case(case: str, tmp: Path) -> DataConfig:
    cache = str(tmp / "cache")
    match case:
        case "missing prefix":
            return BinData(paths=(str(tmp / "gone"), write(tmp / "x", 400)))
        case "short bin":
            return BinData(paths=(write(tmp / "x", T),))
        case "nothing to train on":
            return BinData(paths=(write(tmp / "x", T + 1),))
        case "short in a blend":
            return BlendData(weights={write(tmp / "x", 400): 1.0, write(tmp / "y", 5): 1.0, write(tmp / "z", 3): 0.0})
        case "ids":
            return BinData(paths=(write(tmp / "x", 400, largest=999),))
        case "no match":
            return TextData(paths=(str(tmp / "*.nope"), folder(tmp / "text", ["a" * 400])), cache=cache)
        case "short text":
            return TextData(paths=(folder(tmp / "text", ["a" * 5] * 2),), cache=cache)
        case "all of the text held out":
            return TextData(paths=(folder(tmp / "text", ["a" * 15] * 18),), holdout=0.99, cache=cache)
        case "empty text":
            return TextData(paths=(folder(tmp / "text", ["", ""]),), cache=cache)
        case "bad line":
            (tmp / "x.jsonl").write_text('{"text": "a"}\n{"txt": "a"}\n')
            return JsonlData(paths=(str(tmp / "x.jsonl"),), cache=cache)
        case "tokenizer":
            path = str(tmp / "gone.json")
            return TextData(
                paths=(folder(tmp / "text", ["a" * 400]),), tokenizer=TokenizerConfig(path=path), cache=cache
            )
        case "cache":
            (tmp / "file").write_text("")
            return TextData(paths=(folder(tmp / "text", ["a" * 400]),), cache=str(tmp / "file" / "cache"))
        case _:
            return TextData(paths=(folder(tmp / "text", ["a" * 15] * 3),), holdout=0.5, cache=cache)


CASES = {
    "missing prefix": "data.paths: no such file: .*gone.bin",
    "short bin": "data: .*x has 16 tokens, but one sequence needs 17",
    "nothing to train on": "data.holdout: .*1 sequences of 16 tokens",
    "short in a blend": "data: .*y has 5 tokens",
    "ids": "model.vocab: .*token id 999, but the model has 320",
    "no match": r"data.paths: no file matches .*\.nope",
    "short text": "data: text has 12 tokens",
    "all of the text held out": "data.holdout: text has 17 sequences",
    "empty text": "data.paths: no text in 2 files",
    "bad line": "data.field: .*x.jsonl:2: no field 'text'",
    "tokenizer": "data.tokenizer.path: no such file",
    "cache": "data.cache: cannot write",
    "enough": "",
}


@pytest.mark.parametrize("case", CASES)
def test_a_job_is_refused_before_its_ranks_start_just_as_by_them(case: str, job: Config, tmp_path: Path) -> None:
    data = make_case(case, tmp_path)
    cfg = dataclasses.replace(job, data=data, model=dataclasses.replace(job.model, vocab=320))
    found = data_problems(cfg)
    try:
        open_data(data, seq_len=T, vocab=320, seed=0, progress=False)
        refused = []
    except UserError as error:
        refused = error.problems
    assert [problem.key for problem in found] == [problem.key for problem in refused]
    assert found == refused or case == "cache"
    assert re.search(CASES[case], "\n".join(map(str, found))) if CASES[case] else not found


@pytest.mark.parametrize("holdout", [0, 0.01, 0.3, 0.5, 0.74, 0.76, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("seq_len", [1, 7])
def test_enough_tokens_are_always_enough(holdout: float, seq_len: int) -> None:
    enough = preflight.enough_tokens(seq_len, holdout)
    for tokens in range(enough, enough + 3000 * seq_len, seq_len):
        assert isinstance(preflight.split_windows("x", tokens, seq_len, holdout), tuple)


def test_only_as_much_text_is_read_as_settles_the_question(job: Config, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "a" * 10})] * 500
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "broken further on"]))
    data = JsonlData(paths=(str(tmp_path / "x.jsonl"),), cache=str(tmp_path / "cache"))
    assert not data_problems(dataclasses.replace(job, data=data))


def test_problems_are_found_without_torch() -> None:
    code = "import sys, pentad.trainer.data.preflight; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_plan_counts_sequences_epochs_and_held_out(tmp_path: Path) -> None:
    weights = {write(tmp_path / "big", 100 * T + 1): 0.5, write(tmp_path / "small", 10 * T + 1): 0.5}
    data = open_data(BlendData(weights=weights, holdout=0.1), seq_len=T, vocab=100, seed=0)
    plan = plan_data(data, steps=18, global_batch=4, eval_steps=5)
    assert (plan.sequences, plan.drawn, plan.heldout, plan.eval_steps) == (99, 72, 11, 2)
    assert (plan.epochs, plan.source) == (4.0, str(tmp_path / "small"))
    lines = describe_data(plan)
    assert "72 drawn: 4 epochs of " in lines[0]
    assert "11 sequences, an evaluation takes 8 of them in 2 steps" in lines[1]
    assert lines[2].startswith("warning: eval.steps=5, but 11 held-out sequences fill only 2 steps of 4")
    few = describe_data(plan_data(data, steps=1, global_batch=128, eval_steps=0))
    assert few[-1].startswith("warning: a step takes 128 sequences, but there are only 99")
