"""Which checkpoints of a run stay. No torch here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.schema import CheckpointConfig
from ...configs.strict_json import JsonError, expect_number, expect_object
from .files import remove
from .manifest import Damaged, Manifest, read_manifest, read_state
from .names import checkpoints


@dataclass(frozen=True)
class Retention:
    """What is kept; one reason is enough.

    Args:
        newest: how many of the newest; 0: every one.
        every: those whose step is a multiple of it, for ever; 0: none for this.
        best: how many of those with the lowest held-out loss after their own step.
    """

    newest: int = 0
    every: int = 0
    best: int = 0

    @staticmethod
    def of(cfg: CheckpointConfig) -> Retention:
        """What the keys say."""
        return Retention(cfg.keep, cfg.keep_every, cfg.keep_best)


@dataclass(frozen=True)
class _Candidate:
    """A usable checkpoint, as retention looks at it."""

    step: int
    path: Path
    finite: bool
    loss: float | None


def superfluous(directory: Path, newest: Path, rules: Retention) -> list[Path]:
    """The checkpoints that need not be kept once `newest`, which was just verified, is there.

    Those of later steps (of a run that was taken back to an earlier one) do not count and stay, as do those whose
    manifest cannot be used: somebody may want to look at them. Those with NaN are counted for themselves, so that they
    displace no good one, and stay for no other reason.
    """
    if rules.newest <= 0:
        return []
    found = checkpoints(directory)
    last = next(step for step, path in found if path == newest)
    usable = [one for step, path in found if step <= last and (one := _looked_at(step, path, rules)) is not None]
    stay = {newest}
    for finite in (True, False):
        stay.update(one.path for one in [one for one in usable if one.finite is finite][: rules.newest])
    good = [one for one in usable if one.finite]
    if rules.every:
        stay.update(one.path for one in good if one.step % rules.every == 0)
    evaluated = [(one.loss, -one.step, one.path) for one in good if one.loss is not None]
    stay.update(path for _, _, path in sorted(evaluated)[: rules.best])
    return [one.path for one in usable if one.path not in stay]


def retain(directory: Path, newest: Path, rules: Retention) -> list[str]:
    """Removes what is superfluous.

    Returns:
        What could not be removed and why, a line each; the rest is removed all the same.
    """
    problems: list[str] = []
    for path in superfluous(directory, newest, rules):
        # Under another name first: a half-removed checkpoint is never taken for a damaged one.
        trash = path.with_name(f".{path.name}.trash")
        try:
            os.rename(path, trash)
            remove(trash)
        except OSError as error:
            problems.append(f"{path} ({error})")
    return problems


def held_out_loss(state: Mapping[str, Any]) -> float | None:
    """The loss of the evaluation that followed on a checkpoint's own step, if there was one."""
    try:
        found = expect_object(state.get("evaluation"), "evaluation", ("step", "loss"))
        return expect_number(found["loss"], "loss") if found["step"] == state.get("step") else None
    except JsonError:
        return None


def _looked_at(step: int, path: Path, rules: Retention) -> _Candidate | None:
    """None where its manifest cannot be used."""
    try:
        manifest = read_manifest(path)
    except Damaged:
        return None
    loss = _loss(path, manifest) if rules.best and not manifest.not_finite else None
    return _Candidate(step, path, not manifest.not_finite, loss)


def _loss(path: Path, manifest: Manifest) -> float | None:
    try:
        return held_out_loss(read_state(path, manifest))
    except Damaged:
        return None
