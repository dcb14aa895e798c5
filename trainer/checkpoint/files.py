"""Checkpoints on disk: atomic publishing, retention, and what killed runs leave. No process groups here, and no torch.

checkpoints/
  step-00000010/            whole and verified, or it does not have this name
    rank-00000-0.safetensors …  tensors
    tensors.json            which box of which tensor is where
    state.json              step, data position, seed, model config …
    manifest.json           size and CRC-32 of every other file, the step, and a CRC-32 of its own
  .step-00000020.tmp/       being written, or left by a killed run: removed by the next save
  .step-00000010.old/       being replaced by a new checkpoint of the same step
  .step-00000005.trash/     being removed
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .manifest import is_finite, sync_folder
from .names import checkpoints


def temporary(folder: Path) -> Path:
    """Where a checkpoint is written before it is published as `folder`."""
    return folder.with_name(f".{folder.name}.tmp")


def publish_folder(written: Path, folder: Path) -> None:
    """Gives a complete, synced folder its final name: atomically, or in place of an older one of that name."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        remove(old)
        os.rename(folder, old)  # killed between this and the next rename: `clean` brings it back
    os.rename(written, folder)
    sync_folder(folder.parent)
    remove(old)


def remove(folder: Path) -> None:
    """Removes a folder, or the link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def clean(directory: Path) -> None:
    """Undoes what killed runs left half done. Only while nobody writes there."""
    if not directory.is_dir():
        return
    for left in directory.glob(".step-*.old"):
        name = left.name.removeprefix(".").removesuffix(".old")
        if not (directory / name).exists():
            os.rename(left, directory / name)
    for pattern in (".step-*.tmp", ".step-*.trash", ".step-*.old"):
        for left in directory.glob(pattern):
            remove(left)


def retain(directory: Path, newest: Path, keep: int) -> list[Path]:
    """Removes what is older than the `keep` newest up to `newest`, which was just verified; 0 keeps everything.

    Checkpoints with NaN in them are counted for themselves. Those of later steps (of a run that was taken back to an
    earlier step) are not touched and do not count.

    Returns:
        What was removed.
    """
    if keep <= 0:
        return []
    kept: dict[bool | None, int] = {}
    removed: list[Path] = []
    last = next(step for step, path in checkpoints(directory) if path == newest)
    for step, path in checkpoints(directory):
        if step > last:
            continue
        # Those with NaN never count in the place of good ones; what is damaged counts for nothing and stays.
        finite = is_finite(path)
        kept[finite] = kept.get(finite, 0) + 1
        if finite is not None and kept[finite] > keep:
            removed.append(path)
    for path in removed:
        # Under another name first: a half-removed checkpoint is never taken for a damaged one.
        trash = path.with_name(f".{path.name}.trash")
        os.rename(path, trash)
        remove(trash)
    return removed
