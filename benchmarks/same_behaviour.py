"""Whether two checkouts behave alike: programs, losses, checkpoints and exports compared to the last bit.

    python benchmarks/same_behaviour.py BEFORE AFTER

BEFORE and AFTER are checkouts (`git worktree add ../before COMMIT`); both run under the interpreter that runs this
script, through their command line alone, so that they may have any layout inside. Every pipeline program and its
simulated times must be the same; the same jobs must log the same losses and gradient norms; AFTER must go on from
BEFORE's checkpoints exactly as BEFORE does, and export the same Hugging Face folders. Exits 1 where something differs.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOMS = ("configs", "parallel", "models", "trainer", "launch")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "gis", "zb-h1", "zb-h2", "zb-v", "v-half", "v-min", "dualpipev")
BALANCED = ("1f1b", "interleaved", "gis", "v-half")
TIMES = ("F=1", "B=1.1", "W=0.9", "comm=0.05", "S=0.3", "T=0.4", "IF=0.05", "IB=0.05", "collective=0.02")

SMALL = "layers: 4, hidden: 64, heads: 4, kv_heads: 2, ffn: 96, vocab: 320, init_std: 0.1"
TRAIN = "train: {steps: 4, global_batch: 8, micro_batch: 2, seq_len: 64, dtype: fp32, deterministic: true}"
REST = f"""
{TRAIN}
optim: {{name: adamw, lr: 3.0e-3, schedule: {{name: constant}}}}
data: {{name: stdlib}}
checkpoint: {{every: 2, keep: 9}}
"""
JOBS = {
    "dense": f"model: {{family: llama, {SMALL}}}\nparallel: {{tp: 2, dp: 2, data: {{sharding: zero1}}}}{REST}",
    "pipeline": f"model: {{family: qwen3, {SMALL}}}\n"
    f"parallel: {{pp: 2, dp: 2, pipeline: {{schedule: gis, chunks: 2, vocab: balanced}}}}{REST}",
    "experts": f"model: {{family: mixtral, {SMALL}, moe: {{experts: 4, top_k: 2}}}}\n"
    f"parallel: {{cp: 2, dp: 2, ep: 4, context: {{method: ring}}}}{REST}",
}
"""Layouts of four ranks whose models Hugging Face can express."""


@dataclass(frozen=True)
class Checkout:
    """One side: a checkout, and the folder that makes its rooms importable as `pentad`."""

    label: str
    path: Path
    modules: Path

    def pentad(self, *arguments: str, where: Path) -> str:
        """Runs the command line and returns what it printed.

        Raises:
            SystemExit: the command failed; with the end of its output.
        """
        start = "import sys; from pentad.launch.cli import main; sys.exit(main())"
        environment = os.environ | {"PYTHONPATH": str(self.modules), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-P", "-c", start, *arguments], cwd=where, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{self.label}: pentad {' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-4000:]}")
        return done.stdout


def open_checkout(label: str, path: Path, scratch: Path) -> Checkout:
    """Links the rooms of the checkout into a folder of modules."""
    modules = scratch / label / "modules"
    (modules / "pentad").mkdir(parents=True)
    for room in ROOMS:
        (modules / "pentad" / room).symlink_to(path.resolve() / room)
    return Checkout(label, path, modules)


def programs() -> Iterator[tuple[str, ...]]:
    """Arguments of `pentad schedule` over shapes, with unequal times."""
    times = [argument for time in TIMES for argument in ("--time", time)]
    for name, (ranks, microbatches) in itertools.product(SCHEDULES, ((2, 5), (4, 8), (3, 1))):
        for vocab in ("ends", "balanced") if name in BALANCED else ("ends",):
            shape = ("--ranks", str(ranks), "--microbatches", str(microbatches), "--vocab", vocab)
            yield "schedule", name, *shape, *times, "--json"


def curve(run: Path) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"]) for line in lines}


def contents(folder: Path) -> dict[str, str]:
    """A checksum of each file."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differing(before: dict, after: dict) -> str:
    """How many entries there are, and the first that differs."""
    wrong = [key for key in sorted(before.keys() | after.keys(), key=str) if before.get(key) != after.get(key)]
    if not wrong:
        return f"{len(after)} equal"
    shown = " / ".join(f"{side.get(wrong[0])}"[:200] for side in (before, after))
    return f"DIFFERS in {len(wrong)} of {len(after)}, first {wrong[0]}: {shown}"


