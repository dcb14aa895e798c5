"""The texts that random jobs train on, made once in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from pentad.trainer.data.indexed import IndexedWriter

TOKENS = 60
"""Token ids of the .bin corpora lie below."""
WIDE = 257
"""Tokens of the byte tokenizer, which the texts need."""


def make_corpora(folder: Path) -> None:
    """Writes `walk.bin`, `jumps.bin` and `lines.jsonl` into the folder, unless they are there."""
    done = folder / "done"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, steps, seed in (("walk", [1, 2, 2, 5], 1), ("jumps", [7, 11, 11, 13], 2)):
        _write_bin(folder / name, steps, np.random.default_rng(seed))
    draws = np.random.default_rng(3)
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as file:
        for n in range(1500):
            words = " ".join(f"{n * k % 97}" for k in range(int(draws.geometric(0.15))))
            file.write(json.dumps({"text": f"line {words}."}) + "\n")
    done.touch()


def _write_bin(prefix: Path, steps: list[int], draws: np.random.Generator) -> None:
    """Documents of 1 to some hundred tokens, most of a dozen: walks with a few possible steps."""
    with IndexedWriter(str(prefix), np.dtype("u2")) as writer:
        for n in range(1200):
            length = 200 if n % 50 == 0 else int(draws.geometric(0.09))
            writer.add(np.cumsum(draws.choice(steps, size=length)) % (TOKENS - 1) + 1)
