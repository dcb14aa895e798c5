"""Pentad's side: its real trainer on random tokens, through the config file and metrics.jsonl that users have."""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from workload import Measurement, Workload, peak_rss_mib, random_batch, write_measurement

from pentad.models import Transformer  # noqa: F401  (so that the libraries' memory is counted before the model exists)
from pentad.trainer.__main__ import main as train
from pentad.trainer.data.indexed import IndexedWriter
from pentad.trainer.processes.leaving import leave


def make_config(workload: Workload, arguments: argparse.Namespace) -> dict[str, object]:
    """The job as a config file's content."""
    dp = int(os.environ["WORLD_SIZE"]) // (arguments.tp * arguments.cp)
    context = {"method": arguments.context, "duplex": arguments.duplex}
    moe = {
        "experts": arguments.experts,
        "top_k": arguments.top_k,
        "compute": arguments.compute,
        "weigh": arguments.weigh,
    }
    return {
        "name": "run",
        "runs_dir": str(arguments.out),
        "model": {
            "family": "mixtral" if arguments.experts else "llama",
            "layers": workload.layers,
            "hidden": workload.hidden,
            "heads": workload.heads,
            "kv_heads": workload.kv_heads,
            "ffn": workload.ffn,
            "vocab": workload.vocab,
            "tied": False,
            "moe": moe if arguments.experts else {},
        },
        "parallel": {
            "tp": arguments.tp,
            "cp": arguments.cp,
            "dp": dp,
            "context": context,
            "data": {"sharding": arguments.sharding, "deepspeed": {"stage": arguments.stage}},
        },
        "train": {
            "steps": arguments.warmup + arguments.steps,
            "global_batch": workload.global_batch,
            "micro_batch": workload.global_batch // dp,
            "seq_len": workload.seq_len,
            "dtype": arguments.policy,
            "device": "cpu",
        },
        "optim": {
            "name": "adamw",
            "lr": workload.lr,
            "beta1": workload.beta1,
            "beta2": workload.beta2,
            "weight_decay": workload.weight_decay,
            "clip": workload.clip,
            "schedule": {"name": "constant"},
        },
        "data": {"name": "bin", "paths": [str(arguments.out / "random")], "holdout": 0.0},
        "checkpoint": {"final": False},
    }


def write_job(path: Path, workload: Workload, arguments: argparse.Namespace) -> None:
    """Random tokens for every step, then the config file."""
    steps = arguments.warmup + arguments.steps + 1  # one step more: each sequence needs the token after its last
    tokens = torch.cat([random_batch(workload, step).flatten() for step in range(steps)])
    with IndexedWriter(str(arguments.out / "random"), np.dtype(np.uint16)) as writer:
        writer.add(tokens.numpy())
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(make_config(workload, arguments)))  # JSON is YAML
    partial.replace(path)


def main() -> None:
    """Run the trainer in this process, then report its steps and this process's memory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--policy", choices=["fp32", "bf16"], required=True)
    parser.add_argument("--tp", type=int, required=True)
    parser.add_argument("--sharding", required=True)
    parser.add_argument("--stage", type=int, help="parallel.data.deepspeed.stage")
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--context", default="auto", help="parallel.context.method")
    parser.add_argument("--duplex", action="store_true", help="parallel.context.duplex")
    parser.add_argument("--work", type=json.loads, default={}, help="fields of the workload, as JSON")
    parser.add_argument("--experts", type=int, default=0, help="in every layer; 0: dense")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--compute", default="auto", help="model.moe.compute")
    parser.add_argument("--weigh", default="after", help="model.moe.weigh")
    parser.add_argument("--warmup", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    libraries, config = peak_rss_mib(), arguments.out / "job.yaml"
    if os.environ["RANK"] == "0":
        write_job(config, replace(Workload(), **arguments.work), arguments)
    while not config.exists():
        time.sleep(0.05)
    code = train([str(config)])
    if code:
        leave(code)
    lines = (arguments.out / "run" / "metrics.jsonl").read_text().splitlines() if os.environ["RANK"] == "0" else []
    metrics = [json.loads(line) for line in lines]
    times = [line["step_time_s"] for line in metrics][arguments.warmup :]
    write_measurement(arguments.out, Measurement(times, [m["loss"] for m in metrics], peak_rss_mib(), libraries))
    leave(0)


if __name__ == "__main__":
    main()
