"""The checkpoints of a run as one looks at them: what each is, and which one `latest` means. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...configs.errors import Problem, UserError
from ...configs.strict_json import JsonError, expect_int, expect_object
from ..run_folder import RunFile
from .check import visible_damage
from .manifest import MANIFEST, read_manifest, read_state, resume_order
from .names import checkpoints, step_of
from .retention import held_out_loss
from .tiers.local import LOCAL, run_number

_DEGREES = ("dp", "tp", "pp", "cp", "ep", "etp")


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint, as its small files describe it.

    Args:
        path: its folder.
        step: None where it is not named after one and says none.
        saved_at: when it was completed, in Unix seconds; None without a manifest.
        nbytes: of the files that its manifest lists, and of itself; None where it cannot be used.
        layout: that it was written by, `dp=2 tp=2 zero1`; None where it does not say.
        dtype: `train.dtype` of the run; None for weights alone.
        held_out: loss of the evaluation after its step, in nats; None where there was none.
        finite: whether no value of it is NaN or infinite.
        of_node: whether a node keeps it for itself.
        problem: what is wrong, as far as it shows without reading tensors; None: nothing.
    """

    path: Path
    step: int | None
    saved_at: float | None = None
    nbytes: int | None = None
    layout: str | None = None
    dtype: str | None = None
    held_out: float | None = None
    finite: bool = True
    of_node: bool = False
    problem: str | None = None


def listed_checkpoint(path: Path) -> ListedCheckpoint:
    """What a checkpoint's small files say of it; they are compared with their checksums, the sizes of all files too."""
    step, manifest_file = step_of(path.name), path / MANIFEST
    saved_at = manifest_file.stat().st_mtime if manifest_file.is_file() else None
    problem = visible_damage(path)
    if problem is not None:
        return ListedCheckpoint(path, step, saved_at, problem=problem)
    manifest = read_manifest(path)
    state = read_state(path, manifest)
    nbytes = sum(known.size for known in manifest.files.values()) + manifest_file.stat().st_size
    same = state.get("same")
    dtype = same.get("train.dtype") if isinstance(same, dict) else None
    return ListedCheckpoint(
        path,
        step if step is not None else _whole(state.get("step")),
        saved_at,
        nbytes,
        _layout_words(state.get("layout")),
        dtype if isinstance(dtype, str) and dtype.isprintable() else None,
        held_out_loss(state),
        not manifest.not_finite,
        LOCAL in state,
    )


def checkpoints_of(path: Path) -> list[Path]:
    """The checkpoints of a run, or of a folder of checkpoints, the newest first; empty: there are none."""
    folders = [path / RunFile.CHECKPOINTS, path]
    if (path / RunFile.RESOLVED).is_file():
        folders.append(_folder_of(path / RunFile.RESOLVED))
    found = next((steps for folder in folders if (steps := checkpoints(folder))), [])
    return [checkpoint for _, checkpoint in found]


def named_checkpoints(path: Path) -> list[Path]:
    """The checkpoints that a path means, the oldest first: itself, those of the folder, those of the run.

    Raises:
        UserError: there are none.
    """
    if not path.is_dir():
        near = [str(near) for _, near in checkpoints(path.parent)[:3]]
        hint = f"; there are {', '.join(near)}" if near else ""
        raise UserError(Problem(str(path), f"there is no such checkpoint or run{hint}"))
    if (path / MANIFEST).exists() or step_of(path.name) is not None:
        return [path]
    found = checkpoints_of(path)
    if not found:
        raise UserError(Problem(str(path), "holds no checkpoint; name a checkpoint, a folder of them, or a run"))
    return found[::-1]


def checkpoints_on_node(run: Path) -> list[Path]:
    """The checkpoints that this node keeps of a run's ranks, the oldest first."""
    folder = _resolved(run / RunFile.RESOLVED, "checkpoint.local.dir")
    try:
        number = run_number(run / RunFile.NUMBER, makes=False) if folder is not None else None
    except UserError:
        return []
    if folder is None or number is None:
        return []
    found = [each for host in sorted(Path(folder, number).glob("*")) for each in checkpoints(host)]
    return [path for _, path in sorted(found)]


def latest_of(directory: Path, damaged: set[Path]) -> Path | None:
    """The checkpoint in a folder that `checkpoint.resume=latest` goes on from, where some are known to be damaged."""
    return next((path for path in resume_order(directory) if path not in damaged), None)


def _whole(value: Any) -> int | None:
    try:
        return expect_int(value, "step")
    except JsonError:
        return None


def _layout_words(value: Any) -> str | None:
    try:
        layout = expect_object(value, "layout", ("sharding", *_DEGREES))
        degrees = {name: expect_int(layout[name], name) for name in _DEGREES}
    except JsonError:
        return None
    words = [f"{name}={degree}" for name, degree in degrees.items() if degree > 1]
    sharding = layout["sharding"]
    if isinstance(sharding, str) and sharding.isidentifier() and degrees["dp"] * degrees["cp"] > 1:
        words.append(sharding)
    return " ".join(words) or "one rank"


def _folder_of(resolved: Path) -> Path:
    """Where a run that says so puts its checkpoints."""
    folder = _resolved(resolved, "checkpoint.dir")
    return Path(folder) if folder is not None else resolved.parent


def _resolved(resolved: Path, key: str) -> str | None:
    """A text of a run's resolved configuration."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        found = OmegaConf.select(OmegaConf.load(resolved), key)
    except (OSError, ValueError, OmegaConfBaseException):
        return None
    return found if isinstance(found, str) else None
