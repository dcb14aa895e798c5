"""Wrong command lines, all run one after the other in one process: what each printed, and whether it imported torch.

A test imports torch long before, so this runs by itself: `python -m tests.launch.wrong_inputs FOLDER`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB = """\
name: wrong
model: {family: llama, layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320}
train: {steps: 4, global_batch: 4, micro_batch: 2, seq_len: 32, dtype: fp32}
optim: {name: adamw, schedule: {name: cosine, warmup_steps: 1}}
data: {name: stdlib}
"""


@dataclass(frozen=True)
class Case:
    """A wrong command line.

    Args:
        argv: the arguments; {tmp} stands for the folder of `prepare`, {job} for its valid job.
        parts: what the message must contain: what is wrong, and the way out.
        torch: the answer may need torch.
        lines: how many mistakes there are.
    """

    argv: tuple[str, ...]
    parts: tuple[str, ...]
    torch: bool = False
    lines: int = 1

    @property
    def name(self) -> str:
        """For the test's id."""
        return " ".join(self.argv)


def train(*overrides: str, says: tuple[str, ...], lines: int = 1, torch: bool = False) -> Case:
    """`pentad train` of the valid job with wrong overrides."""
    return Case(("train", "{job}", *overrides), says, lines=lines, torch=torch)


