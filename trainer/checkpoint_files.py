"""Checkpoints on disk: names, the checksum manifest, atomic publishing, retention, discovery. No process groups here.

checkpoints/
  step-00000010/            whole and verified, or it does not have this name
    __0_0.distcp …          tensors, in the format of torch's distributed checkpoint
    .metadata               which box of which tensor is where
    state.json              step, data position, seed, model config …
    manifest.json           size and CRC-32 of every other file
  .step-00000020.tmp/       being written, or left by a killed run: removed by the next save
  .step-00000010.old/       being replaced by a new checkpoint of the same step
  .step-00000005.trash/     being removed
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from torch.distributed.checkpoint.filesystem import FileSystem

MANIFEST = "manifest.json"
STATE = "state.json"
METADATA = ".metadata"
FORMAT_VERSION = 1
_CHUNK = 8 << 20
"""Bytes read at a time; zlib releases the interpreter lock for each."""
_READERS = 4
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class FileSum:
    """What the manifest says about a file: bytes and CRC-32."""

    size: int
    crc32: int


class Damaged(Exception):
    """A checkpoint cannot be used; the message names file and reason."""


class ChecksummedFiles(FileSystem):
    """DCP's file system, which sums up what is written and forces it to disk.

    DCP's own `sync_files` does not flush `.metadata` before it syncs, and has no checksums: a flipped bit in a tensor
    would load without any error.
    """

    def __init__(self) -> None:
        self.sums: dict[str, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            counted = _Counted(stream)
            yield counted
            counted.finish()
            self.sums[Path(path).name] = FileSum(counted.size, counted.crc32)

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class _Counted:
    """A file being written from its start to its end."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.size, self.crc32 = stream, 0, 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._stream.write(view)
        self.crc32 = zlib.crc32(view, self.crc32)
        self.size += len(view)
        return len(view)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """DCP closes its streams early; they are closed by `ChecksummedFiles`, after the sync."""

    def finish(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())


def checksum(path: Path) -> FileSum:
    """Size and CRC-32 of a file's content."""
    size = crc = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            size, crc = size + len(data), zlib.crc32(data, crc)
    return FileSum(size, crc)


def write_json(path: Path, value: object) -> FileSum:
    """Writes and syncs a small JSON file."""
    data = (json.dumps(value, indent=1) + "\n").encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(len(data), zlib.crc32(data))


def sync_folder(path: Path) -> None:
    """Forces a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(folder: Path, sums: Mapping[str, FileSum], state: Mapping[str, Any]) -> None:
    """Completes a folder that has its tensors: `state.json`, then the manifest over everything, all synced.

    Raises:
        Damaged: a file does not have the size that was written.
    """
    files = {**sums, STATE: write_json(folder / STATE, state)}
    for name, known in files.items():
        size = (folder / name).stat().st_size
        if size != known.size:
            raise Damaged(f"{folder / name} has {size} bytes, {known.size} were written")
    write_json(
        folder / MANIFEST, {"format": FORMAT_VERSION, "files": {name: asdict(files[name]) for name in sorted(files)}}
    )
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files that a checkpoint must have.

    Raises:
        Damaged: there is none, it is not readable, or it is of a later format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        version = manifest["format"]
        files = {name: FileSum(int(f["size"]), int(f["crc32"])) for name, f in manifest["files"].items()}
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Damaged(f"{MANIFEST} is not readable ({error})") from None
    if version != FORMAT_VERSION:
        raise Damaged(f"{MANIFEST} has format {version}, this version of pentad reads {FORMAT_VERSION}")
    for name in (METADATA, STATE):
        if name not in files:
            raise Damaged(f"{MANIFEST} does not list {name}")
    return files


def read_state(folder: Path) -> dict[str, Any]:
    """What `state.json` holds."""
    return cast(dict[str, Any], json.loads((folder / STATE).read_bytes()))


def differences(folder: Path, files: Mapping[str, FileSum]) -> list[str]:
    """What is wrong with each of `files`, read whole: missing, of another size, or with another checksum."""

    def problem(name: str) -> str | None:
        known, path = files[name], folder / name
        try:
            size = path.stat().st_size
            if size != known.size:
                return f"{name} has {size} bytes instead of {known.size}"
            found = checksum(path)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} is not readable ({error})"
        if found != known:
            return f"{name} has checksum {found.crc32:08x} instead of {known.crc32:08x}"
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        return [p for p in pool.map(problem, sorted(files)) if p is not None]


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty: every byte is as it was written. For one process."""
    if not folder.is_dir():
        return [f"{folder} is not a folder"]
    try:
        return differences(folder, read_manifest(folder))
    except Damaged as error:
        return [str(error)]


def step_folder(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step is published."""
    return directory / f"step-{step:08d}"


def temporary(folder: Path) -> Path:
    """Where a checkpoint is written before it is published as `folder`."""
    return folder.with_name(f".{folder.name}.tmp")


def checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the published checkpoints, newest first; no word about their state."""
    if not directory.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in directory.iterdir())
    return sorted(((int(match[1]), path) for match, path in named if match and path.is_dir()), reverse=True)


def publish(written: Path, folder: Path) -> None:
    """Gives a complete, synced folder its final name: atomically, or in place of an older one of that name."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)  # killed between this and the next rename: `clean` brings it back
    os.rename(written, folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove(folder: Path) -> None:
    """Removes a folder, if it is there."""
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
            shutil.rmtree(left, ignore_errors=True)


def retain(directory: Path, newest: Path, keep: int) -> list[Path]:
    """Removes what is older than the `keep` newest up to `newest`, which was just verified; 0 keeps everything.

    Checkpoints of later steps (of a run that was taken back to an earlier step) are not touched and do not count.

    Returns:
        What was removed.
    """
    if keep <= 0:
        return []
    steps = checkpoints(directory)
    last = next(step for step, path in steps if path == newest)
    removed = [path for step, path in steps if step <= last][keep:]
    for path in removed:
        # Under another name first: a half-removed checkpoint is never taken for a damaged one.
        trash = path.with_name(f".{path.name}.trash")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)
    return removed
