"""A schedule that is longer than the run: the warm-up and the decay of a job, shortened for a trial of few steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .errors import Problem
from .sources import Given

_STEPS, _WARMUP, _DECAY = "train.steps", "optim.schedule.warmup_steps", "optim.schedule.decay_steps"


def fit_schedule(
    values: Mapping[str, Any], given: Mapping[str, Given], defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[Problem, ...]]:
    """The values with a schedule that the run has room for, and a note for each that had to be shortened.

    Only where the steps were given after it: on the command line for a file's schedule, or in a file for the schema's
    default. A schedule and a length that stand side by side contradict each other, and `validate` says so.

    Args:
        values: of the given keys.
        given: where and in which layer each was given.
        defaults: of the other keys.
    """
    whole = {**defaults, **values}
    steps, warmup, decay = whole[_STEPS], whole[_WARMUP], whole.get(_DECAY, 0)
    if steps < 1 or warmup < 0 or decay < 0 or warmup + decay <= steps:
        return dict(values), ()
    layers = {key: given[key].layer if key in given else -1 for key in (_STEPS, _WARMUP, _DECAY)}
    sizes = {key: size for key, size in ((_WARMUP, warmup), (_DECAY, decay)) if size}
    if any(layers[key] >= layers[_STEPS] for key in sizes):
        return dict(values), ()
    # In proportion; a decay keeps at least one step, which it must have.
    shorter = {_WARMUP: min(warmup * steps // (warmup + decay), steps - (1 if decay else 0))}
    shorter[_DECAY] = steps - shorter[_WARMUP]
    notes = []
    for key, size in sizes.items():
        where = f" ({given[key].where})" if key in given else ""
        message = f"{size}{where} does not fit into {_STEPS}={steps}; taken as {shorter[key]}"
        notes.append(Problem(key, message))
    return {**values, **{key: shorter[key] for key in sizes}}, tuple(notes)