def compare_programs(sides: tuple[Checkout, Checkout], scratch: Path) -> str:
    """Every schedule's program and its simulated run: all that BEFORE prints of them."""
    before, after = ({" ".join(p[1:8]): printed(side, p, scratch) for p in programs()} for side in sides)
    return differing(before, {name: shared(value, before.get(name)) for name, value in after.items()})


def printed(side: Checkout, arguments: tuple[str, ...], scratch: Path) -> Any:
    """What a command prints as JSON."""
    return json.loads(side.pentad(*arguments, where=scratch / side.label))


def shared(value: Any, other: Any) -> Any:
    """The value without the keys that another one lacks: what was added since is no difference."""
    if isinstance(value, dict) and isinstance(other, dict):
        return {key: shared(value[key], other[key]) for key in value if key in other}
    if isinstance(value, list) and isinstance(other, list) and len(value) == len(other):
        return [shared(*pair) for pair in zip(value, other, strict=True)]
    return value


def compare_job(name: str, sides: tuple[Checkout, Checkout], scratch: Path) -> Iterator[tuple[str, str]]:
    """Losses of one job, its exports, and what AFTER makes of BEFORE's checkpoint."""
    before, after = sides
    runs = [scratch / side.label / "runs" / name for side in sides]
    for side in sides:
        (scratch / side.label / f"{name}.yaml").write_text(f"name: {name}\n{JOBS[name]}")
        side.pentad("train", f"{name}.yaml", where=scratch / side.label)
        side.pentad("export-hf", f"runs/{name}", f"{name}-hf", where=scratch / side.label)
    yield f"{name}: losses and gradient norms", differing(*(curve(run) for run in runs))
    exports = [contents(scratch / side.label / f"{name}-hf") for side in sides]
    yield f"{name}: Hugging Face folder", differing(*exports)

    other = scratch / "continued"
    other.mkdir(exist_ok=True)
    after.pentad("export-hf", str(runs[0]), str(other / f"{name}-hf"), where=other)
    yield (
        f"{name}: the folder that AFTER exports of BEFORE's run",
        differing(exports[0], contents(other / f"{name}-hf")),
    )

    start = next(path for path in (runs[0] / "checkpoints").iterdir() if re.fullmatch(r"step-0*4", path.name))
    (other / f"{name}.yaml").write_text(f"name: {name}\n{JOBS[name]}")
    before.pentad("train", f"{name}.yaml", "train.steps=8", "checkpoint.resume=latest", where=scratch / before.label)
    after.pentad("train", f"{name}.yaml", "train.steps=8", f"checkpoint.resume={start}", where=other)
    wanted = {step: values for step, values in curve(runs[0]).items() if step > 4}
    yield f"{name}: AFTER goes on from BEFORE's checkpoint", differing(wanted, curve(other / "runs" / name))


def compare(sides: tuple[Checkout, Checkout], scratch: Path, demo_steps: int) -> Iterator[tuple[str, str]]:
    """(what was compared, what came of it), as it becomes known."""
    yield "pipeline programs with their simulated times", compare_programs(sides, scratch)
    steps = (f"train.steps={demo_steps}", "train.deterministic=true")
    for side in sides:
        side.pentad("train", "demo", *steps, where=scratch / side.label)
    runs = [scratch / side.label / "runs" / "demo" for side in sides]
    yield f"demo: losses and gradient norms of {demo_steps} steps", differing(*(curve(run) for run in runs))
    for name in JOBS:
        yield from compare_job(name, sides, scratch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--demo-steps", type=int, default=100, metavar="N")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sides = (open_checkout("before", arguments.before, scratch), open_checkout("after", arguments.after, scratch))
        results = []
        for what, found in compare(sides, scratch, arguments.demo_steps):
            print(f"{what}: {found}", flush=True)
            results.append(found)
    return int(any(found.startswith("DIFFERS") for found in results))


if __name__ == "__main__":
    sys.exit(main())
