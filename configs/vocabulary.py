"""The size of a vocabulary: padded so that ranks can share it, and as the weights that start a run have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .errors import Problem
from .strict_json import JsonError, read_json

VOCAB_MULTIPLE = 64
"""Derived vocabularies are padded up to a multiple of this, so that every usual parallel.tp divides them."""


def padded(vocab: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """The next multiple."""
    return -(-vocab // multiple) * multiple


def indivisible_vocab(vocab: int, divisor_key: str, divisor: int) -> list[Problem]:
    """A vocabulary that the ranks cannot share evenly, and the padded one that they can."""
    if divisor < 1 or vocab % divisor == 0:
        return []
    message = (
        f"{vocab} is not a multiple of {divisor_key}={divisor} (it is split over the tensor ranks); set "
        f"model.vocab={padded(vocab, divisor)}: weights that start the run are padded, and an export is cut"
    )
    return [Problem("model.vocab", message, (divisor_key,))]


def initial_vocab(path: str) -> int | None:
    """How many token ids the weights of `checkpoint.init` know: a Hugging Face folder's or a checkpoint's; none where
    that cannot be read, which is for those to say who read the weights."""
    folder = Path(path)
    try:
        if (folder / "config.json").exists():
            found = read_json((folder / "config.json").resolve())["vocab_size"]
        else:
            model: dict[str, Any] = read_json(folder / "state.json")["model"]
            found = model.get("vocab_used") or model["vocab"]
    except (OSError, JsonError, LookupError, TypeError, AttributeError):
        return None
    return found if isinstance(found, int) and not isinstance(found, bool) and found > 0 else None
