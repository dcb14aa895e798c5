"""What one GPU does with Pentad: is the path right, how fast are kernels and trainings, beside `transformers`.

    python benchmarks/gpu.py --out gpu-results             all parts that have no result yet
    python benchmarks/gpu.py --out gpu-results --only "train 3B"

Each part is a process of at most three minutes and saves its result when it ends, so that a short time is enough
for some: started again, it goes on with what is missing. `--device cpu` goes the same way in small; its figures say
nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gpu_parts
from gpu_parts import JOBS, Found, Settings

SECONDS = 180
"""A part's time."""

PARTS: dict[str, Callable[[Settings], Found]] = {
    "path": gpu_parts.path,
    "curves": gpu_parts.curves,
    "kernels": gpu_parts.kernels,
    "ceiling": gpu_parts.ceiling,
    **{f"train {name}": partial(gpu_parts.train, name=name) for name in JOBS},
    **{f"transformers {name}": partial(gpu_parts.peer, name=name) for name in JOBS},
}


def file_of(folder: Path, part: str) -> Path:
    """Where a part's result is saved."""
    return folder / f"{part.replace(',', '').replace(' ', '-')}.json"


def run_part(settings: Settings, part: str) -> None:
    """Runs a part in this process and saves what it found."""
    found = PARTS[part](settings)
    target = file_of(settings.folder, part)
    partial_file = target.with_suffix(".partial")
    partial_file.write_text(json.dumps({str(key): _plain(value) for key, value in found.items()}, indent=1))
    partial_file.replace(target)


def _plain(value: Any) -> Any:
    return {str(key): _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def run_all(settings: Settings, parts: Sequence[str], seconds: float = SECONDS) -> dict[str, str]:
    """Runs parts that have no result, each as a process of its own; what went wrong, by part."""
    wrong = {}
    for part in parts:
        if file_of(settings.folder, part).exists():
            continue
        print(f"{part} …", flush=True)
        command = [sys.executable, __file__, "--device", settings.device, "--out", str(settings.folder)]
        try:
            done = subprocess.run(
                [*command, "--steps", str(settings.steps), "--part", part],
                timeout=seconds, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            wrong[part] = f"took more than {seconds:.0f} s"
            continue
        if not file_of(settings.folder, part).exists():
            lines = done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"]
            wrong[part] = next((line for line in lines if line.startswith("error: ")), lines[-1])
    return wrong


def table(folder: Path) -> list[str]:
    """Lines about all results in a folder."""
    found = {part: json.loads(file.read_text()) for part in PARTS if (file := file_of(folder, part)).exists()}
    lines = [f"{part}: {json.dumps(found[part])}" for part in ("path", "curves", "kernels") if part in found]
    lines += [
        "",
        "| model | tokens/s | MFU | products, TFLOP/s | transformers, tokens/s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for name in JOBS:
        ours, theirs = found.get(f"train {name}", {}), found.get(f"transformers {name}", {})
        speed, other, mfu = ours.get("tokens_per_s"), theirs.get("tokens_per_s"), ours.get("mfu")
        cells = (
            name, _cell(speed, "{:.0f}"), _cell(mfu and 100 * mfu, "{:.1f} %"),
            _cell(found.get("ceiling", {}).get(name), "{:.3g}"), _cell(other, "{:.0f}"),
            _cell(speed / other if speed and other else None, "{:.2f}"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    for name in JOBS:
        waterfall = found.get(f"train {name}", {}).get("waterfall", {})
        if waterfall:
            shares = (f"{part} {100 * share:.1f} %" for part, share in waterfall.items() if share >= 0.001)
            lines.append(f"{name}: {', '.join(shares)}")
    return lines


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run, print; 1 if a part went wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--only", choices=list(PARTS), action="append", help="these parts, may be given several times")
    parser.add_argument("--steps", type=int, default=12, help="timed steps of each training")
    parser.add_argument("--part", choices=list(PARTS), help="runs one part in this process")
    chosen = parser.parse_args(argv)
    chosen.out.mkdir(parents=True, exist_ok=True)
    settings = Settings(chosen.device, chosen.out, chosen.steps)
    if chosen.part:
        run_part(settings, chosen.part)
        return 0
    wrong = run_all(settings, chosen.only or list(PARTS))
    print("\n".join(table(chosen.out)))
    for part, reason in wrong.items():
        print(f"{part}: {reason}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
