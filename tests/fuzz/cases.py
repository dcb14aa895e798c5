"""One random case: a job, what one process runs of it, and the two layouts that must train alike. By seed alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from pentad.configs import UserError
from pentad.configs.schema import Config, ModelConfig
from pentad.models.hf.families import hf_family
from tests.fuzz.corpora import TOKENS, WIDE
from tests.fuzz.draws import Draws, Keys
from tests.fuzz.jobs import checked
from tests.fuzz.layouts import draw_layout
from tests.fuzz.models import draw_model

TRIES = 60
"""Layouts that are drawn for a job before another job is."""


STARTS = {"random": 6, "checkpoint": 1, "hf": 2, "upcycled": 0.8}
"""Random weights, those of a checkpoint or a Hugging Face folder, or experts made of a dense checkpoint."""


@dataclass(frozen=True)
class Layout:
    """One way to run the job."""

    world: int
    keys: Keys
    config: Config

    def overrides(self) -> list[str]:
        """As arguments of `pentad train`."""
        return [f"{key}={_written(value)}" for key, value in self.keys.items()]


@dataclass(frozen=True)
class Case:
    """A job and its layouts.

    Args:
        seed: all that it follows from.
        family: of the tally.
        keys: the job's, without any of layout.
        alone: one process.
        first: trains from the start, and is stopped after step `resume` or saves there and goes on.
        second: goes on from there.
        start: where the first weights come from, one of `STARTS`.
        origin: the job that makes them; none: they are random.
        resume: the step.
        stopped_rank: the rank of the first layout that gets a signal; none: it is not stopped.
        refused: how often `check` refused a draw because of a key.
    """

    seed: int
    family: str
    keys: Keys
    alone: Layout
    first: Layout
    second: Layout
    start: str
    origin: Keys | None
    resume: int
    stopped_rank: int | None
    refused: Mapping[str, int]

    def yaml(self) -> str:
        """The job's file."""
        return as_yaml(self.keys)


def as_yaml(keys: Keys) -> str:
    """Sections from dotted names."""
    tree: dict[str, Any] = {}
    for key, value in keys.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def draw_case(seed: int, folder: Path, changes: Keys | None = None) -> Case:
    """The case of a seed.

    Args:
        folder: where the corpora are and the job's file is written.
        changes: keys of the job that are set after it was drawn.
    """
    draws, refused = Draws(seed), Counter[str]()
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        start = draws.pick(STARTS)
        family, keys = _draw_job(draws, folder.parent, start)
        keys |= changes or {}
        path = folder / "job.yaml"
        path.write_text(as_yaml(keys))
        alone = _accepted(path, 1, {"parallel.data.sharding": "ddp"}, refused)
        if alone is None or not _can_start(start, alone.config.model):
            continue
        first, second = (_draw_layout(draws, path, keys, refused) for _ in range(2))
        if first is not None and second is not None:
            origin, resume = _origin(keys, start), keys["checkpoint.every"]
            stopped_rank = draws.randrange(first.world) if draws.maybe(0.4) else None
            if stopped_rank is not None and draws.maybe(0.5):  # it saves nothing but what it has when it is stopped
                first = replace(first, keys=first.keys | {"checkpoint.every": 0})
            return Case(seed, family, keys, alone, first, second, start, origin, resume, stopped_rank, refused)


def _can_start(start: str, model: ModelConfig) -> bool:
    if start == "hf":
        try:
            hf_family(model)
        except UserError:
            return False
    return True


def _origin(keys: Keys, start: str) -> Keys | None:
    """The job of one process and one step whose weights the case starts from."""
    if start == "random":
        return None
    dense = start == "upcycled"
    kept = {key: value for key, value in keys.items() if not (dense and key.startswith("model.moe."))}
    kept = {key: value for key, value in kept.items() if not key.startswith(("optim.", "eval."))}
    return kept | {
        "train.steps": 1,
        "train.seed": keys["train.seed"] + 1,
        "checkpoint.every": 0,
        "optim.name": "sgd",
        "optim.lr": 0.1,
    }


def _draw_layout(draws: Draws, path: Path, keys: Keys, refused: Counter[str]) -> Layout | None:
    for _ in range(TRIES):
        layout = _accepted(path, *draw_layout(draws, keys), refused)
        if layout is not None:
            return layout
    return None


def _accepted(path: Path, world: int, keys: Keys, refused: Counter[str]) -> Layout | None:
    overrides = [f"{key}={_written(value)}" for key, value in keys.items()]
    try:
        return Layout(world, keys, checked(path, overrides, world))
    except UserError as error:
        refused.update({problem.key for problem in error.problems})
        return None


def _written(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)


