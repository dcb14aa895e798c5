"""Which files a source means: files, folders and glob patterns, in a fixed order, nothing left out without a word."""

from __future__ import annotations

import fnmatch
import glob
import os
import stat
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...configs.errors import Problem, UserError
from .opening import first_object, is_parquet

KINDS = ("text", "jsonl", "parquet")
SUFFIXES = {"text": (".txt", ".text"), "jsonl": (".jsonl", ".json", ".ndjson"), "parquet": (".parquet", ".pq")}
COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
# Files about a corpus, not of it.
_ABOUT = frozenset({"readme", "license", "licence", "copying", "notice", "changelog", "contributing", "authors"})
# Distributions differ in whether they ship the library's tests, so leaving them out keeps machines alike.
_STDLIB_SKIP = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_NAMED = 4
_LOOKED_INTO = 16


@dataclass
class Found:
    """Files to read, in order and each real file once, and what was seen beside them in folders: `left_out` is of
    another kind or hidden, `empty` has no bytes. `other` are taken as text although they hold JSON lines.
    `problems` are those of the paths."""

    files: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    other: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def notices(self) -> list[str]:
        """What was left out or may not be meant, a line for each reason."""
        lines = [
            ("left out, hidden or of another kind", self.left_out),
            ("empty", self.empty),
            ("read as text although holding JSON lines (see the kind jsonl)", self.other),
        ]
        return [f"{len(paths)} {'file' if len(paths) == 1 else 'files'} {what}: {_names(paths)}"
                for what, paths in lines if paths]  # fmt: skip


