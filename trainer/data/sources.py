"""The sources of a data configuration: opened, checked against the model's vocabulary, and split. No torch.

`dataset` opens a run's sources with these functions, and `preflight` asks them before any rank starts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...configs.errors import Problem, UserError
from ...configs.fields import add_class
from ...configs.schema import DataConfig, StdlibData, TextData
from ...configs.schema_data import TokenizedData
from ...configs.tokenized import META_SUFFIX
from .cache import cache_folder, tokenize_cached
from .documents import READERS, Reader
from .files import stdlib_files, survey
from .indexed import SCAN_BYTES, IndexedReader
from .packing import TokenStream
from .tokenizer import Tokenizer, check_vocab, file_identity


@dataclass(frozen=True)
class TextFiles:
    """What a text source reads: its files, their kind (of `documents.READERS`), the text's key or column, and lines
    about what was left out."""

    files: tuple[Path, ...]
    kind: str
    field: str
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """One stream of tokens, its name for messages, and its weight in a blend (1 where there is only one)."""

    name: str
    stream: TokenStream
    weight: float = 1.0


_Data = TypeVar("_Data", bound=TextData)


def register(read: Reader) -> Callable[[type[_Data]], type[_Data]]:
    """Adds a source from outside: files of another kind, found by `data.paths`. A decorator of its section's class.

        @register(read_chats)
        @dataclass(frozen=True, kw_only=True)
        class ChatData(TextData):
            name: Literal["chats"] = "chats"

    Args:
        read: the documents of a file. Of the section it is told `field`, and nothing where the class has none.

    Returns:
        The decorator.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: type[_Data]) -> type[_Data]:
        if READERS.setdefault(cls.name, read) is not read:
            raise ValueError(f"there is a kind of file {cls.name} already")
        add_class("data", cls.name, cls)
        return cls

    return add


def is_text(cfg: DataConfig) -> bool:
    """Whether the source is text, that a tokenizer has to turn into tokens first."""
    return not isinstance(cfg, TokenizedData)


def text_files(cfg: DataConfig) -> TextFiles:
    """The files of a text source. Raises UserError naming every path that matches nothing."""
    if isinstance(cfg, StdlibData):
        return TextFiles(tuple(stdlib_files()), "source", "")
    if not isinstance(cfg, TextData):
        raise UserError(Problem("data.name", f"unknown source {cfg.name!r}"))
    found = survey(cfg.paths, cfg.name)
    return TextFiles(tuple(found.files), cfg.name, getattr(cfg, "field", ""), tuple(found.notices()))


def open_text_source(cfg: DataConfig, tokenizer: Tokenizer, vocab: int, *, progress: bool = True) -> Source:
    """A text source, tokenized now if it never was. Raises UserError."""
    check_vocab(tokenizer.vocab - 1, vocab, "the tokenizer")
    text = text_files(cfg)
    for line in text.notices if progress else ():
        print(f"data.paths: {line}", file=sys.stderr, flush=True)
    folder = cache_folder(cfg.cache)
    reader = tokenize_cached(folder, tokenizer, text.files, text.kind, text.field, progress=progress)
    # That some files of the standard library are empty is nobody's loss.
    if progress and text.kind != "source" and reader.meta is not None and reader.meta.left_out:
        print(f"data: documents left out, empty or null: {reader.meta.left_out:,}", file=sys.stderr, flush=True)
    return Source(cfg.name, TokenStream([reader]))


