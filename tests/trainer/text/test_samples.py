"""Text from a model in training: the tokens of one process's whole forwards, in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pentad.configs import UserError, load
from pentad.configs.schema import Config, MoeConfig, RouterConfig
from pentad.trainer.__main__ import main as run_rank
from pentad.trainer.preflight import preflight
from pentad.trainer.text.samples import PromptSampler
from tests.distributed import run_distributed
from tests.training import Run, job

PROMPTS = ["abc", "h", "lmnopq", "xyzxyz", "cc"]
STOP = 7


class Letters:
    """One token a letter."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(one + 96) for one in ids)


def sampled(rank: int, world: int, cfg: Config, trains: bool) -> list[tuple[int, ...]]:
    run = Run(rank, cfg)
    try:
        sampler = PromptSampler(cfg, run.mesh, run.parts.pipeline, run.stepper, Letters(), {STOP})
        if trains:
            run.step(0)
        found = sampler(PROMPTS, 9)
        if trains:
            run.step(1)  # goes on as before
        assert [sample.prompt for sample in found] == PROMPTS
        return [sample.tokens for sample in found]
    finally:
        run.close()


def expected(cfg: Config) -> list[tuple[int, ...]]:
    """From whole forwards of the whole model; nothing of the sampler."""
    run, found = Run(0, cfg), []
    try:
        run.step(0)
        for prompt in PROMPTS:
            ids = torch.tensor([Letters().encode(prompt)])
            made: list[int] = []
            while len(made) < 9 and ids.shape[1] < cfg.train.seq_len and STOP not in made:
                with torch.no_grad():
                    made.append(int(run.parts.model(ids)[0, -1].argmax()))
                ids = torch.cat((ids, torch.tensor([made[-1:]])), dim=1)
            found.append(tuple(made))
        return found
    finally:
        run.close()


MODEL: dict[str, Any] = {"vocab": 64, "layers": 4, "init_std": 0.4}
ROUTED = MODEL | {"moe": MoeConfig(experts=4, ffn=24, router=RouterConfig(groups_kept=1))}
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one process": (MODEL, {}),
    "tp": (MODEL, {"tp": 2}),
    "padded vocabulary": (MODEL | {"vocab": 128, "vocab_used": 64}, {"tp": 2, "dp": 2}),
    "zero1": (MODEL, {"dp": 2, "sharding": "zero1"}),
    "fsdp": (MODEL, {"dp": 2, "sharding": "fsdp2"}),
    "context": (MODEL, {"cp": 2}),
    "pipeline": (MODEL, {"pp": 2, "dp": 2}),
    "empty stage": (MODEL, {"pp": 2, "pipeline": {"layers": (4, 0)}}),
    "balanced vocabulary": (MODEL, {"pp": 2, "tp": 2, "pipeline": {"vocab": "balanced"}}),
    "experts": (ROUTED, {"dp": 2, "ep": 2}),
}


@pytest.mark.sample(2)
@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_tokens_of_one_process(name: str) -> None:
    model, layout = LAYOUTS[name]
    plain = model | {"vocab": 64}
    plain.pop("vocab_used", None)
    if name == "padded vocabulary":  # other random weights than those of the smaller table
        wanted = expected(job(model=model))
    else:
        wanted = expected(job(model=plain))
    assert len({len(tokens) for tokens in wanted}) > 1 or name != "one process"  # some end early
    cfg = job(model=model, **layout)
    world = cfg.parallel.ranks
    for found in run_distributed(sampled, world, cfg, True, group=False) if world > 1 else [sampled(0, 1, cfg, True)]:
        assert found == wanted


JOB = """
model: {family: llama, layers: 2, hidden: 32, heads: 4, ffn: 64}
train: {steps: 2, global_batch: 2, seq_len: 32, dtype: fp32}
optim: {name: adamw}
data: {name: stdlib}
eval: {every: 1, steps: 1, prompts: ["def main(", "class "], prompt_tokens: 5}
"""


def test_evaluations_continue_the_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    assert run_rank([str(tmp_path / "job.yaml"), f"runs_dir={tmp_path}/runs"]) == 0
    events = [json.loads(line) for line in (tmp_path / "runs" / "run" / "events.jsonl").read_text().splitlines()]
    samples = [event for event in events if event["event"] == "sample"]
    assert [(one["step"], one["prompt"]) for one in samples] == [
        (step, prompt) for step in (1, 2) for prompt in ("def main(", "class ")
    ]
    assert all(len(one["tokens"]) == 5 or one["tokens"][-1] == 256 for one in samples)
    assert capsys.readouterr().out.count("sample: def main( … ") == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.every=0"], r"eval\.prompts: are continued by evaluations, and eval\.every=0 makes none"),
        (["eval.prompt_tokens=0"], r"eval\.prompt_tokens: must be at least 1, got 0"),
        (["train.seq_len=8"], r"eval\.prompts: .def main\(. has 9 tokens; .* fewer than train\.seq_len=8"),
        (['eval.prompts=[""]'], r"eval\.prompts: .* has 0 tokens; a prompt has at least 1"),
    ],
)
def test_prompts_that_cannot_be_continued(overrides: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    with pytest.raises(UserError, match=message):
        preflight(load(tmp_path / "job.yaml", overrides))