def stdlib_files() -> list[Path]:
    """The .py files of the running Python's standard library without its tests, sorted by relative path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for folder, folders, names in os.walk(root, onerror=_cannot_read):
        folders[:] = [name for name in folders if name not in _STDLIB_SKIP]
        found += [Path(folder, name) for name in names if name.endswith(".py")]
    if not found:
        raise UserError(Problem("data.name", f"no .py files in {root}; use data.name=text with data.paths"))
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _cannot_read(error: OSError) -> None:
    raise UserError(Problem("data.name", f"cannot read folder {error.filename}: {error.strerror}"))


def survey(paths: Sequence[str], kind: str | None = None) -> Found:
    """Files that `paths` (files, folders, glob patterns) name, in the order given, each real file once.

    A folder, named or matched by a pattern, stands for its files at any depth, sorted, whose suffix or, without one,
    content fits `kind` (every file for text and for kinds from outside; for None the three kinds, without files like
    README), hidden ones left out. Links are followed. Raises UserError naming every path that matches nothing, and
    everything that cannot be read: broken links, unreadable files and folders, pipes and devices.
    """
    walk = _Walk(kind)
    for given in paths:
        path = Path(given).expanduser()
        seen, broken = walk.count, len(walk.found.problems)
        if not given.strip():
            walk.problem("an empty path; give a file, a folder or a glob pattern")
            continue
        if os.path.lexists(path):
            walk.take(path)
            nothing = f"no {kind or 'text, jsonl or parquet'} files in folder {given}"
        elif glob.has_magic(given):
            for match in walk.matches(Path(path.anchor), list(path.parts[bool(path.anchor) :]), ()):
                walk.take(match)
            nothing = f"no file matches {given}"
        else:
            nothing = f"no such file or folder: {given}"
        if walk.count == seen and len(walk.found.problems) == broken:
            walk.problem(nothing)
    if not paths:
        walk.problem("no paths; give files, folders or glob patterns")
    if walk.found.problems:
        raise UserError(*walk.found.problems)
    if kind == "text":
        walk.found.other = _json_lines(walk.found.files)
    return walk.found


def _json_lines(files: Sequence[Path]) -> list[Path]:
    """Files with JSON lines, by suffix; where none has one, by the content of the first few."""
    named = [file for file in files if kind_of_suffix(file) == "jsonl"]
    unnamed = (file for file in files[:_LOOKED_INTO] if kind_of_suffix(file) is None)
    return named or [file for file in unnamed if kind_of_content(file) == "jsonl"]


class _Walk:
    """Collects files. `count` is how many were met, those that were met before included."""

    def __init__(self, kind: str | None) -> None:
        self.found, self.count = Found(), 0
        self._kind = kind
        self._real: set[str] = set()

    def problem(self, message: str) -> None:
        self.found.problems.append(Problem("data.paths", message))

    def take(self, path: Path, folders: tuple[tuple[int, int], ...] = (), *, chosen: bool = True) -> None:
        """A file or everything in a folder; `folders` are those around it, `chosen` files were named themselves."""
        status = self._status(path)
        if status is None:
            return
        identity = (status.st_dev, status.st_ino)
        if stat.S_ISDIR(status.st_mode):
            # A link to a folder around it leads to nothing new.
            for entry in self._entries(path) if identity not in folders else ():
                if entry.startswith("."):
                    self.found.left_out.append(path / entry)
                else:
                    self.take(path / entry, (*folders, identity), chosen=False)
        elif not stat.S_ISREG(status.st_mode):
            if chosen or self._fits_by_name(path):
                self.problem(f"{path} is not a regular file (a pipe or a device); write its content to a file first")
        elif not os.access(path, os.R_OK):
            if chosen or self._fits_by_name(path) is not False:
                self.problem(f"cannot read {path}: permission denied")
        elif chosen or self._fits(path):
            self._add(path, status.st_size)
        else:
            self.found.left_out.append(path)

    def matches(self, root: Path, parts: list[str], folders: tuple[tuple[int, int], ...]) -> Iterator[Path]:
        """Paths below `root` that match the pattern `parts`. Unlike `glob`, it says what it cannot look into."""
        if not parts:
            yield root
            return
        head, rest = parts[0], parts[1:]
        if head == "**":
            yield from self.matches(root, rest, folders)
            for entry in self._entries(root):
                status = None if entry.startswith(".") else self._status(root / entry)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    identity = (status.st_dev, status.st_ino)
                    if identity not in folders:
                        yield from self.matches(root / entry, parts, (*folders, identity))
            return
        # What exists is meant literally, also with brackets in its name.
        names = [head] if not glob.has_magic(head) or os.path.lexists(root / head) else [
            name for name in self._entries(root)
            if fnmatch.fnmatchcase(name, head) and (not name.startswith(".") or head.startswith("."))
        ]  # fmt: skip
        for name in names:
            if (root / name).is_dir() if rest else os.path.lexists(root / name):
                yield from self.matches(root / name, rest, folders)

    def _status(self, path: Path) -> os.stat_result | None:
        try:
            return path.stat()
        except OSError as error:
            if path.is_symlink():
                self.problem(f"broken link: {path} -> {os.readlink(path)}; mend or remove it")
            else:
                self.problem(f"cannot read {path}: {error.strerror or error}")
        return None

    def _entries(self, folder: Path) -> list[str]:
        try:
            return sorted(os.listdir(folder))
        except OSError as error:
            self.problem(f"cannot read folder {folder}: {error.strerror or error}")
            return []

    def _add(self, path: Path, size: int) -> None:
        self.count += 1
        real = os.path.realpath(path)
        if real in self._real:
            return
        self._real.add(real)
        self.found.files.append(path)
        if size == 0:
            self.found.empty.append(path)

    def _fits(self, path: Path) -> bool:
        by_name = self._fits_by_name(path)
        if by_name is not None:
            return by_name
        found = kind_of_content(path)
        return found is not None and self._kind in (None, found)

    def _fits_by_name(self, path: Path) -> bool | None:
        """Whether a file of a folder is taken; None: its name does not say."""
        if self._kind == "text" or self._kind not in (None, *SUFFIXES):
            return True
        kind = kind_of_suffix(path)
        if kind is not None:
            return kind == self._kind or (self._kind is None and path.name.split(".")[0].lower() not in _ABOUT)
        # Names such as part-00000 and shard.0001 say nothing; _SUCCESS and its like are about other files.
        unclear = not _plain(path).suffix or any(c.isdigit() for c in _plain(path).suffix)
        return None if unclear and not path.name.startswith("_") else False


def _plain(path: Path) -> Path:
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


def kind_of_suffix(path: Path) -> str | None:
    """text, jsonl or parquet by suffix, that of a compression left off; None for any other suffix."""
    suffix = _plain(path).suffix.lower()
    return next((kind for kind, suffixes in SUFFIXES.items() if suffix in suffixes), None)


def kind_of_content(path: Path) -> str | None:
    """parquet by its first bytes, jsonl when the first line is a JSON object; None for anything else."""
    if is_parquet(path):
        return "parquet"
    return "jsonl" if first_object(path) else None


def file_kind(path: Path) -> str:
    """text, jsonl or parquet: by suffix, else by content."""
    return kind_of_suffix(path) or kind_of_content(path) or "text"


def kind_notice(files: Sequence[Path]) -> str | None:
    """A line that says which files are of which kind, where they are of several."""
    kinds: dict[str, list[Path]] = {}
    for file in files:
        kinds.setdefault(file_kind(file), []).append(file)
    if len(kinds) < 2:
        return None
    return "mixed kinds: " + "; ".join(f"{len(paths)} {kind} ({_names(paths)})" for kind, paths in kinds.items())


def no_text(files: Sequence[Path]) -> UserError:
    """The error of files that hold no document."""
    size = sum(file.stat().st_size for file in files)
    return UserError(Problem("data.paths", f"no text in {len(files)} files ({size} bytes)"))


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:_NAMED]) + (", …" if len(paths) > _NAMED else "")