_P = "parallel.pipeline"
VALUES = [
    train("train.steps=many", says=("an integer", "'many'")),
    train("train.steps=1:30", says=("an integer", "write one number")),
    train("train.steps=0x10", says=("decimal",)),
    train("train.steps=1,000", says=("without a comma",)),
    train("train.steps=", says=("has no value", "train.steps=VALUE")),
    train("train.steps=0", says=("at least 1", "0")),
    train("train.steps", "10", says=("write train.steps=10",)),
    train("train.steps=", "10", says=("write train.steps=10",)),
    train("steps", "10", says=("write train.steps=10",)),
    train("train.stpes=3", says=("did you mean train.steps?",)),
    train("train.stеps=3", says=("did you mean train.steps?", "CYRILLIC")),
    train("tensor_parallel_size=2", says=("did you mean parallel.tp?",)),
    train("train.batch_size=8", says=("did you mean train.global_batch?",)),
    train("learning_rate=1", says=("did you mean optim.lr?",)),
    train("model.num_hidden_layers=3", says=("did you mean model.layers?",)),
    train("--train.steps=3", says=("without dashes: train.steps=3",)),
    train("--lr", "3", says=("without dashes",)),
    train("+train.steps=3", says=("write train.steps=VALUE",)),
    train("train.dtype=bfloat16", says=("did you mean bf16?",)),
    train("train.dtype=fp16", says=("loss scaling", "set bf16")),
    train("optim.name=adam", says=("did you mean adamw?",)),
    train("optim.schedule.name=cos", says=("did you mean cosine?",)),
    train("optim.lr=0,001", says=("with a point",)),
    train("optim.momentum=0.9", says=("optim.name=sgd", "optim.name is adamw")),
    train("train.deterministic=maybe", says=("true or false",)),
    train("log.profile=1,2", says=("[1, 2]",)),
    train("log.profile[0]=3", says=("log.profile=[…]",)),
    train("model=llama3_8b", says=("set model.preset=llama3_8b",)),
    train("optim=adamw", says=("did you mean optim.name=adamw?",)),
    train("name=" + "x" * 300, says=("300 bytes", "shorten it")),
    train("optim=adam", says=("is a section with name, lr",)),
    train("name=a/b", says=("slash",)),
    train("name=${oc.env:PENTAD_NOT_SET}", says=("'PENTAD_NOT_SET' not found",)),
    train("name=${nope:x}", says=("known are oc.env",)),
    train("name=${name}", says=("refers to itself",)),
    train("memory.recompute=true", says=("did you mean full?",)),
    train("optim.schedule.warmup_steps=9", says=("9 is more than train.steps=4", "set it to 4")),
]
LAYOUTS = [
    train("parallel.tp=3", "train.seq_len=33", says=("parallel.tp=3",), lines=4),
    train("parallel.tp=8", says=("parallel.tp=8",)),
    train("parallel.cp=3", says=("set train.seq_len=33",)),
    train("parallel.dp=3", says=("set train.global_batch=6",)),
    train("parallel.ep=2", says=("model.moe.experts=0", "set parallel.ep=1")),
    train("parallel.pp=2", "parallel.data.sharding=fsdp2", says=("set parallel.data.sharding=zero1",)),
    train("parallel.pp=2", f"{_P}.schedule=zb-h1", f"{_P}.chunks=2", says=("1 chunk", "gis")),
    train("parallel.pp=2", f"{_P}.layers=[1, 2]", says=("sums to 3", "model.layers=2")),
    train(f"{_P}.schedule=interleaved_1f1b", says=("did you mean interleaved?",)),
    train("model.heads=3", "model.head_dim=8", says=("model.heads: 3", "model.kv_heads=2")),
    train("model.vocab=64", says=("257", "model.vocab=320")),
    train("hardware.memory_gib=1e-4", says=("per rank are needed", "set "), torch=True),
    train("train.device=cuda", says=("GPU",), torch=True),
    Case(("check", "{job}", "parallel.cp=3"), ("set train.seq_len=33",)),
]
FILES = [
    train("data.name=text", "data.paths={tmp}/corpsu.txt", says=("did you mean {tmp}/corpus.txt?",)),
    train("data.name=text", "data.paths={tmp}/nowhere/a.txt", says=("there is no folder {tmp}/nowhere",)),
    train("data.name=text", "data.paths={tmp}/corpus.txt,{tmp}/corpus.txt", says=("write data.paths=[",)),
    train("data.name=text", "data.paths={tmp}/*.nothing", says=("no such file",)),
    train("data.name=text", "data.paths={tmp}/empty.txt", says=("no text",)),
    train("data.name=text", "data.paths=[]", says=("empty",)),
    train("data.name=text", says=("data.paths: missing",)),
    train("data.name=txt", says=("did you mean text?",)),
    train("data.name=jsonl", "data.paths={tmp}/bad.jsonl", says=("bad.jsonl:2",)),
    train("data.name=bin", "data.paths={tmp}/nothing.bin", says=("no such file",), lines=2),
    train("data.name=bin", "data.paths={tmp}/magic.bin", says=("magic.idx",)),
    train("data.tokenizer.path={tmp}", says=("is a folder without tokenizer.json",)),
    train("data.tokenizer.path={tmp}/bad/tokenizer.json", says=("tokenizer.json",)),
    train("data.tokenizer.path=~nobody-like-that/t.json", says=("home folder of a user who is not known",)),
    train("runs_dir={tmp}/empty.txt", says=("cannot be written", "set runs_dir")),
    train("checkpoint.dir={tmp}/empty.txt/x", says=("cannot be written", "set checkpoint.dir")),
    train("checkpoint.resume={tmp}/nowhere", says=("no such file",)),
    train("checkpoint.resume=auto", says=("write checkpoint.resume=latest",)),
    train("checkpoint.resume={tmp}/bad", says=("bad",)),
    train("checkpoint.init={tmp}/bad", says=("bad",)),
    train("checkpoint.init={tmp}/hf", says=("BertModel", "LlamaForCausalLM"), torch=True),
    train("checkpoint.init={tmp}/broken-hf", says=("config.json",), torch=True),
    train("name=used", says=("holds an earlier run", "checkpoint.resume=latest", "--fresh")),
    train("name=used", "checkpoint.resume=latest", says=("damaged", "name a good one")),
    train("log.wandb=1", "log.wandb_project=", says=("has no value",)),
    train("checkpoint.init={tmp}/bad", "checkpoint.resume={tmp}/bad", says=("exclude each other",)),
    train("checkpoint.upcycle=true", says=("set checkpoint.init", "experts"), lines=2),
    train("checkpoint.resume=", says=("has no value", "null for none")),
    train("model.preset=lama3_8b", says=("did you mean llama3_8b?",)),
    train("hardware.preset=h100", says=("there are h100_nvl",)),
]
JOBS = [
    Case(("train", "llama3_8b"), ("is a model", "pentad train job.yaml")),
    Case(("train", "h100_sxm"), ("is a device", "hardware.preset=h100_sxm")),
    Case(("train", "dmo"), ("did you mean demo?",)),
    Case(("train", "{tmp}/jbo.yaml"), ("did you mean {tmp}/job.yaml?",)),
    Case(("train", "{tmp}"), ("is a folder", "job.yaml")),
    Case(("train", "{tmp}/runs/old"), ("is a run's folder", "runs/old/config.yaml")),
    Case(("train", "train.steps=3"), ("is an override", "CONFIG comes before it")),
    Case(("train", "{tmp}/tabs.yaml"), ("tabs.yaml:2", "spaces, not tabs")),
    Case(("train", "{tmp}/twice.yaml"), ("twice.yaml:3", "duplicate key steps")),
    Case(("train", "{tmp}/star.yaml"), ("star.yaml:1", "put quotes around")),
    Case(("train", "{tmp}/list.yaml"), ("at its top level",)),
    Case(("train", "{tmp}/utf16.yaml"), ("save it as UTF-8",)),
    Case(("train", "{tmp}/python.yaml"), ("the tag", "is not read")),
    Case(("train", "{tmp}/magic.bin"), ("cannot be read", "is it a YAML file?")),
    Case(("show", "{tmp}/twice.yaml"), ("duplicate key",)),
    Case(("check", "llama3_8b"), ("is a model",)),
]
COMMANDS = [
    Case((), ("which command?", "train, check")),
    Case(("trian",), ("did you mean train?",)),
    Case(("run", "demo"), ("did you mean train?",)),
    Case(("demo",), ("write pentad train demo",)),
    Case(("train",), ("CONFIG", "--help")),
    Case(("show",), ("CONFIG, or --keys SECTION",)),
    Case(("show", "--keys", "optimm"), ("did you mean optim?",)),
    Case(("check", "demo", "--verbose"), ("unknown argument --verbose",)),
    Case(("flops", "llama3_8b"), ("--seq-len",)),
    Case(("flops", "llama3_8b", "--seq-len", "long"), ("--seq-len", "'long'")),
    Case(("flops", "llama3_8b", "--seq-len", "0"), ("at least 1",)),
    Case(("flops", "llama9_8b", "--seq-len", "8"), ("did you mean llama",)),
    Case(("schedule", "1f2b", "--ranks", "2", "--microbatches", "4"), ("1f2b",)),
    Case(("schedule", "1f1b"), ("--ranks 4", "--microbatches 4"), lines=2),
    Case(("schedule", "1f1b", "--ranks", "0", "--microbatches", "4"), ("0",)),
    Case(("schedule", "{tmp}/nowhere"), ("nowhere", "give a run's folder")),
    Case(("tokenize", "{tmp}/nowhere.txt", "--tokenizer", "byte", "--out", "{tmp}/x"), ("nowhere.txt",)),
    Case(("tokenize", "{tmp}/corpus.txt", "--out", "{tmp}/x"), ("--tokenizer",)),
    Case(("tokenize", "{tmp}/corpus.txt", "--tokenizer", "gpt2", "--out", "{tmp}/x"), ("gpt2",)),
    Case(("import-hf", "{tmp}/nowhere", "{tmp}/x"), ("nowhere",), torch=True),
    Case(("import-hf", "{tmp}/bad", "{tmp}/x"), ("config.json",), torch=True),
    Case(("import-hf", "{tmp}/hf", "{tmp}/x"), ("BertModel", "LlamaForCausalLM"), torch=True),
    Case(("import-hf", "{tmp}/broken-hf", "{tmp}/x"), ("config.json",), torch=True),
    Case(("export-hf", "{tmp}/runs/used", "{tmp}/x"), ("runs/used",), torch=True),
    Case(("import-hf", "{tmp}/bad", "{tmp}/x", "--upcycle", "experts=8"), ("--upcycle", "top_k"), torch=True),
    Case(("generate", "{tmp}/nowhere", "--prompt", "x"), ("nowhere",), torch=True),
    Case(("generate", "{tmp}/bad", "--prompt", "x"), ("bad",), torch=True),
    Case(("generate", "{tmp}/hf", "--prompt", "x"), ("BertModel",), torch=True),
    Case(("generate", "{tmp}/hf"), ("--prompt",), torch=True),
    Case(("generate", "{tmp}/hf", "--prompt", "x", "--temperature", "-1"), ("temperature",), torch=True),
    Case(("generate", "{tmp}/hf", "--prompt", "x", "--top-p", "2"), ("top-p",), torch=True),
    Case(("generate", "{tmp}/hf", "--prompt", "x", "--dtype", "int8"), ("int8", "bf16")),
    Case(("export-hf", "{tmp}/nowhere", "{tmp}/x"), ("nowhere",), torch=True),
    Case(("export-hf", "{tmp}/bad", "{tmp}/x"), ("bad",), torch=True),
    Case(("export-hf", "{tmp}/bad", "{tmp}/x", "--dtype", "int8"), ("int8", "bf16")),
]
CASES = [*VALUES, *LAYOUTS, *FILES, *JOBS, *COMMANDS]


