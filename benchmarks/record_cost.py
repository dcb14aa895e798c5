"""What the record and its readings cost: a real job in which they are switched off and on again every ten steps.

    python benchmarks/record_cost.py              one rank, steps of about 10 ms
    python benchmarks/record_cost.py --ranks 4    four ranks (tp 2 x dp 2), by the CPU seconds of all

Off, no entry is written, no step is divided and no rank compared; the calls are still made. Neighbouring blocks of ten
steps are compared by their means, since short steps are divided several at once: the median difference, and 95 % of the
medians of resampled differences. CPU time says more than wall time where the cores are shared.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

BLOCK = 10
_TOGGLE = Path(__file__).with_name("record_toggle.py")
_JOB = {
    "name": "cost",
    "model": {"family": "llama", "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 4, "ffn": 128, "vocab": 320},
    "optim": {"name": "adamw", "lr": 1e-3},
    "data": {"name": "stdlib"},
    "hardware": {"peak_tflops": 0.05},
    "checkpoint": {"final": False},
}


def measure(ranks: int, steps: int, folder: Path) -> np.ndarray:
    """(ranks, steps, 2) CPU and wall seconds of each step."""
    tp, dp = (2, ranks // 2) if ranks > 1 else (1, 1)
    job = _JOB | {
        "runs_dir": str(folder),
        "parallel": {"tp": tp, "dp": dp},
        "train": {"steps": steps, "global_batch": 2 * dp, "micro_batch": 2, "seq_len": 64, "dtype": "fp32"},
        "log": {"every": steps},
    }
    (folder / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    command = [sys.executable, "-c", "import sys; from pentad.launch.cli import main; sys.exit(main())", "train"]
    done = subprocess.run([*command, "job.yaml", "--import", str(_TOGGLE)], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return np.stack([np.array(json.loads((folder / f"samples-{rank}.json").read_text())) for rank in range(ranks)])


def compare(seconds: np.ndarray, warm_up: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """From (steps,) seconds, on and off by turns of BLOCK steps: what each pair of blocks differs by in a step, and
    the seconds of a step without."""
    blocks = seconds[: len(seconds) // (2 * BLOCK) * 2 * BLOCK].reshape(-1, 2, BLOCK).mean(2)[warm_up:]
    return blocks[:, 0] - blocks[:, 1], blocks[:, 1]


def interval(differences: np.ndarray) -> tuple[float, float, float]:
    """The median, and the bounds of 95 % of the medians of resampled differences."""
    draws = np.random.default_rng(0)
    medians = np.median(draws.choice(differences, (2000, len(differences))), 1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(np.median(differences)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, choices=(1, 4), default=1)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = measure(arguments.ranks, arguments.steps, Path(folder)).sum(0)
    for name, seconds in zip(("CPU", "wall"), samples.T, strict=True):
        differences, without = compare(seconds)
        middle, low, high = (1e3 * value for value in interval(differences))
        step = 1e3 * float(np.median(without))
        share = [100 * value / step for value in (middle, low, high)]
        print(
            f"{name:4}  step {step:.3f} ms without; record and readings {middle:+.4f} ms ({low:+.4f} to {high:+.4f}), "
            "{:+.2f} % ({:+.2f} to {:+.2f})".format(*share)
        )


if __name__ == "__main__":
    main()
