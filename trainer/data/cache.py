"""Tokenizing documents into .bin/.idx, once, however many processes ask for them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...configs.errors import Problem, UserError
from ...configs.schema import TokenizerConfig
from .documents import Document, find_files, read_documents
from .indexed import IndexedReader, IndexedWriter, strip_suffix
from .tokenizer import Tokenizer, make_tokenizer, token_dtype

_FORMAT = 1
_BATCH_CHARS = 1 << 20
_SAY_EVERY_S = 3.0


@dataclass(frozen=True)
class Tokenized:
    """What was written: the prefix, documents, tokens (end-of-document tokens included), bytes read and seconds."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    seconds: float


def tokenize(
    inputs: Sequence[str],
    tokenizer: str,
    out_prefix: str,
    *,
    field: str = "text",
    eod: str | None = None,
    kind: str | None = None,
    append_eod: bool = True,
    progress: bool = True,
) -> Tokenized:
    """Write the text of ``inputs`` (files, folders, globs) to OUT_PREFIX.bin and OUT_PREFIX.idx, atomically.

    ``tokenizer`` is "byte" or the path of a tokenizer.json; ``eod`` names its end-of-document token, ``field`` the
    key or column of JSONL and parquet files, ``kind`` (text, jsonl, parquet) overrules the files' suffixes.
    Raises UserError for anything that the user can mend.
    """
    coder = make_tokenizer(TokenizerConfig(path=None if tokenizer == "byte" else tokenizer, eod=eod))
    files = find_files(inputs, kind, key="INPUT")
    started = time.monotonic()
    total = sum(file.stat().st_size for file in files)
    said = Progress(f"tokenizing to {out_prefix}", total, enabled=progress)
    try:
        with IndexedWriter(out_prefix, token_dtype(coder.vocab)) as writer:
            write_documents(writer, coder, read_documents(files, kind, field), said, append_eod=append_eod)
            if not writer.tokens:
                raise no_text(files, "INPUT")
    except OSError as error:
        raise UserError(Problem("--out", f"cannot write {out_prefix}: {error.strerror or error}")) from None
    seconds = time.monotonic() - started
    return Tokenized(strip_suffix(out_prefix), writer.documents, writer.tokens, total, seconds)


def write_documents(
    writer: IndexedWriter,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    progress: Progress,
    *,
    append_eod: bool = True,
) -> None:
    """Tokenize ``documents`` in batches of about a million characters and add each, with its end token, to writer."""
    end = np.array([tokenizer.eod] if append_eod else [], writer.dtype)
    for batch in _batches(documents):
        for tokens in tokenizer.encode_batch([document.text for document in batch]):
            writer.add(np.concatenate((tokens.astype(writer.dtype, copy=False), end)))
        progress.advance(sum(document.size for document in batch))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


class Progress:
    """A line on stderr every few seconds while something long goes on; nothing at all when it is quick."""

    def __init__(self, label: str, total: float, enabled: bool = True) -> None:
        self._label, self._total, self._enabled = label, total, enabled
        self._done = 0.0
        self._started = self._said = time.monotonic()

    def advance(self, size: float) -> None:
        """Count ``size`` more bytes of input."""
        self._done += size
        now = time.monotonic()
        if not self._enabled or now - self._said < _SAY_EVERY_S:
            return
        self._said = now
        rate = self._done / (now - self._started)
        share = min(self._done / self._total, 1.0) if self._total else 1.0
        left = max(self._total - self._done, 0.0) / rate
        line = f"{self._label}: {share:.0%} of {self._total / 1e6:.0f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left"
        print(line, file=sys.stderr, flush=True)


def cache_folder(configured: str | None) -> Path:
    """``data.cache``, or .cache/pentad/data in the user's home folder."""
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "pentad" / "data"


def tokenize_cached(
    folder: Path, tokenizer: Tokenizer, files: Sequence[Path], kind: str, field: str, *, progress: bool = True
) -> IndexedReader:
    """The tokens of ``files``, from ``folder`` when they were tokenized before, else tokenized now.

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
        with _locked(folder / f"{name}.lock", progress) as alone:
            ready = _open_ready(prefix)
            if ready is not None:
                return ready
            # With the lock held, unfinished files of this name can only be those of a process that was killed.
            for abandoned in folder.glob(f"{name}.*.tmp.*") if alone else ():
                abandoned.unlink(missing_ok=True)
            said = Progress(f"tokenizing {len(files)} files", total, enabled=progress)
            with IndexedWriter(prefix, token_dtype(tokenizer.vocab)) as writer:
                write_documents(writer, tokenizer, read_documents(files, kind, field), said)
                if not writer.tokens:
                    raise no_text(files, "data.paths")
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(Problem("data.cache", f"cannot write tokens to {folder}: {reason}; set data.cache")) from None
    return IndexedReader(prefix)


def no_text(files: Sequence[Path], key: str) -> UserError:
    """The error of files that hold no document."""
    return UserError(Problem(key, f"no text in {len(files)} files ({sum(f.stat().st_size for f in files)} bytes)"))


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
        return IndexedReader(prefix)
    except UserError:
        return None


@contextmanager
def _locked(path: Path, progress: bool) -> Iterator[bool]:
    """Hold an exclusive lock on ``path``. The kernel releases it when its holder dies, so none is ever stale.

    On a file system without locks the block runs unlocked and gets False: each process then writes under temporary
    names of its own, and only the work is doubled.
    """
    with path.open("ab") as file:
        said = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:
                alone = False
                break
            if progress and time.monotonic() - said > 10 * _SAY_EVERY_S:
                said = time.monotonic()
                print(
                    f"waiting for another process to tokenize ({path}, pid {os.getpid()})", file=sys.stderr, flush=True
                )
        yield alone