def prepare(folder: Path) -> None:
    """Makes the valid job and the damaged files."""
    texts = {
        "job.yaml": JOB + f"runs_dir: {folder}/runs\n",
        "corpus.txt": "some text",
        "empty.txt": "",
        "bad.jsonl": '{"text": "fine"}\n{"text": \n',
        "tabs.yaml": "train:\n\tsteps: 1\n",
        "twice.yaml": "train:\n  steps: 1\n  steps: 2\n",
        "star.yaml": "data: {name: text, paths: [*.txt]}\n",
        "list.yaml": "- train\n",
        "python.yaml": "name: !!python/object/apply:os.getcwd []\n",
        "magic.idx": "NOTANIDX" * 8,
        "bad/tokenizer.json": "{}",
        "runs/old/config.yaml": JOB,
        "runs/used/checkpoints/step-00000002/manifest.json": "{}",
        "runs/used/metrics.jsonl": "",
        "hf/config.json": '{"architectures": ["BertModel"]}',
        "broken-hf/config.json": '{"architectures": ["LlamaForCausalLM"',
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "utf16.yaml").write_bytes("name: x\n".encode("utf-16"))
    (folder / "magic.bin").write_bytes(b"\xff" * 64)


def filled(case: Case, folder: Path) -> tuple[list[str], list[str]]:
    """Arguments and expected parts with the folder's name in them."""

    def fill(text: str) -> str:
        return text.replace("{job}", f"{folder}/job.yaml").replace("{tmp}", str(folder))

    return [fill(a) for a in case.argv], [fill(part) for part in case.parts]


def run_all(folder: Path) -> list[dict[str, Any]]:
    """Runs every case in this process, those that need no torch first; exit code, output and torch of each."""
    from pentad.launch.cli import main

    def no_rank(*_: object, **__: object) -> None:
        raise AssertionError("a rank was started")

    subprocess.Popen = no_rank  # type: ignore[misc, assignment]
    results: dict[str, dict[str, Any]] = {}
    for case in sorted(CASES, key=lambda c: c.torch):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code: object = main(filled(case, folder)[0])
            except BaseException:
                code = traceback.format_exc()
        loaded = "torch" in sys.modules
        results[case.name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "torch": loaded}
    return [results[case.name] for case in CASES]


if __name__ == "__main__":
    for variable in ("RANK", "WORLD_SIZE", "PENTAD_NOT_SET"):
        os.environ.pop(variable, None)
    where = Path(sys.argv[1])
    (where / "results.json").write_text(json.dumps(run_all(where)))
