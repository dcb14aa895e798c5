"""The parts of `gpu.py`: each a function of the settings that returns what it found, for JSON.

Each imports what it needs, so that a missing library ends its own part only.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Of a run.

    Args:
        device: cuda or cpu; on a CPU everything is small and says nothing about a GPU.
        folder: for results and runs.
        steps: timed ones of each training.
    """

    device: str
    folder: Path
    steps: int = 12

    @property
    def small(self) -> bool:
        """Whether sizes are those of a test."""
        return self.device == "cpu"


Found = dict[str, Any]
_TINY = {
    "model.layers": 2, "model.hidden": 32, "model.heads": 4, "model.kv_heads": 2, "model.head_dim": 8, "model.ffn": 64,
    "model.vocab": 320, "model.max_positions": 64,
}  # fmt: skip
_EXPERTS = {"model.family": "mixtral", "model.moe.experts": 4, "model.moe.top_k": 2, "model.moe.ffn": 32}
JOBS: dict[str, dict[str, Any]] = {
    "3B": {"model.preset": "llama3.2_3b", "memory.recompute": "auto"},
    "8B-shaped": {"model.preset": "llama3.1_8b", "model.layers": 8},
    "8 experts, top 2": {"model.preset": "mixtral_8x7b", "model.layers": 2},
}
"""What is trained for speed: whole models where one device has room, else some layers of them."""


def _config(settings: Mapping[str, Any], **train: Any) -> Any:
    from pentad.configs.load import load

    given = {**settings, "data.name": "stdlib", **{f"train.{key}": value for key, value in train.items()}}
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    return load(None, overrides, world_size=1)


def _losses(model: Mapping[str, Any], device: str, dtype: str, steps: int) -> list[float]:
    """Of a tiny model on random text, drawn alike for every device."""
    from pentad.parallel.record.ring import Recorder
    from pentad.trainer.data.dataset import Microbatch
    from pentad.trainer.session import Here, Session

    kernels = "auto" if dtype == "bf16" else "torch"
    cfg = _config(
        {**_TINY, **model, "optim.name": "adamw", "optim.lr": 3e-3}, steps=steps, global_batch=4, micro_batch=2,
        seq_len=64, dtype=dtype, device=device, kernels=kernels,
    )  # fmt: skip
    session = Session.open(cfg, [0], 0, here=Here(0, None, torch.device(device), Recorder(None, rank=0, world=1)))
    losses = []
    for step in range(steps):
        walks = torch.randint(1, 4, (4, 65), generator=torch.Generator().manual_seed(step)).cumsum(1) % 320
        batches = [
            Microbatch(rows[:, :-1], rows[:, 1:].contiguous(), None, None, torch.arange(2) + 2 * i, 128, 0)
            for i, rows in enumerate(walks.split(2))
        ]
        losses.append(float(session.stepper.run(step, batches, 256, cfg.optim.lr).loss))
    session.close()
    return losses


def path(settings: Settings) -> Found:
    """The device, and what was found of kernels before their first use."""
    device = torch.device(settings.device)
    found: Found = {"torch": torch.__version__, "device": settings.device}
    if settings.small:
        return found
    from pentad.parallel.kernels.device import cudnn_runs
    from pentad.parallel.kernels.packed_flash import packs
    from pentad.trainer.devices.kernels import triton_problem

    half = torch.bfloat16
    return found | {
        "device": torch.cuda.get_device_name(device),
        "cuda": torch.version.cuda,
        "triton": triton_problem(device) or "right",
        "cudnn attention": {width: cudnn_runs(device, half, *width) for width in ((64, 64), (128, 128), (192, 128))},
        "varlen attention": packs(device, half),
    }


def curves(settings: Settings) -> Found:
    """Losses of a dense model and of experts against the CPU's in fp64: the largest relative differences."""
    steps, found = 3 if settings.small else 10, {}
    for name, model in {"dense": {"model.family": "llama"}, "experts": _EXPERTS}.items():
        exact = _losses(model, "cpu", "fp64", steps)
        for dtype, limit in (("fp32", 1e-3), ("bf16", 3e-2)):
            losses = _losses(model, settings.device, dtype, steps)
            worst = max(abs(a - b) / b for a, b in zip(losses, exact, strict=True))
            found[f"{name}, {dtype}"] = {"difference": worst, "right": worst < limit}
    return found


def _seconds(work: Callable[[], object], device: str) -> float:
    def done() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    work()
    begin, count = done(), 0
    while (passed := done() - begin) < (0.002 if device == "cpu" else 0.2) or not count:
        work()
        count += 1
    return passed / count


