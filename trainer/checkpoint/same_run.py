"""What must be as it was when a run goes on from a checkpoint, and the keys that say otherwise. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...configs.fields import short
from ...configs.inert import differences
from ...configs.output import as_dict
from ...configs.schema import CODED_STATES, AdamWConfig, Config, SgdConfig
from ...configs.strict_json import JsonError, expect_int, expect_object
from .saved_model import model_config_from_state

_ANEW = "or start a new run with checkpoint.init"
_FREE_DATA = {"cache", "prefetch"}
"""Keys of `data` that say nothing about the tokens."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run was."""

    step: int
    updates: int
    """Steps that were not skipped."""
    tokens: int
    skipped: int

    @staticmethod
    def of(state: Mapping[str, Any], path: Path) -> RunProgress:
        """What the state of a checkpoint says.

        Raises:
            UserError: the checkpoint is not that of a run.
        """
        if "same" not in state:
            message = (
                f"{path} holds weights and no run to go on with; set checkpoint.resume=null checkpoint.init={path}"
            )
            raise UserError(Problem("checkpoint.resume", message))
        try:
            names = ("step", "updates", "tokens", "skipped")
            expect_object(state, "it", names)
            expect_object(state["same"], "same")
            return RunProgress(*(expect_int(state[name], name) for name in names))
        except JsonError as error:
            raise UserError(
                Problem("checkpoint.resume", f"state.json of {path} is not that of a run: {error}")
            ) from None

    def as_dict(self) -> dict[str, int]:
        """For a state."""
        return dict(vars(self))


def facts(cfg: Config, fingerprint: str) -> dict[str, Any]:
    """What a checkpoint's state keeps of the job: what decides which sequence a step sees, and how it is learnt from.

    Args:
        cfg: the job.
        fingerprint: of its data.
    """
    written = as_dict(cfg, sizes=True)
    return {
        "same": {
            "train.seed": cfg.train.seed,
            "train.global_batch": cfg.train.global_batch,
            "train.seq_len": cfg.train.seq_len,
            "train.dtype": cfg.train.dtype,
            "optim.name": cfg.optim.name,
            "optim.momentum": _momentum(cfg),
            "optim.states": _states(cfg),
            "optim.states_above": _states_above(cfg),
            "data": fingerprint,
        },
        "model": written["model"],
        "data": written["data"],
        "layout": layout_of(cfg),
        **({"imports": list(cfg.origin.imports)} if cfg.origin.imports else {}),
    }


def run_state(
    cfg: Config, fingerprint: str, progress: RunProgress, evaluation: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a checkpoint's state says of its run: `facts`, how far it is, and its last evaluation, if there was one."""
    state = progress.as_dict() | facts(cfg, fingerprint)
    return state if evaluation is None else state | {"evaluation": dict(evaluation)}


def layout_of(cfg: Config) -> dict[str, Any]:
    """The layout that a checkpoint was written by: for those who look at it, any other loads it too."""
    p = cfg.parallel
    degrees = {"dp": p.dp, "tp": p.tp, "pp": p.pp, "cp": p.cp, "ep": p.ep, "etp": p.etp}
    return {**degrees, "sharding": p.data.sharding}


def run_problems(state: Mapping[str, Any], cfg: Config, path: Path, fingerprint: str | None = None) -> list[Problem]:
    """The keys in which a job is another one than that of a checkpoint.

    Args:
        state: of the checkpoint.
        cfg: the job.
        path: the checkpoint.
        fingerprint: of the job's data; none: not known yet.
    """
    try:
        RunProgress.of(state, path)
        model = model_config_from_state(state)
    except UserError as error:
        return error.problems
    problems = [_changed(f"model.{key}", old, new) for key, (old, new) in differences(model, cfg.model).items()]
    saved: Mapping[str, Any] = state["same"]
    now = facts(cfg, fingerprint or "")["same"]
    for key in ("train.seed", "train.global_batch", "train.seq_len", "optim.name"):
        if key in saved and saved[key] != now[key]:
            problems.append(_changed(key, saved[key], now[key]))
    # Masters are fp64 or fp32; bf16 is what is computed with.
    if "train.dtype" in saved and (saved["train.dtype"] == "fp64") != (cfg.train.dtype == "fp64"):
        problems.append(_changed("train.dtype", saved["train.dtype"], cfg.train.dtype))
    # Momentum is kept if there is any.
    if isinstance(cfg.optim, SgdConfig) and bool(saved.get("optim.momentum", cfg.optim.momentum)) != bool(
        now["optim.momentum"]
    ):
        problems.append(_changed("optim.momentum", saved["optim.momentum"], cfg.optim.momentum))
    for key, before in (("optim.states", "fp32"), ("optim.states_above", None)):
        if saved.get(key, before) != now[key] and saved.get("optim.name") == now["optim.name"] == "adamw":
            problems.append(_changed(key, saved.get(key, before), now[key]))
    if fingerprint is not None and saved.get("data") != fingerprint and not problems:
        problems += _other_data(state.get("data"), as_dict(cfg)["data"], saved.get("data"), fingerprint)
    return problems


def _momentum(cfg: Config) -> float | None:
    return cfg.optim.momentum if isinstance(cfg.optim, SgdConfig) else None


def _states(cfg: Config) -> str | None:
    return cfg.optim.states if isinstance(cfg.optim, AdamWConfig) else None


def _states_above(cfg: Config) -> int | None:
    optim = cfg.optim
    return optim.states_above if isinstance(optim, AdamWConfig) and optim.states in CODED_STATES else None


def _changed(key: str, old: Any, new: Any) -> Problem:
    back = f"set {key}={_written(old)}" if not isinstance(old, (dict, list)) else "set it back"
    return Problem(key, f"the checkpoint was trained with {short(old)}, not {short(new)}; {back}, {_ANEW}")


def _written(value: Any) -> str:
    return str(value) if isinstance(value, str) else short(value)


def _other_data(saved: Any, now: Mapping[str, Any], old: Any, new: str) -> list[Problem]:
    """The keys of `data` that differ; where none does, the files do."""
    before, after = _flat(saved if isinstance(saved, Mapping) else {}), _flat(now)
    keys = [key for key in after if key in before and before[key] != after[key] and key not in _FREE_DATA]
    if keys:
        return [_changed(f"data.{key}", before[key], after[key]) for key in keys]
    message = f"the checkpoint was trained with other tokens ({short(old)}, not {short(new)}) from data.* as it is here"
    return [Problem("data", f"{message}; bring the files back as they were, {_ANEW}")]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and key == "tokenizer":
            flat |= _flat(value, f"{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
