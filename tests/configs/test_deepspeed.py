"""A DeepSpeed JSON of the user's own: read strictly, held against the keys of the job, passed on where it may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pentad.configs import Config, UserError, load
from pentad.configs.reading.deepspeed import engine_config, zero_offload, zero_stage
from tests.jobs import DENSE

SECTION = "parallel.data.deepspeed"


def _job(folder: Path, text: str | dict[str, Any], *overrides: str) -> Config:
    file = folder / "ds.json"
    file.write_text(text if isinstance(text, str) else json.dumps(text))
    return load(DENSE, ["parallel.data.sharding=deepspeed", f"{SECTION}.config={file}", *overrides])


def _lines(folder: Path, text: str | dict[str, Any], *overrides: str) -> list[str]:
    with pytest.raises(UserError) as caught:
        _job(folder, text, *overrides)
    return [str(problem) for problem in caught.value.problems]


TRAINER = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_num_steps": "auto"}},
    "activation_checkpointing": {"enabled": False},
    "steps_per_print": 2000,
    "wall_clock_breakdown": False,
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "round_robin_gradients": False,
        "reduce_bucket_size": "auto",
        "stage3_max_live_parameters": 1000000000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""As the Hugging Face trainer's documentation has it."""


def test_a_usual_file_is_taken_as_it_is(tmp_path: Path) -> None:
    cfg = _job(tmp_path, TRAINER)
    assert (zero_stage(cfg), zero_offload(cfg)) == (3, "all")
    given = engine_config(cfg)
    assert given["zero_optimization"] == {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "reduce_bucket_size": 2 * (int(cfg.parallel.data.bucket_mib * 2**20) // 4),
        "allgather_bucket_size": 2 * (int(cfg.parallel.data.bucket_mib * 2**20) // 4),
        "stage3_max_live_parameters": 1000000000,
        "stage3_gather_16bit_weights_on_model_save": True,
    } | {key: given["zero_optimization"][key] for key in ("reduce_bucket_size", "allgather_bucket_size")}
    assert given["steps_per_print"] == 2000
    assert given["train_micro_batch_size_per_gpu"] == cfg.train.micro_batch
    assert (given["gradient_accumulation_steps"], given["gradient_clipping"]) == (1, 0.0)  # ours to do


def test_our_keys_decide_where_the_file_is_silent(tmp_path: Path) -> None:
    cfg = _job(tmp_path, {}, f"{SECTION}.stage=1", f"{SECTION}.offload=optimizer")
    given = engine_config(cfg)
    assert given["zero_optimization"]["stage"] == 1 and given["gradient_allreduce_op"] == "sum"
    assert given["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert zero_stage(load(DENSE, ["parallel.data.sharding=deepspeed"])) == 2


DIFFERING: list[tuple[dict[str, Any], list[str]]] = [
    ({"train_batch_size": 3}, ["train_batch_size=3", "set train.global_batch"]),
    ({"train_micro_batch_size_per_gpu": 64}, ["=64", "set train.micro_batch"]),
    ({"gradient_accumulation_steps": 77}, ["=77", "set train.global_batch"]),
    ({"gradient_clipping": 0.123}, ["=0.123", "set optim.clip"]),
    ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "set train.dtype"]),
    ({"fp16": {"enabled": True}}, ["fp16.enabled", "set train.dtype=bf16"]),
    ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "lamb", "set optim.name"]),
    ({"optimizer": {"params": {"lr": 7.0}}}, ["optimizer.params.lr=7", "set optim.lr"]),
    ({"optimizer": {"params": {"betas": [0.1, 0.2]}}}, ["betas=[0.1, 0.2]", "set optim.beta1"]),
    ({"zero_optimization": {"stage": 1}}, ["zero_optimization.stage=1", f"set {SECTION}.stage"]),
    ({"zero_optimization": {"stage": 0}}, ["zero_optimization.stage=0", f"set {SECTION}.stage"]),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, ["scheduler", "optim.schedule"]),
    ({"activation_checkpointing": {"partition_activations": True}}, ["activation_checkpointing", "memory.recompute"]),
    ({"zero_optimization": {"zero_quantized_weights": True}}, ["zero_quantized_weights", "leave it out"]),
    ({"zero_optimization": {"round_robin_gradients": True}}, ["round_robin_gradients", "leave it out"]),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, ["nvme", "set cpu"]),
    ({"zero_optimizatoin": {"stage": 2}}, ["zero_optimizatoin", "did you mean zero_optimization?"]),
]


@pytest.mark.parametrize(("text", "fragments"), DIFFERING)
def test_what_says_something_else_than_the_job_is_named(
    tmp_path: Path, text: dict[str, Any], fragments: list[str]
) -> None:
    (line,) = _lines(tmp_path, text, f"{SECTION}.stage=2")
    assert line.startswith(f"{SECTION}.config: ") and all(part in line for part in fragments), line


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"zero_optimization": 3}', '{"optimizer": {"params": []}}', '{"bf16": NaN}', '{"a": 1, "a": 2}'],
)
def test_a_file_that_is_none_is_one_line(tmp_path: Path, text: str) -> None:
    (line,) = _lines(tmp_path, text)
    assert line.startswith(f"{SECTION}.config: ") and "ds.json" in line


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    found = _lines(tmp_path, {"gradient_clipping": 0.123, "train_batch_size": 3, "prescale_gradients": True})
    assert len(found) == 3