def kernels(settings: Settings) -> Found:
    """Microseconds of elementwise parts forward and backward, by torch's operators and by Triton's kernels."""
    from pentad.models import functional

    n, h, f = (8, 64, 96) if settings.small else (8192, 4096, 14336)
    half: dict[str, Any] = {"dtype": torch.bfloat16, "device": settings.device}
    x, gate, up = torch.randn(n, h, **half), torch.randn(n, f, **half), torch.randn(n, f, **half)
    weight, heads = torch.ones(h, **half), torch.randn(1, n, h // 32, 32, **half)
    angle = torch.rand(1, n, 1, 16, device=settings.device)
    cases: dict[str, tuple[Any, list[Tensor], tuple[Any, ...]]] = {
        "RMSNorm": (functional.rms_norm, [x, weight], (1e-5,)),
        "SwiGLU": (functional.swiglu, [gate, up], ()),
        "rotary embedding": (functional.rotate, [heads], (angle.cos(), angle.sin())),
    }
    ours: dict[str, Any] = {}
    if not settings.small:
        from pentad.parallel.kernels.triton.gates import triton_swiglu
        from pentad.parallel.kernels.triton.norms import triton_rms_norm
        from pentad.parallel.kernels.triton.rotary import triton_rotate

        ours = {"RMSNorm": triton_rms_norm, "SwiGLU": triton_swiglu, "rotary embedding": triton_rotate}

    def both(function: Any, given: list[Tensor], rest: tuple[Any, ...]) -> float:
        leaves = [each.detach().requires_grad_() for each in given]

        def work() -> None:
            y = function(*leaves, *rest)
            torch.autograd.grad(y, leaves, y.detach())

        return 1e6 * _seconds(work, settings.device)

    found: Found = {}
    for name, (function, given, rest) in cases.items():
        found[name] = {"torch": both(function, given, rest)}
        if name in ours:
            found[name]["triton"] = both(ours[name], given, rest)
    return found


def ceiling(settings: Settings) -> Found:
    """TFLOP/s in the products of each model that is trained: what bounds its forward and backward passes."""
    from pentad.trainer.metrics.products import ceiling_tflops, products_of

    found = {}
    for name in JOBS:
        products = products_of(_job(settings, name))
        found[name] = ceiling_tflops(products, torch.device(settings.device), torch.bfloat16, seconds=0.05)
    return found


def _job(settings: Settings, name: str, **more: Any) -> Any:
    return _config(_job_settings(settings, name, **more))


def _job_settings(settings: Settings, name: str, **more: Any) -> Found:
    model = dict(JOBS[name])
    if settings.small:
        experts = {"model.moe.experts": 4, "model.moe.ffn": 32} if "experts" in name else {}
        model |= {**_TINY, **experts, "memory.recompute": "none", "hardware.peak_tflops": 0.05}
    else:
        model["hardware.memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    sizes = (2, 64) if settings.small else (4, 8192)
    return {
        **model, "optim.name": "adamw", "train.global_batch": sizes[0], "train.micro_batch": 1,
        "train.seq_len": sizes[1], "train.dtype": "bf16", "train.device": settings.device,
        "train.steps": 2 + settings.steps, **more,
    }  # fmt: skip


def train(settings: Settings, name: str) -> Found:
    """Tokens per second, MFU and its waterfall of a job of ours, medians of the steps after two."""
    from pentad.trainer.__main__ import main

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    one = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(one, MASTER_PORT=str(port))
    run = f"train-{name}".replace(" ", "-").replace(",", "")
    given = _job_settings(settings, name) | {"name": run, "runs_dir": str(settings.folder), "data.name": "stdlib"}
    given |= {"checkpoint.final": False, "faults.watch": False}
    job = settings.folder / f"{run}.yaml"
    job.write_text("{}")
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
    code = main(["--fresh", str(job), *overrides])
    if code:
        raise RuntimeError(f"the job ended with code {code}")
    lines = [json.loads(line) for line in (settings.folder / run / "metrics.jsonl").read_text().splitlines()][2:]
    falls = [line["waterfall"] for line in lines if line["waterfall"]]
    parts = [part for part, share in (falls or [{}])[-1].items() if isinstance(share, float)]
    return {
        "tokens_per_s": median(line["tokens_per_s"] for line in lines),
        "mfu": median(line["mfu"] for line in lines) if lines[0]["mfu"] is not None else None,
        "memory_gib": max(line["memory_gib"] for line in lines),
        "waterfall": {part: median(fall[part] for fall in falls) for part in parts},
    }


def peer(settings: Settings, name: str) -> Found:
    """Tokens per second of transformers' model of the same shape: sdpa, masters in fp32, fused AdamW, clipping."""
    from peers.common import make_update
    from transformers import AutoConfig, AutoModelForCausalLM
    from workload import Workload

    from pentad.models.hf.config_json import hf_config

    cfg = _job(settings, name)
    described = hf_config(cfg.model, "bfloat16")
    config = AutoConfig.for_model(**{**described, "use_cache": False})
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16).train()
    if cfg.memory.recompute == "auto" and not settings.small:
        model.gradient_checkpointing_enable()
    update, train = make_update(model, Workload(), "masters"), cfg.train
    draws = torch.Generator().manual_seed(0)
    took = []
    for _ in range(2 + settings.steps):
        rows = torch.randint(cfg.model.vocab, (train.global_batch, train.seq_len), generator=draws).to(settings.device)
        begin = time.perf_counter()
        for each in rows.split(1):
            loss = model(each, labels=each).loss / len(rows)
            loss.backward()
        update()
        float(loss)  # waits for the device
        took.append(time.perf_counter() - begin)
    del model, update
    gc.collect()
    return {"tokens_per_s": train.global_batch * train.seq_len / median(took[2:])}
