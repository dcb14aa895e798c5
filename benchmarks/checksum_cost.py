"""What `faults.numerics.checksums` costs: one rank's steps, the guard switched off and on again every ten of them.

    python benchmarks/checksum_cost.py
    python benchmarks/checksum_cost.py --tokens 4096

The guard reads every gradient, parameter, master and moment twice a step, whatever the batch; the step's compute grows
with its tokens. Blocks of steps are compared as in record_cost.py.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from unittest.mock import patch

import numpy as np
import torch
from record_cost import BLOCK, compare, interval

from pentad.configs import load
from pentad.parallel.record.ring import Recorder
from pentad.parallel.replicas.bucket_guard import BucketGuard
from pentad.trainer.data.dataset import Microbatch
from pentad.trainer.numerics.guard import NumericsGuard
from pentad.trainer.session import Here, Session

_SEQUENCE = 256
_SILENT: dict[tuple[type, str], Callable[..., object]] = {
    **{(BucketGuard, name): lambda *_: None for name in ("final", "handed_over", "gathered")},
    **{(NumericsGuard, name): lambda *_: None for name in ("begin", "rest")},
    (NumericsGuard, "check"): lambda *_: torch.zeros((), dtype=torch.float64),
}


def measure(steps: int, tokens: int) -> tuple[np.ndarray, int]:
    """(steps, 2) CPU and wall seconds of each step, and the parameters."""
    sequences = tokens // _SEQUENCE
    keys = {
        **{"model.layers": 4, "model.hidden": 256, "model.heads": 4, "model.kv_heads": 4, "model.ffn": 704},
        **{"model.vocab": 2048, "train.seq_len": _SEQUENCE, "train.global_batch": sequences, "train.steps": steps},
        **{"train.micro_batch": sequences, "train.dtype": "bf16", "train.device": "cpu"},
        **{"faults.numerics.checksums": "true"},
    }
    cfg = load(None, [f"{key}={value}" for key, value in keys.items()], world_size=1)
    session = Session.open(cfg, [0], 0, here=Here(0, None, torch.device("cpu"), Recorder(None, rank=0, world=1)))
    draws, samples = torch.Generator().manual_seed(0), []
    for step in range(steps):
        rows = torch.randint(2048, (sequences, _SEQUENCE + 1), generator=draws)
        samples_of = torch.arange(sequences) + step * sequences
        batch = Microbatch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None, None, samples_of, tokens, 0)
        on = step // BLOCK % 2 == 0
        patches = [] if on else [patch.object(kind, name, call) for (kind, name), call in _SILENT.items()]
        if step % (2 * BLOCK) == 0 and session.stepper.guard is not None:
            session.stepper.guard.forget()  # it has not seen the updates since
        for each in patches:
            each.start()
        cpu, wall = time.process_time(), time.perf_counter()
        session.stepper.run(step, [batch], tokens, 1e-4)
        samples.append((time.process_time() - cpu, time.perf_counter() - wall))
        for each in patches:
            each.stop()
    count = sum(param.numel() for param in session.parts.model.parameters())
    session.close()
    return np.array(samples), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=1024, help=f"of a step, a multiple of {_SEQUENCE}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    samples, count = measure(arguments.steps, arguments.tokens)
    for name, seconds in zip(("CPU", "wall"), samples.T, strict=True):
        differences, without = compare(seconds)
        middle, low, high = (1e3 * value for value in interval(differences))
        step = 1e3 * float(np.median(without))
        print(
            f"{name:4}  {count / 1e6:.1f} M parameters, {arguments.tokens} tokens: step {step:.1f} ms without; "
            f"checksums {middle:+.2f} ms ({low:+.2f} to {high:+.2f}), {100 * middle / step:+.2f} %"
        )


if __name__ == "__main__":
    main()
