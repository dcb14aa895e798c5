"""Whether a job's checkpoints are there and fit it, looked at before any rank starts.

No torch here, unless weights come from a Hugging Face folder. Only small files are read: the run itself compares every
byte before it goes on from a checkpoint.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...configs.schema import Config, ModelConfig, MoeConfig
from ..run_folder import RunFile, checkpoint_folder, run_folder
from .manifest import MANIFEST, STATE, Damaged, Manifest, read_manifest, read_state, resume_order
from .names import checkpoints
from .same_run import run_problems
from .saved_model import check_same_model, model_config_from_state
from .tiers.local import run_number


def checkpoint_problems(cfg: Config) -> list[Problem]:
    """What is wrong with the checkpoints that a job is to go on or start from.

    Args:
        cfg: resolved.
    """
    resume, init = cfg.checkpoint.resume, cfg.checkpoint.init
    if resume == "latest":
        directory = checkpoint_folder(cfg)
        found = resume_order(directory)
        usable = next((path for path in found if _state(path) is not None), None)
        if usable is not None:
            return run_problems(_state(usable) or {}, cfg, usable)
        if found and not _nodes_may_have_one(cfg):
            return [all_damaged(directory, len(found))]
    elif resume is not None:
        path = Path(str(resume))
        problem = missing(path, "checkpoint.resume") or _damage(path, "checkpoint.resume")
        return [problem] if problem else run_problems(read_state(path), cfg, path)
    return _initial(cfg, Path(init)) if init is not None else []


def _nodes_may_have_one(cfg: Config) -> bool:
    """Whether this node has a checkpoint of its own of the run, of which the ranks will see what it is worth."""
    if cfg.checkpoint.local.dir is None:
        return False
    number = run_number(run_folder(cfg) / RunFile.NUMBER, makes=False)
    return number is not None and any(Path(cfg.checkpoint.local.dir, number).glob("*/step-*"))


def missing(path: Path, key: str) -> Problem | None:
    """Why there is no checkpoint at `path`, which `key` names."""
    if path.is_dir() and not (path / MANIFEST).exists() and checkpoints(path):
        newest = checkpoints(path)[0][1]
        return Problem(key, f"{path} is a folder of checkpoints; name one, such as {newest}")
    inner = path / RunFile.CHECKPOINTS
    if path.is_dir() and not (path / MANIFEST).exists() and checkpoints(inner):
        newest = checkpoints(inner)[0][1]
        return Problem(key, f"{path} is the folder of a run; name one of its checkpoints, such as {newest}")
    if path.is_dir() and not any((path / name).exists() for name in (MANIFEST, STATE)):
        neither = " and no Hugging Face model (no config.json)" if key == "checkpoint.init" else ""
        return Problem(key, f"{path} holds no checkpoint (no {MANIFEST}){neither}")
    if path.exists() and not path.is_dir():
        return Problem(key, f"{path} is a file; name the folder of a checkpoint")
    if not path.is_dir():
        near = [str(p) for _, p in checkpoints(path.parent)[:3]]
        hint = f"; there are {', '.join(near)}" if near else ""
        return Problem(key, f"{path} does not exist{hint}")
    return None


def all_damaged(directory: Path, count: int) -> Problem:
    """What `latest` says where nothing can be used."""
    message = f"all {count} checkpoints in {directory} are damaged; move them away to start afresh, or name a good one"
    return Problem("checkpoint.resume", message)


def visible_damage(path: Path) -> str | None:
    """What can be seen of damage without reading tensors."""
    try:
        manifest = read_manifest(path)
        _check_sizes(path, manifest)
        read_state(path, manifest)
    except Damaged as error:
        return str(error)
    return None


def _damage(path: Path, key: str) -> Problem | None:
    reason = visible_damage(path)
    return None if reason is None else Problem(key, f"{path} is damaged: {reason}")


def _check_sizes(path: Path, manifest: Manifest) -> None:
    for name, known in manifest.files.items():
        try:
            size = (path / name).lstat().st_size
        except OSError:
            raise Damaged(f"{name} is missing") from None
        if size != known.size:
            raise Damaged(f"{name} has {size} bytes instead of {known.size}")


def _state(path: Path) -> dict[str, Any] | None:
    """None where the checkpoint is damaged."""
    return None if visible_damage(path) else read_state(path)


def _initial(cfg: Config, path: Path) -> list[Problem]:
    try:
        if (path / "config.json").exists():
            return _hugging_face(cfg, path)
        problem = missing(path, "checkpoint.init") or _damage(path, "checkpoint.init")
        if problem is not None:
            return [problem]
        given = model_config_from_state(read_state(path))
        _fits(given, cfg, path)
    except UserError as error:
        return error.problems
    return []


def _hugging_face(cfg: Config, path: Path) -> list[Problem]:
    from ...models.hf.folder import HfFolder, model_config_from_hf, read_hf_config

    given = model_config_from_hf(read_hf_config(path))
    _fits(given, cfg, path)
    with HfFolder(path, given, lambda _: None):  # names and shapes, of the files' headers
        return []


def _fits(given: ModelConfig, cfg: Config, path: Path) -> None:
    """Raises UserError where the weights are those of another model."""
    if not cfg.checkpoint.upcycle:
        check_same_model(given, cfg.model, path)
        return
    from ...models.weights.upcycle import check_upcycling

    if not given.moe.experts:
        check_same_model(given, dataclasses.replace(cfg.model, moe=MoeConfig()), path)
    check_upcycling(given, cfg.model)
