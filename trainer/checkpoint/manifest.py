"""What a checkpoint's folder must hold, byte for byte: the manifest, checksums, the run's state. No torch here.

Nothing in the folder is believed: every JSON file is read strictly (`configs.strict_json`), a file's name leads nowhere
else, links are not followed.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...configs.strict_json import (
    MAX_BYTES,
    JsonError,
    expect_file_name,
    expect_int,
    expect_list,
    expect_object,
    expect_text,
    open_regular,
    parse_json,
    read_bytes,
)
from ..processes.threads import map_threads
from .names import checkpoints, step_of

MANIFEST = "manifest.json"
STATE = "state.json"
INDEX = "tensors.json"
OLD_INDEX = ".metadata"
FORMAT = 2
OLD_FORMAT = 1
_CHUNK = 8 << 20
"""Bytes read at a time; zlib releases the interpreter lock for each."""
_READERS = 4


@dataclass(frozen=True)
class FileSum:
    """What the manifest says about a file: bytes and CRC-32."""

    size: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's list of files."""

    format: int
    files: dict[str, FileSum]
    not_finite: tuple[str, ...] = ()
    """Some of the tensors that hold NaN or infinite values."""

    @property
    def index(self) -> str:
        """The file that says where each tensor is."""
        return INDEX if self.format == FORMAT else OLD_INDEX


class Damaged(Exception):
    """A checkpoint cannot be used; the message names file and reason, in one line."""


class SummedFile:
    """A file being written from its start to its end, whose checksum is known afterwards.

    Args:
        path: of the file, which must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb")
        self._size = self._crc32 = 0

    def write(self, data: memoryview | bytes) -> None:
        """Appends bytes."""
        for at in range(0, len(data), _CHUNK):
            part = data[at : at + _CHUNK]
            self._file.write(part)
            self._crc32 = zlib.crc32(part, self._crc32)
            self._size += len(part)

    def finish(self) -> FileSum:
        """Forces what was written to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return FileSum(self._size, self._crc32)

    def __enter__(self) -> SummedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def write_file(path: Path, data: bytes) -> FileSum:
    """Writes and syncs a small file."""
    with SummedFile(path) as file:
        file.write(data)
        return file.finish()


