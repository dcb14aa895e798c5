"""Whether a checkpoint is whole: every byte read and compared, every element of every tensor accounted for. No torch
here, unless the checkpoint is of format 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...configs.strict_json import JsonError
from .index import Contents, read_contents
from .manifest import FORMAT, MANIFEST, Damaged, damaged_files, read_manifest
from .stored import StoredBox, StoredTensor, held_once
from .tiers.local import LocalMark


@dataclass(frozen=True)
class Verification:
    """What was found of a checkpoint that was read whole.

    Args:
        problems: what is wrong, a line each; empty: every byte is as it was written.
        strays: files in the folder of which the manifest says nothing; nobody reads them.
        nbytes: of the files that the manifest lists, and of itself.
        tensors, boxes: how many the index names; 0 where it cannot be read.
        hosts: of whose ranks it holds a part, where each has a folder of its own.
    """

    problems: tuple[str, ...]
    strays: tuple[str, ...] = ()
    nbytes: int = 0
    tensors: int = 0
    boxes: int = 0
    hosts: tuple[str, ...] = ()


def verify(folder: Path) -> list[str]:
    """Everything that is wrong with a checkpoint; empty: every byte is as it was written. For one process."""
    return list(verification(folder).problems)


def verification(folder: Path, advance: Callable[[int], object] = bool) -> Verification:
    """Reads a checkpoint whole. For one process.

    Args:
        folder: of the checkpoint.
        advance: told the bytes read since it was told last, from several threads.
    """
    if not folder.is_dir():
        return Verification((f"{folder} is not a folder",))
    try:
        manifest = read_manifest(folder)
    except Damaged as error:
        return Verification((str(error),))
    wrong = damaged_files(folder, manifest.files, advance)
    nbytes = sum(known.size for known in manifest.files.values()) + (folder / MANIFEST).stat().st_size
    strays = tuple(sorted(path.name for path in folder.iterdir() if path.name not in {MANIFEST, *manifest.files}))
    contents, problems = None, dict(wrong)
    try:
        contents = read_contents(folder)
    except Damaged as error:
        if not wrong:  # else that file is named already
            problems[""] = str(error)
    if contents is None:
        return Verification(tuple(problems.values()), strays, nbytes)
    for name in wrong:
        problems[name] += _lost(contents, name)
    found = (*problems.values(), *unaccounted(contents))
    boxes = sum(len(stored.boxes) for stored in contents.tensors.values())
    return Verification(found, strays, nbytes, len(contents.tensors), boxes, hosts_of(contents.state))


def hosts_of(state: dict[str, Any]) -> tuple[str, ...]:
    """The hosts that have the parts of a checkpoint, of which this is the state of one; empty: it is whole."""
    with suppress(JsonError):
        mark = LocalMark.of(state)
        return mark.hosts if mark is not None and len(mark.hosts) > 1 else ()
    return ()


def unaccounted(contents: Contents) -> list[str]:
    """The tensors of which an index does not name each element once, and the files of which it names bytes twice; in a
    part, those of which it names an element twice."""
    problems: list[str] = []
    part = bool(hosts_of(contents.state))
    for name, stored in contents.tensors.items():
        whole = ((0,) * len(stored.shape), stored.shape)
        try:
            for offsets, sizes in [(box.offsets, box.sizes) for box in stored.boxes] if part else [whole]:
                held_once(name, stored, offsets, sizes)
        except Damaged as error:
            problems.append(str(error))
    return problems if contents.format != FORMAT else problems + _shared_bytes(contents.tensors)


def _shared_bytes(tensors: Mapping[str, StoredTensor]) -> list[str]:
    """A line for each file with bytes that are two boxes' at once."""
    by_file: dict[str, list[tuple[StoredBox, str]]] = {}
    for name, stored in tensors.items():
        for box in stored.boxes:
            by_file.setdefault(box.file, []).append((box, name))
    problems: list[str] = []
    for file, held in sorted(by_file.items()):
        held.sort(key=lambda pair: pair[0].start)
        for (before, one), (after, other) in pairwise(held):
            if before.start + before.nbytes > after.start:
                problems.append(f"byte {after.start} of {file} is said to be both of {one} and of {other}")
                break
    return problems


def _lost(contents: Contents, file: str) -> str:
    """What of the model lies in a file."""
    names = [name for name, stored in contents.tensors.items() if any(box.file == file for box in stored.boxes)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f" (it holds parts of {names[0]}{more})" if names else ""
