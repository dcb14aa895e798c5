"""Files and folders that a configuration names: home folders, patterns, and those that are not there."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from .errors import Problem, nearest
from .fields import value_of, with_value
from .schema import BinData, BlendData, Config, TextData
from .schema_data import TokenizedData
from .tables.schedules import is_program

PATHS = (
    "runs_dir",
    "parallel.data.deepspeed.config",
    "parallel.pipeline.schedule",
    "data.paths",
    "data.weights",
    "data.tokenizer.path",
    "data.cache",
    "memory.offload_disk",
    "checkpoint.dir",
    "checkpoint.local.dir",
    "checkpoint.resume",
    "checkpoint.init",
    "log.prometheus",
)
"""Every key whose text, list of texts or names of a mapping are paths. `resolve` expands them; nobody does later."""
TOKENIZER_FILE = "tokenizer.json"
_SUFFIXES = (".bin", ".idx")
_NEWEST = ("auto", "true", "yes", "last", "newest", "latest", "must", "allow")
"""How other tools say `latest`."""

RUN_CONFIG = "config.yaml"
"""In a run's folder, its configuration as the user gave it."""
CHECKPOINT_FOLDER = "checkpoints"


def default_checkpoint_folder(config: Config) -> str:
    """Of a job that names none."""
    return str(Path(config.runs_dir) / config.name / CHECKPOINT_FOLDER)


def resolve_paths(config: Config) -> Config:
    """The configuration with `~` written out in all paths, prefixes without suffix, and a tokenizer's file."""
    for key in PATHS:
        value = value_of(config, key)
        if value is not None:
            config = with_value(config, key, _expand(value))
    data = config.data
    if isinstance(data, BinData):
        data = replace(data, paths=tuple(map(_prefix, data.paths)))
    elif isinstance(data, BlendData):
        shorter = {_prefix(path): weight for path, weight in data.weights.items()}
        data = replace(data, weights=shorter) if len(shorter) == len(data.weights) else data
    tokenizer = data.tokenizer.path
    if tokenizer is not None and os.path.isfile(os.path.join(tokenizer, TOKENIZER_FILE)):
        data = replace(data, tokenizer=replace(data.tokenizer, path=os.path.join(tokenizer, TOKENIZER_FILE)))
    return replace(config, data=data)


def find_paths(path: str) -> list[str]:
    """The files and folders that a path or a glob pattern means, sorted.

    What exists is meant literally, also a folder with brackets in its name in front of a pattern.
    """
    if os.path.exists(path) or not path.strip():
        return [path] if path.strip() else []
    parts = Path(path).parts
    there = next((n for n in range(len(parts) - 1, 0, -1) if os.path.exists(Path(*parts[:n]))), 0)
    folder, rest = (str(Path(*parts[:there])) if there else ""), str(Path(*parts[there:]))
    return sorted(glob.glob(os.path.join(glob.escape(folder), rest), recursive=True))


def check_files(config: Config) -> list[Problem]:
    """The files and folders that the configuration names and that do not exist."""
    wrong = _spellings(config)
    keys = {problem.key for problem in wrong}
    return wrong + [problem for problem in _missing(config) if problem.key not in keys]


def _missing(config: Config) -> Iterator[Problem]:
    data, c = config.data, config.checkpoint
    if isinstance(data, TextData):
        # Links in a circle make glob's ** endless: `trainer.data` searches such patterns, before any rank starts.
        given = [path for path in data.paths if "**" not in path or os.path.exists(path)]
        yield from (_no_file("data.paths", path) for path in given if not find_paths(path))
    elif isinstance(data, TokenizedData):
        files = [prefix + suffix for prefixes, _ in data.groups for prefix in prefixes for suffix in _SUFFIXES]
        yield from (_no_file(data.given, file) for file in files if not os.path.isfile(file))
    schedule = config.parallel.pipeline.schedule
    if config.parallel.pp > 1 and schedule is not None and is_program(schedule) and not os.path.isfile(schedule):
        yield _no_file("parallel.pipeline.schedule", schedule)
    sharing = config.parallel.data
    own = sharing.deepspeed.config if sharing.sharding == "deepspeed" else None
    if own is not None and not os.path.isfile(own):
        yield _no_file("parallel.data.deepspeed.config", own)
    tokenizer = data.tokenizer.path
    if tokenizer is not None and not isinstance(data, TokenizedData) and not os.path.isfile(tokenizer):
        yield _no_tokenizer(tokenizer)
    for key, path in (("checkpoint.init", c.init), ("checkpoint.resume", c.resume)):
        if path is None or path == "latest" or os.path.exists(path):
            continue
        if key == "checkpoint.resume" and path.lower() in _NEWEST:
            yield Problem(key, f"no such file: {path}; write checkpoint.resume=latest for the newest checkpoint")
        else:
            yield _no_file(key, path)


def _spellings(config: Config) -> list[Problem]:
    """Texts that are no paths, and those that begin with the home folder of somebody who is not there."""
    problems: list[Problem] = []
    for key, path in [(k, text) for k in PATHS for text in _texts(value_of(config, k))]:
        if not path.strip() or "\0" in path:
            problems.append(Problem(key, f"{path!r} is no path; give one, or leave {key} out"))
        elif path.startswith("~"):
            message = f"{path} is the home folder of a user who is not known here; write ./{path} for a name with ~"
            problems.append(Problem(key, message))
    return problems


def _no_tokenizer(path: str) -> Problem:
    if os.path.isdir(path):
        message = f"{path} is a folder without {TOKENIZER_FILE}; give the file, or null for the byte tokenizer"
        return Problem("data.tokenizer.path", message)
    return _no_file("data.tokenizer.path", path)


def _no_file(key: str, path: str) -> Problem:
    """The problem with a path that leads nowhere, with the nearest one that does."""
    separate = [part.strip() for part in path.split(",")]
    if len(separate) > 1 and all(find_paths(os.path.expanduser(part)) for part in separate):
        return Problem(key, f"no such file: {path}; write {key}=[{', '.join(separate)}] for several")
    there = next(parent for parent in Path(path).absolute().parents if os.path.isdir(parent))
    if there != Path(path).absolute().parent:
        return Problem(key, f"no such file: {path}; there is no folder {Path(path).parent}")
    try:
        hint = nearest(Path(path).name, [p.name for p in there.iterdir()])
    except OSError:
        hint = None
    return Problem(key, f"no such file: {path}" + (f"; did you mean {Path(path).parent / hint}?" if hint else ""))


def _prefix(path: str) -> str:
    """The prefix of PREFIX.bin or PREFIX.idx, where that is the file."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in _SUFFIXES and os.path.isfile(path) and not os.path.isfile(f"{path}.bin") else path


def _expand(value: Any) -> Any:
    if isinstance(value, dict):
        wider = {os.path.expanduser(path): weight for path, weight in value.items()}
        return wider if len(wider) == len(value) else value
    return tuple(map(os.path.expanduser, value)) if isinstance(value, tuple) else os.path.expanduser(value)


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())