def sync_folder(path: Path) -> None:
    """Forces a folder's entries to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_manifest(
    folder: Path, sums: Mapping[str, FileSum], state: Mapping[str, Any], not_finite: Sequence[str] = ()
) -> None:
    """Completes a folder that has its tensors and their index: `state.json`, then the manifest over everything.

    Args:
        folder: of the checkpoint.
        sums: of its files.
        state: of the run.
        not_finite: some of the tensors that hold NaN or infinite values.

    Raises:
        Damaged: a file does not have the size that was written.
    """
    files = {**sums, STATE: write_file(folder / STATE, _text(state))}
    for name, known in files.items():
        size = (folder / name).stat().st_size
        if size != known.size:
            raise Damaged(f"{folder / name} has {size} bytes, {known.size} were written")
    listed = {name: asdict(files[name]) for name in sorted(files)}
    manifest = {"format": FORMAT, "step": int(state.get("step", 0)), "not_finite": list(not_finite), "files": listed}
    write_file(folder / MANIFEST, _text({**manifest, "crc32": _own_sum(manifest)}))
    sync_folder(folder)


def _text(value: object) -> bytes:
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def _own_sum(manifest: Mapping[str, Any]) -> int:
    """Over the values, so that neither layout nor order matter."""
    rest = {key: value for key, value in manifest.items() if key != "crc32"}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """The files that a checkpoint must have.

    Raises:
        Damaged: there is no manifest, it is not as it was written, of a later format, or of another step than the
            folder's name says.
    """
    try:
        found = expect_object(parse_json(read_bytes(folder / MANIFEST)), "it", ("format", "files"))
        version = expect_int(found["format"], "format")
        if version not in (OLD_FORMAT, FORMAT):
            raise Damaged(
                f"{MANIFEST} has format {version}, this version of pentad reads {OLD_FORMAT} to {FORMAT}; "
                "install a newer pentad"
            )
        if version == FORMAT:
            expect_object(found, "it", ("step", "crc32"))
            known, own = expect_int(found["crc32"], "crc32"), _own_sum(found)
            if known != own:
                raise JsonError(f"its own checksum is {own:08x} instead of {known:08x}")
        files = {expect_file_name(name, "a file"): _sum(name, f) for name, f in _files(found).items()}
        bad = [expect_text(name, "a name") for name in expect_list(found.get("not_finite", []), "not_finite")]
    except FileNotFoundError:
        raise Damaged(f"{MANIFEST} is missing") from None
    except OSError as error:
        raise Damaged(f"{MANIFEST} is not readable ({error.strerror})") from None
    except JsonError as error:
        raise Damaged(f"{MANIFEST} is not readable ({error})") from None
    manifest = Manifest(version, files, tuple(bad))
    for name in (manifest.index, STATE):
        if name not in files:
            raise Damaged(f"{MANIFEST} does not list {name}")
    if version == FORMAT:
        _check_step(folder, expect_int(found["step"], "step"))
    return manifest


def is_finite(folder: Path) -> bool | None:
    """Whether a checkpoint was saved without NaN and infinite values; none: its manifest cannot be used."""
    try:
        return not read_manifest(folder).not_finite
    except Damaged:
        return None


def resume_order(directory: Path) -> list[Path]:
    """The published checkpoints in the order in which `latest` tries them: the newest first, those with NaN last."""
    found = [path for _, path in checkpoints(directory)]
    return sorted(found, key=lambda path: is_finite(path) is False)


def _files(found: Mapping[str, Any]) -> dict[str, Any]:
    return expect_object(found["files"], "files")


def _sum(name: str, value: Any) -> FileSum:
    about = expect_object(value, name, ("size", "crc32"))
    size = expect_int(about["size"], f"size of {name}")
    return FileSum(size, expect_int(about["crc32"], f"crc32 of {name}", high=2**32 - 1))


def _check_step(folder: Path, step: int) -> None:
    named = step_of(folder.name)
    if named is not None and named != step:
        raise Damaged(f"it was saved as step {step} and its folder was renamed to {folder.name}; give it its name back")


def read_state(folder: Path, manifest: Manifest | None = None) -> dict[str, Any]:
    """What `state.json` holds, compared with its checksum.

    Raises:
        Damaged: it is not as it was written, or of another step than the folder's name says.
    """
    manifest = manifest or read_manifest(folder)
    try:
        state = expect_object(parse_json(read_verified(folder, STATE, manifest.files[STATE])), "it")
        if "step" in state:
            _check_step(folder, expect_int(state["step"], "step"))
    except JsonError as error:
        raise Damaged(f"{STATE} is not readable ({error})") from None
    return state


def read_verified(folder: Path, name: str, known: FileSum, max_bytes: int = MAX_BYTES) -> bytes:
    """A small file of a checkpoint, compared with its checksum.

    Raises:
        Damaged: it is not as it was written.
    """
    try:
        data = read_bytes(folder / name, max_bytes=max_bytes)
    except FileNotFoundError:
        raise Damaged(f"{name} is missing") from None
    except OSError as error:
        raise Damaged(f"{name} is not readable ({error.strerror})") from None
    except JsonError as error:
        raise Damaged(f"{name} is {error}") from None
    problem = _difference(name, FileSum(len(data), zlib.crc32(data)), known)
    if problem is not None:
        raise Damaged(problem)
    return data


def damaged_files(
    folder: Path, files: Mapping[str, FileSum], advance: Callable[[int], object] = bool
) -> dict[str, str]:
    """What is wrong with those of `files` that are not as they were written, read whole: missing, of another size, or
    with another checksum.

    Args:
        folder: of the checkpoint.
        files: of its manifest.
        advance: told the bytes read since it was told last, from several threads.
    """

    def problem(name: str) -> str | None:
        try:
            fd = open_regular(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except JsonError as error:
            return f"{name} is {error}"
        except OSError as error:
            return f"{name} is not readable ({error.strerror})"
        try:
            with os.fdopen(fd, "rb", buffering=0) as file:
                size = os.fstat(fd).st_size
                # A file of another size is not read: it may be very large.
                found = _checksum(file, advance) if size == files[name].size else FileSum(size, 0)
        except OSError as error:
            return f"{name} is not readable ({error.strerror})"
        return _difference(name, found, files[name])

    names = sorted(files)
    found = zip(names, map_threads(problem, names, _READERS), strict=True)
    return {name: reason for name, reason in found if reason is not None}


def _checksum(file: Any, advance: Callable[[int], object]) -> FileSum:
    size = crc = 0
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        size, crc = size + count, zlib.crc32(buffer[:count], crc)
        advance(count)
    return FileSum(size, crc)


def _difference(name: str, found: FileSum, known: FileSum) -> str | None:
    if found.size != known.size:
        return f"{name} has {found.size} bytes instead of {known.size}"
    if found.crc32 != known.crc32:
        return f"{name} has checksum {found.crc32:08x} instead of {known.crc32:08x}"
    return None