def open_indexed(cfg: DataConfig, vocab: int) -> list[Source]:
    """The sources of tokenized data: one for bin, one a prefix for blend. Raises UserError naming every bad file."""
    if not isinstance(cfg, TokenizedData):
        raise UserError(Problem("data.name", f"unknown source {cfg.name!r}"))
    groups, key = cfg.groups, cfg.given
    if not groups:
        raise UserError(Problem(key, "no prefixes; give at least one PREFIX of PREFIX.bin and PREFIX.idx"))
    problems: list[Problem] = []
    sources: list[Source] = []
    opened = [_open_prefixes(prefixes, key, problems) for prefixes, _ in groups]
    _verify([reader for readers in opened for reader in readers], key, problems)
    for (prefixes, weight), readers in zip(groups, opened, strict=True):
        try:
            stream = TokenStream(readers, cfg.eod)
            _check_stored_ids(stream, vocab)
            sources.append(Source(" ".join(prefixes), stream, weight))
        except UserError as error:
            problems += error.problems
    problems += _different_tokenizers(cfg, key, sources)
    if problems:
        raise UserError(*problems)
    return sources


def _different_tokenizers(cfg: DataConfig, key: str, sources: Sequence[Source]) -> list[Problem]:
    """Equal ids mean different texts where files come from several tokenizers, or from another than the job's."""
    made = [(part.prefix, part.meta.coding) for source in sources for part in source.stream.parts if part.meta]
    if cfg.tokenizer.path is not None:
        theirs = file_identity(cfg.tokenizer.path)
        given, where = [(cfg.tokenizer.path, theirs), *((p, c.identity) for p, c in made)], "data.tokenizer.path"
    else:
        given, where = [(prefix, how.identity) for prefix, how in made], key
    # Behind the last dash is the end-of-document token, which may differ.
    vocabularies: dict[str, str] = {}
    for name, identity in given:
        vocabularies.setdefault(identity.rpartition("-")[0], name)
    if len(vocabularies) < 2:
        return []
    names = " and ".join(list(vocabularies.values())[:2])
    message = (
        f"{names} have different tokenizers; tokenize them with one (if they are alike, delete PREFIX{META_SUFFIX})"
    )
    return [Problem(where, message)]


def _open_prefixes(prefixes: Sequence[str], key: str, problems: list[Problem]) -> list[IndexedReader]:
    readers: list[IndexedReader] = []
    for prefix in prefixes:
        with _collecting(prefix, key, problems):
            readers.append(IndexedReader(prefix))
    return readers


def _verify(readers: Sequence[IndexedReader], key: str, problems: list[Problem]) -> None:
    """Compare files with their checksums: all of them together whole up to `SCAN_BYTES`, else an even sample."""
    share = SCAN_BYTES / max(SCAN_BYTES, sum(reader.bytes for reader in readers))
    for reader in readers:
        with _collecting(reader.prefix, key, problems):
            reader.verify(share)


@contextmanager
def _collecting(prefix: str, key: str, problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        problems += [Problem(key, problem.message) for problem in error.problems]
    except OSError as error:
        problems.append(Problem(key, f"cannot read {prefix}: {error.strerror or error}"))


def _check_stored_ids(stream: TokenStream, vocab: int) -> None:
    low, high, where = stream.id_range()
    if low < 0:
        raise UserError(Problem("data", f"{stream.parts[0].prefix}.bin has negative token id {low}"))
    check_vocab(high, vocab, where)


def split_windows(name: str, tokens: int, seq_len: int, holdout: float) -> tuple[int, int] | Problem:
    """(windows, those held out) of a source with that many tokens, or what is wrong with its size."""
    if tokens <= seq_len:
        message = f"{name} has {tokens} tokens, but one sequence needs {seq_len + 1}; set train.seq_len lower"
        return Problem("data", message)
    windows = (tokens - 1) // seq_len
    held = max(1, round(windows * holdout)) if holdout > 0 else 0
    if held >= windows:
        message = f"{name} has {windows} sequences of {seq_len} tokens, and {holdout} of them held out leaves none"
        return Problem("data.holdout", f"{message} to train on; set data.holdout=0 or train.seq_len lower")
    return windows, held


def enough_tokens(seq_len: int, holdout: float) -> int:
    """Tokens from which on a source of any size can be split (`split_windows` finds no problem)."""
    # From 2 / (1 - holdout) windows on, rounding can no longer hold all of them out.
    windows = 2 if holdout <= 0 else max(2, int(2 / (1 - holdout)) + 1)
    return windows * seq_len + 1