def _draw_job(draws: Draws, corpora: Path, start: str) -> tuple[str, Keys]:
    family, model = draw_model(draws, upcycled=start == "upcycled")
    steps = draws.choice([3, 4])
    micro = draws.pick({1: 2, 2: 2, 3: 0.5, 4: 0.5})
    keys = model | {
        "name": "run",
        "train.steps": steps,
        "train.micro_batch": micro,
        "train.global_batch": micro * draws.pick({2: 1, 4: 3, 6: 1, 8: 2, 12: 1}),
        "train.seq_len": draws.pick({16: 3, 24: 2, 32: 1, 20: 0.5, 12: 0.5}),
        "train.seed": draws.randrange(1000),
        "train.dtype": draws.pick({"fp64": 8, "fp32": 1, "bf16": 1}),
        "train.device": "cpu",
        "train.deterministic": draws.pick({True: 0.05, "elastic": 0.05, False: 0.9}),
        "eval.every": draws.pick({0: 1, 1: 2, 2: 1}),
        "eval.steps": draws.choice([1, 2]),
        "checkpoint.every": draws.randint(1, steps - 1),
        "checkpoint.keep": 0,
        "faults.timeout_s": 60,
        "faults.record_entries": 4096,
        "hardware.peak_tflops": 1.0,
    }
    if keys["train.dtype"] != "fp32":  # in which rounding tips a value over to the next code now and then
        keys["train.fp8"] = Draws(keys["train.seed"]).pick({"none": 8, "tensor": 1, "row": 1, "block": 0.5})
    keys |= _data(draws, corpora) | _optimizer(draws, steps, keys["train.dtype"])
    return family, keys | _prompts(draws, keys)


def _data(draws: Draws, corpora: Path) -> Keys:
    name = draws.pick({"bin": 5, "blend": 2, "jsonl": 2})
    keys: Keys = {"data.name": name, "data.document_mask": draws.maybe(0.5), "data.holdout": 0.1}
    keys["model.vocab"] = draws.choice([64, 96, 128, 192])
    assert min(64, 96) >= TOKENS
    if name == "bin":
        keys["data.paths"] = [str(corpora / "walk")]
    elif name == "blend":
        keys["data.weights"] = {str(corpora / "walk"): 0.7, str(corpora / "jumps"): 0.3}
    else:
        keys |= {"data.paths": [str(corpora / "lines.jsonl")], "data.cache": str(corpora / "cache")}
        keys["model.vocab"] = draws.choice([288, 320, 384])
        assert WIDE <= 288
    if draws.maybe(0.2):
        keys["model.vocab_used"] = (TOKENS if name != "jsonl" else WIDE) + draws.randint(0, 3)
    if name != "jsonl" and draws.maybe(0.3):
        keys["data.eod"] = 7
    return keys


def _prompts(draws: Draws, keys: Keys) -> Keys:
    """Texts that evaluations continue, where there is a tokenizer and padding does not count."""
    exact = keys["train.dtype"] == "fp64"
    counts = keys.get("model.moe.router.name") == "expert_choice" or "model.moe.capacity_factor" in keys
    counts |= keys.get("train.fp8") == "tensor"
    if keys["data.name"] != "jsonl" or not keys["eval.every"] or not exact or counts or draws.maybe(0.2):
        return {}
    return {"eval.prompts": ["line", "3 14", "7"][: draws.randint(1, 3)], "eval.prompt_tokens": draws.randint(1, 4)}


def _optimizer(draws: Draws, steps: int, dtype: str) -> Keys:
    keys: Keys = {
        "optim.name": draws.pick({"adamw": 2, "sgd": 1}),
        "optim.weight_decay": draws.choice([0.0, 0.1]),
        "optim.clip": draws.pick({1.0: 2, 0.0: 1, 0.05: 1}),
        "optim.schedule.name": draws.choice(["constant", "linear", "cosine", "wsd"]),
        "optim.schedule.warmup_steps": draws.choice([0, 1]),
    }
    if keys["optim.schedule.name"] == "wsd":
        keys["optim.schedule.decay_steps"] = draws.randint(1, steps - 1)
    if keys["optim.name"] == "sgd":
        return keys | {"optim.lr": draws.choice([0.01, 0.1]), "optim.momentum": draws.choice([0.0, 0.9])}
    keys |= {"optim.lr": draws.choice([1e-3, 5e-3]), "optim.impl": draws.choice(["auto", "fused", "foreach"])}
    if dtype != "fp64":  # where rounding tips a moment over to the next code now and then
        return keys
    states = draws.pick({"fp32": 3, "bf16": 0.5, "int8": 0.5, "int4": 1})
    return keys | {"optim.states": states} | ({"optim.states_above": 64} if states.startswith("int") else {})
