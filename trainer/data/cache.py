"""Tokenized text kept in a cache folder: made once, however many processes ask for it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...configs.errors import Problem, UserError
from ..metrics.notices import SAY_EVERY_S, ProgressLine
from .documents import Tally, read_documents
from .encode import write_documents
from .files import no_text
from .indexed import SCAN_BYTES, IndexedReader, IndexedWriter
from .tokenizer import Tokenizer, coding, token_dtype

_FORMAT = 2


def cache_folder(configured: str | None) -> Path:
    """`data.cache`, or .cache/pentad/data in the user's home folder."""
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "pentad" / "data"


def tokenize_cached(
    folder: Path, tokenizer: Tokenizer, files: Sequence[Path], kind: str, field: str, *, progress: bool = True
) -> IndexedReader:
    """The tokens of `files`, from `folder` when they were tokenized before, else tokenized now.

    The name of the cached pair is a hash of every file's path, size and modification time, and the tokenizer. One
    process tokenizes while the others wait for its lock; a damaged pair is made again. Raises UserError.
    """
    name = _cache_name(tokenizer, files, kind, field)
    prefix = str(folder / name)
    ready = _open_ready(prefix)
    if ready is not None:
        return ready
    total = sum(file.stat().st_size for file in files)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock", progress):
            ready = _open_ready(prefix)
            if ready is not None:
                return ready
            said = ProgressLine(f"tokenizing {len(files)} files", total, enabled=progress)
            tally = Tally()
            with IndexedWriter(prefix, token_dtype(tokenizer.vocab), coding=coding(tokenizer)) as writer:
                write_documents(writer, tokenizer, read_documents(files, kind, field, tally), said)
                writer.left_out = tally.without_text
                if not writer.tokens:
                    raise no_text(files)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(Problem("data.cache", f"cannot write tokens to {folder}: {reason}; set data.cache")) from None
    return IndexedReader(prefix)


def find_cached(
    folder: Path, tokenizer: Tokenizer, files: Sequence[Path], kind: str, field: str
) -> IndexedReader | None:
    """What `tokenize_cached` would read, where it is there already and whole."""
    return _open_ready(str(folder / _cache_name(tokenizer, files, kind, field)))


def _cache_name(tokenizer: Tokenizer, files: Sequence[Path], kind: str, field: str) -> str:
    stats = [(str(file.resolve()), stat.st_size, stat.st_mtime_ns) for file in files for stat in [file.stat()]]
    return hashlib.sha256(json.dumps([_FORMAT, kind, field, tokenizer.identity, stats]).encode()).hexdigest()[:32]


def _open_ready(prefix: str) -> IndexedReader | None:
    try:
        reader = IndexedReader(prefix)
        reader.verify(min(1.0, SCAN_BYTES / max(reader.bytes, 1)))
    except (UserError, OSError):
        return None
    return reader if reader.meta is not None else None


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    """Hold an exclusive lock on `path`. The kernel releases it when its holder dies, so none is ever stale.

    On a file system without locks the block runs unlocked: each process then writes under temporary names of its own,
    and only the work is doubled.
    """
    with path.open("ab") as file:
        said = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                break
            if progress and time.monotonic() - said > 10 * SAY_EVERY_S:
                said = time.monotonic()
                print(
                    f"waiting for another process to tokenize ({path}, pid {os.getpid()})", file=sys.stderr, flush=True
                )
        yield
