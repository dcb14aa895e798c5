"""Tokens per second with and without activation offload on one device, up to twice the sequence that fits without.

    python benchmarks/offload_tokens.py

On a GPU. The sequence is doubled until a step without offload runs out of memory. Then the table has, for the longest
one that fits: without offload, with recompute, with offload; and for twice that: with recompute and with offload. The
model's layers are part-stages (`memory.group=1`), so that copies are hidden under the other layers' passes.

`--device cpu --limit-mib 4` goes the same way in small: what fits is what has at most so many bytes alive at any
operation. Its figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from pentad.configs.load import load
from pentad.configs.schema import Config
from pentad.parallel.record.ring import Recorder
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.session import Here, Session

WAYS: dict[str, dict[str, str]] = {
    "neither": {},
    "recompute": {"memory.recompute": "full"},
    "offload": {"memory.offload_activations": "all", "memory.group": "1"},
}


@dataclass(frozen=True)
class Model:
    """Sizes of the model, and what is trained on.

    Args:
        layers, hidden, heads, ffn, vocab: as in the `model` section.
        dtype, device: as in the `train` section.
        microbatches: sequences of a step.
        limit: bytes that fit, counted; none: what the device has.
    """

    layers: int = 32
    hidden: int = 2048
    heads: int = 16
    ffn: int = 5632
    vocab: int = 32000
    dtype: str = "bf16"
    device: str = "cuda"
    microbatches: int = 2
    limit: int | None = None


def make_config(model: Model, seq_len: int, way: str) -> Config:
    """The job of a trial."""
    settings = {
        "model.family": "llama",
        "model.layers": model.layers,
        "model.hidden": model.hidden,
        "model.heads": model.heads,
        "model.kv_heads": model.heads,
        "model.ffn": model.ffn,
        "model.vocab": model.vocab,
        "model.max_positions": seq_len,
        "train.steps": 1,
        "train.global_batch": model.microbatches,
        "train.micro_batch": 1,
        "train.seq_len": seq_len,
        "train.dtype": model.dtype,
        "train.device": model.device,
        "optim.name": "sgd",  # without states: the device is for activations
        "data.name": "stdlib",
        "log.memory": model.limit is not None,
        **WAYS[way],
    }
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]
    return load(None, overrides, world_size=1)


def tokens_per_s(model: Model, seq_len: int, way: str, steps: int) -> float | None:
    """The median of some steps after one more; none where it does not fit."""
    cfg, device = make_config(model, seq_len, way), torch.device(model.device)
    here = Here(0, None, device, Recorder(None, rank=0, world=1))
    try:
        with_limit = _Limited(model.limit)
        session = Session.open(cfg, [0], 0, here=here)
        try:
            with_limit.watch(session)
            took = [_step(session, model, seq_len, step) for step in range(steps + 1)]
        finally:
            session.close()
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if with_limit.exceeded:
        return None
    return model.microbatches * seq_len / median(took[1:])


class _Limited:
    """Whether more bytes than fit were alive at some operation."""

    def __init__(self, limit: int | None) -> None:
        self.limit, self.most = limit, 0

    @property
    def exceeded(self) -> bool:
        return self.limit is not None and self.most > self.limit

    def watch(self, session: Session) -> None:
        """Looks at what the session counts for its record."""
        live = session.stepper.live
        if live is not None:
            live.count = self._noting(live.count)

    def _noting(self, count: Callable[[], int]) -> Callable[[], int]:
        def noted() -> int:
            self.most = max(self.most, count())
            return self.most

        return noted


def _step(session: Session, model: Model, seq_len: int, step: int) -> float:
    draws = torch.Generator().manual_seed(step)
    tokens = torch.randint(model.vocab, (model.microbatches, seq_len + 1), generator=draws)
    batches = [
        Microbatch(row[None, :-1], row[None, 1:].contiguous(), None, None, torch.tensor([i]), seq_len, 0)
        for i, row in enumerate(tokens)
    ]
    started = time.perf_counter()
    result = session.stepper.run(step, batches, model.microbatches * seq_len, session.cfg.optim.lr)
    if not torch.isfinite(result.loss):  # waits for the device
        raise RuntimeError(f"the loss of step {step} is {float(result.loss)}")
    return time.perf_counter() - started


@dataclass(frozen=True)
class Row:
    """A line of the table; none: it does not fit."""

    seq_len: int
    tokens_per_s: dict[str, float | None]

    def __str__(self) -> str:
        cells = ["does not fit" if each is None else f"{each:.0f}" for each in self.tokens_per_s.values()]
        return f"| {self.seq_len} | {' | '.join(cells)} |"


def compare(model: Model, shortest: int, steps: int, longest: int = 1 << 22) -> list[Row]:
    """The longest sequence that fits without offload, and twice that.

    Raises:
        RuntimeError: not even the shortest fits, or everything does.
    """
    fits = 0
    seq_len = shortest
    while seq_len <= longest and tokens_per_s(model, seq_len, "neither", 1) is not None:
        fits, seq_len = seq_len, 2 * seq_len
    if not fits or seq_len > longest:
        raise RuntimeError(f"{'nothing' if not fits else 'everything'} fits from {shortest} to {longest} tokens")
    return [Row(each, {way: tokens_per_s(model, each, way, steps) for way in WAYS}) for each in (fits, 2 * fits)]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--limit-mib", type=float, help="what fits is counted, and is this")
    parser.add_argument("--shortest", type=int, default=4096, help="the first sequence that is tried")
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    limit = None if arguments.limit_mib is None else int(arguments.limit_mib * 2**20)
    small = {"layers": 4, "hidden": 64, "heads": 4, "ffn": 128, "vocab": 320, "dtype": "fp32"}
    model = Model(device=arguments.device, limit=limit, **(small if arguments.device == "cpu" else {}))
    print(f"{model}\n\n| tokens | {' tok/s | '.join(WAYS)} tok/s |\n|---|---|---|---|")
    for each in compare(model, arguments.shortest, arguments.steps):
        print(each)


if __name__ == "__main__":
    main()
