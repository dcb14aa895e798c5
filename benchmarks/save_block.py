"""How long a save holds the step up, and how much of that is its copy of the tensors.

    python benchmarks/save_block.py
    python benchmarks/save_block.py --gb 1 --ranks 2 --saves 6

Ranks of data parallelism (`zero1`) train a dense model in fp32 with AdamW, of which parameters and moments together are
so many GB, and save after every four steps; what is written beside is waited for before the next step. Of each save, on
the rank that it held up longest: `blocks` from the call to its return; `copy` of the tensors into host buffers, inside
it; `beyond` is the rest; `memcpy` is what a copy of as many bytes between two buffers takes, measured before it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pentad.configs import load
from pentad.configs.schema import Config
from pentad.parallel.record.ring import Recorder
from pentad.trainer.checkpoint.checkpointer import Checkpointer
from pentad.trainer.checkpoint.retention import Retention
from pentad.trainer.checkpoint.state import all_tensors
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.session import Here, Session

HIDDEN, FFN, VOCAB, LENGTH = 1024, 2816, 2048, 32
_STEPS = 4
"""Between two saves."""
LAYER_BYTES = 12 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)


@dataclass(frozen=True)
class Save:
    """Seconds of one save on one rank."""

    blocks: float
    copy: float
    memcpy: float

    @property
    def beyond(self) -> float:
        return self.blocks - self.copy


def job(gb: float, ranks: int) -> Config:
    """A model of at least so many GB of parameters and moments."""
    layers = max(1, int(np.ceil((gb * 1e9 - 24 * VOCAB * HIDDEN) / LAYER_BYTES)))
    keys = {
        **{"model.layers": layers, "model.hidden": HIDDEN, "model.heads": 8, "model.kv_heads": 8, "model.ffn": FFN},
        **{"model.vocab": VOCAB, "train.seq_len": LENGTH, "train.global_batch": ranks, "train.micro_batch": 1},
        **{"train.steps": 1, "train.dtype": "fp32", "train.device": "cpu", "parallel.dp": ranks},
        **{"parallel.data.sharding": "zero1"},
    }
    return load(None, [f"{key}={value}" for key, value in keys.items()], world_size=ranks)


def measure(rank: int, gb: float, ranks: int, saves: int, folder: Path) -> tuple[float, list[Save]]:
    """GB that this rank holds, and each of its saves."""
    torch.set_num_threads(1)
    cfg, found = job(gb, ranks), list[Save]()
    store = dist.FileStore(str(folder / "store"), ranks) if ranks > 1 else None
    here = Here(rank, store, torch.device("cpu"), Recorder(None, rank=rank, world=ranks))
    session = Session.open(cfg, range(ranks), 0, here=here)
    saver = Checkpointer(
        folder / "checkpoints",
        group=session.mesh.checkpoint_group,
        rank=rank,
        world=ranks,
        keep=Retention(1),
        asynchronous=True,
        on_event=lambda _: None,
        abort=session.mesh.abort,
    )
    tokens = torch.arange(LENGTH + 1).unsqueeze(0) % VOCAB
    sample = torch.tensor([rank])
    batch = Microbatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None, None, sample, LENGTH, 0)
    held = sum(piece.local.nbytes for piece in all_tensors(session.parts, session.optimizer).values())
    one, other = np.ones(held // 8), np.ones(held // 8)
    saver.prepare(all_tensors(session.parts, session.optimizer))
    for step in range(saves):
        for _ in range(_STEPS):
            session.stepper.run(step, [batch], LENGTH * ranks, 1e-4)
        began = time.perf_counter()
        np.copyto(one, other)
        memcpy = time.perf_counter() - began
        session.mesh.barrier()
        began = time.perf_counter()
        saver.save(step, all_tensors(session.parts, session.optimizer), {"step": step})
        blocks = time.perf_counter() - began
        found.append(Save(blocks, saver.copied_s, memcpy))
        saver.wait()
    saver.close()
    session.close()
    return held / 1e9, found


def _send(rank: int, gb: float, ranks: int, saves: int, folder: Path, answers: multiprocessing.SimpleQueue) -> None:
    answers.put(measure(rank, gb, ranks, saves, folder))


def on_ranks(gb: float, ranks: int, saves: int, folder: Path) -> tuple[float, list[Save]]:
    """GB of all ranks; of each save that of the rank that it held up longest."""
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    started = [context.Process(target=_send, args=(r, gb, ranks, saves, folder, answers)) for r in range(ranks)]
    for process in started:
        process.start()
    found = [answers.get() for _ in started]
    for process in started:
        process.join()
    slowest = [max(each, key=lambda save: save.blocks) for each in zip(*(mine for _, mine in found), strict=True)]
    return sum(held for held, _ in found), slowest


def main() -> None:
    """Prints a row a save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="GB of parameters and moments in all (1)")
    parser.add_argument("--ranks", type=int, default=1, help="processes (1)")
    parser.add_argument("--saves", type=int, default=6, help="how many (6)")
    parser.add_argument("--dir", help="where the checkpoints go (the folder for temporary files)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        held, saves = on_ranks(args.gb, args.ranks, args.saves, Path(folder))
    print(f"{held:.2f} GB on {args.ranks} ranks, ms of a step")
    print("| save | blocks | copy | beyond | memcpy |\n|---|---|---|---|---|")
    for number, save in enumerate(saves, 1):
        times = (save.blocks, save.copy, save.beyond, save.memcpy)
        print(f"| {number} | {' | '.join(f'{1e3 * seconds:.0f}' for seconds in times)} |")


if __name__ == "__main__":
    main()
