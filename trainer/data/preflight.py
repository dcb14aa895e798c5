"""What is wrong with a job's data, found before any rank starts: by the rules of the run, without torch."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from ...configs.errors import Problem, UserError
from ...configs.schema import Config
from .cache import cache_folder, find_cached
from .documents import Document, read_documents
from .files import no_text
from .sources import TextFiles, enough_tokens, is_text, open_indexed, split_windows, text_files
from .tokenizer import Tokenizer, check_vocab, make_tokenizer

_BATCH = 64
_SAMPLE_BYTES = 64 << 20
"""Text that was read without ending is taken to hold enough tokens from here on; the run counts them all."""


def data_problems(cfg: Config) -> list[Problem]:
    """What `open_data` would refuse, for a resolved configuration.

    Tokenized data is opened as the run opens it. Of text that was not tokenized before, only as much is read as it
    takes to be certain that there is enough; damage further on is found when it is tokenized.
    """
    data, vocab = cfg.data, cfg.model.used_vocab
    try:
        if is_text(data):
            sizes = {data.name: _text_tokens(cfg)}
        else:
            sizes = {source.name: source.stream.tokens for source in open_indexed(data, vocab)}
    except UserError as error:
        return error.problems
    except OSError as error:
        return [Problem("data", f"cannot read {error.filename}: {error.strerror or error}")]
    splits = [split_windows(name, tokens, cfg.train.seq_len, data.holdout) for name, tokens in sizes.items()]
    return [split for split in splits if isinstance(split, Problem)]


def _text_tokens(cfg: Config) -> int:
    """Tokens of a text source, or fewer that are enough. Raises UserError."""
    tokenizer = make_tokenizer(cfg.data.tokenizer)
    check_vocab(tokenizer.vocab - 1, cfg.model.used_vocab, "the tokenizer")
    text, folder = text_files(cfg.data), cache_folder(cfg.data.cache)
    ready = find_cached(folder, tokenizer, text.files, text.kind, text.field)
    if ready is not None:
        return ready.size
    _check_writable(folder)
    tokens = count_tokens(text, tokenizer, enough_tokens(cfg.train.seq_len, cfg.data.holdout))
    if not tokens:
        raise no_text(text.files)
    return tokens


def count_tokens(text: TextFiles, tokenizer: Tokenizer, enough: int) -> int:
    """Tokens of `text` where these are fewer than `enough`, else a number from `enough` on.

    Raises UserError for a file among those read that cannot be.
    """
    if text.kind in ("text", "source") and any(file.stat().st_size > _SAMPLE_BYTES for file in text.files):
        return enough  # such a file is one document, too much to read twice
    tokens, read = 0, 0.0
    documents = read_documents(text.files, text.kind, text.field)
    for batch in _batches(documents):
        tokens += sum(len(ids) + 1 for ids in tokenizer.encode_batch([document.text for document in batch]))
        read += sum(document.size for document in batch)
        if tokens >= enough:
            return tokens
        if read >= _SAMPLE_BYTES:
            return enough
    return tokens


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    while batch := list(itertools.islice(documents, _BATCH)):
        yield batch


def _check_writable(folder: Path) -> None:
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(Problem("data.cache", f"cannot write tokens to {folder}; set data.cache to another folder"))
