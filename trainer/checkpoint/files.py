"""Checkpoints on disk: atomic publishing, and what killed runs leave. No process groups here, and no torch.

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
from contextlib import suppress
from pathlib import Path

from .manifest import sync_folder


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
    with suppress(OSError):  # it is published; `clean` tries again, and says so
        remove(old)


def remove(folder: Path) -> None:
    """Removes a folder, or the link to one, if it is there.

    Raises:
        OSError: something of it could not be removed; the rest is gone.
    """
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
        return
    failed: list[OSError] = []

    def note(_: object, __: object, about: tuple[type[BaseException], BaseException, object]) -> None:
        if isinstance(about[1], OSError) and not isinstance(about[1], FileNotFoundError):
            failed.append(about[1])

    shutil.rmtree(folder, onerror=note)  # pyright: ignore[reportDeprecated]  # onexc is of Python 3.12
    if failed:
        raise failed[0]


def clean(directory: Path) -> list[str]:
    """Undoes what killed runs left half done. Only while nobody writes there.

    Returns:
        What could not be undone and why, a line each.
    """
    problems: list[str] = []
    if not directory.is_dir():
        return problems
    for left in directory.glob(".step-*.old"):
        name = left.name.removeprefix(".").removesuffix(".old")
        if not (directory / name).exists():
            os.rename(left, directory / name)
    for pattern in (".step-*.tmp", ".step-*.trash", ".step-*.old"):
        for left in directory.glob(pattern):
            try:
                remove(left)
            except OSError as error:
                problems.append(f"{left} ({error})")
    return problems
