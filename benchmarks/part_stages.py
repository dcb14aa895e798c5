"""What part-stages cost: the same training in one process, its layers in one stage and in part-stages.

    python benchmarks/part_stages.py --steps 30

Both are real sessions of Pentad on the same random tokens, one thread, without offload, and their steps alternate. The
ratio is the median of all pairs with its 95 % interval, of the process's CPU time (which other processes disturb least)
and of the time on the wall. Losses of both are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from statistics import median

import torch
from offload_waiting import median_interval

from pentad.configs.load import load
from pentad.configs.schema import Config
from pentad.parallel.record.ring import Recorder
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.session import Here, Session

LAYERS = 8


@dataclass(frozen=True)
class PairedSteps:
    """Seconds of each step, in whole stages and in part-stages.

    Args:
        cpu: of the process.
        wall: on the wall.
        same: all losses were equal to the last bit.
    """

    cpu: list[tuple[float, float]]
    wall: list[tuple[float, float]]
    same: bool


def make_config(group: int | None, hidden: int, seq_len: int) -> Config:
    """The job, with so many layers in a part-stage (none: all)."""
    settings = {
        "model.family": "llama",
        "model.layers": LAYERS,
        "model.hidden": hidden,
        "model.heads": 4,
        "model.kv_heads": 2,
        "model.ffn": 3 * hidden,
        "model.vocab": 1024,
        "train.steps": 1000,
        "train.global_batch": 4,
        "train.micro_batch": 2,
        "train.seq_len": seq_len,
        "train.dtype": "fp32",
        "train.device": "cpu",
        "optim.schedule.warmup_steps": 0,
        "data.name": "stdlib",
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    return load(None, overrides + ([f"memory.group={group}"] if group else []), world_size=1)


def batches(cfg: Config, step: int) -> list[Microbatch]:
    """Random tokens."""
    train, made = cfg.train, []
    generator = torch.Generator().manual_seed(step)
    for i in range(train.global_batch // train.micro_batch):
        rows = torch.randint(0, cfg.model.used_vocab, (train.micro_batch, train.seq_len + 1), generator=generator)
        samples = torch.arange(train.micro_batch) + i * train.micro_batch
        made.append(
            Microbatch(rows[:, :-1].contiguous(), rows[:, 1:].clone(), None, None, samples, rows[:, 1:].numel(), 0)
        )
    return made


def measure(steps: int, *, group: int = 1, hidden: int = 256, seq_len: int = 128, warmup: int = 2) -> PairedSteps:
    """Alternating steps of both."""
    sides = []
    for each in (None, group):
        cfg = make_config(each, hidden, seq_len)
        here = Here(0, None, torch.device("cpu"), Recorder(None, rank=0, world=1))
        sides.append((cfg, Session.open(cfg, [0], 0, here=here)))
    cpu, wall, same = [], [], True
    try:
        for step in range(warmup + steps):
            found: dict[int, tuple[float, float, float]] = {}
            for which in (0, 1) if step % 2 == 0 else (1, 0):
                cfg, session = sides[which]
                given = batches(cfg, step)
                begun = time.process_time(), time.perf_counter()
                result = session.stepper.run(step, given, sum(b.valid for b in given), 1e-3)
                loss = float(result.loss)
                found[which] = time.process_time() - begun[0], time.perf_counter() - begun[1], loss
            same = same and found[0][2] == found[1][2]
            if step >= warmup:
                cpu.append((found[0][0], found[1][0]))
                wall.append((found[0][1], found[1][1]))
    finally:
        for _, session in sides:
            session.close()
    return PairedSteps(cpu, wall, same)


def row(name: str, pairs: list[tuple[float, float]]) -> str:
    """A row of the table."""
    ratio, low, high = median_interval([parts / whole for whole, parts in pairs])
    return f"| {name} | {median(whole for whole, _ in pairs):.4f} | {ratio:.4f} ({low:.4f}–{high:.4f}) |"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--group", type=int, default=1, help="layers of a part-stage")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=128)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    found = measure(arguments.steps, group=arguments.group, hidden=arguments.hidden, seq_len=arguments.seq_len)
    print(f"{LAYERS} layers, part-stages of {arguments.group}; losses {'equal' if found.same else 'DIFFERENT'}")
    print("| time | s a step in whole stages | in part-stages ÷ in whole ones (95 %) |")
    print("|---|---|---|")
    print(row("CPU", found.cpu))
    print(row("wall", found.wall))


if __name__ == "__main__":
    main()
