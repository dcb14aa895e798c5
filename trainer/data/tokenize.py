"""`pentad tokenize`: text, JSON lines or parquet to PREFIX.bin and PREFIX.idx, and their checksums looked at."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...configs.errors import Problem, UserError
from ...configs.schema import TokenizerConfig
from ...configs.tokenized import META_SUFFIX, Coding, token_prefix
from ..metrics.notices import ProgressLine
from .documents import Tally, read_documents
from .encode import write_documents
from .files import kind_notice, no_text, survey
from .indexed import IndexedReader, IndexedWriter
from .tokenizer import coding, make_tokenizer, token_dtype

_OPTIONS = {
    "data.paths": "INPUT",
    "data.field": "--field",
    "data.tokenizer.path": "--tokenizer",
    "data.tokenizer.eod": "--eod",
}
"""What errors name: the config's keys are options here."""


@dataclass(frozen=True)
class Tokenized:
    """What was written: the prefix, documents, tokens (end-of-document tokens included), bytes read and seconds;
    documents without text that were left out, the largest token id, and how the tokens were made."""

    prefix: str
    documents: int
    tokens: int
    bytes: int
    seconds: float
    left_out: int
    largest: int
    coding: Coding


def tokenize(
    inputs: Sequence[str],
    tokenizer: str,
    out_prefix: str,
    *,
    field: str = "text",
    eod: str | None = None,
    kind: str | None = None,
    append_eod: bool = True,
    workers: int = 1,
    progress: bool = True,
) -> Tokenized:
    """Write the text of `inputs` (files, folders, globs) to OUT_PREFIX.bin and OUT_PREFIX.idx, whole or not at all.

    `tokenizer` is "byte" or the path of a tokenizer.json or of its folder; `eod` names its end-of-document token,
    `field` the key or column of JSONL and parquet files, `kind` (text, jsonl, parquet) overrules the files'
    suffixes and content. What is written does not depend on `workers`, the number of processes. OUT_PREFIX.meta.json
    gets the vocabulary and checksums. Raises UserError for anything that the user can mend.
    """
    cfg = TokenizerConfig(path=None if tokenizer == "byte" else tokenizer, eod=eod)
    try:
        return _tokenize(inputs, cfg, out_prefix, field, kind, append_eod, workers, progress)
    except UserError as error:
        raise UserError(*(_as_option(problem) for problem in error.problems)) from None


def _as_option(problem: Problem) -> Problem:
    message = problem.message
    for key, option in _OPTIONS.items():
        message = message.replace(key, option)
    return Problem(_OPTIONS.get(problem.key, problem.key), message)


def _tokenize(
    inputs: Sequence[str],
    cfg: TokenizerConfig,
    out_prefix: str,
    field: str,
    kind: str | None,
    append_eod: bool,
    workers: int,
    progress: bool,
) -> Tokenized:
    if workers < 1:
        raise UserError(Problem("--workers", f"at least 1 process is needed, got {workers}"))
    if not os.path.basename(out_prefix):
        raise UserError(
            Problem("--out", f"{out_prefix or 'an empty name'} is a folder; add a name for the files in it")
        )
    coder = make_tokenizer(cfg)
    found = survey(inputs, kind)
    mixed = kind_notice(found.files) if kind is None else None
    for line in [*found.notices(), *([f"{mixed}; --kind takes all as one"] if mixed else [])] if progress else []:
        print(line, file=sys.stderr, flush=True)
    started = time.monotonic()
    total = sum(file.stat().st_size for file in found.files)
    said = ProgressLine(f"tokenizing to {out_prefix}", total, enabled=progress)
    tally, how = Tally(), coding(coder, append_eod)
    try:
        with IndexedWriter(out_prefix, token_dtype(coder.vocab), coding=how) as writer:
            documents = read_documents(found.files, kind, field, tally)
            write_documents(writer, coder, documents, said, append_eod=append_eod, workers=workers)
            writer.left_out = tally.without_text
            if not writer.tokens:
                raise no_text(found.files)
    except OSError as error:
        raise UserError(Problem("--out", f"cannot write {out_prefix}: {error.strerror or error}")) from None
    return Tokenized(
        prefix=token_prefix(out_prefix),
        documents=writer.documents,
        tokens=writer.tokens,
        bytes=total,
        seconds=time.monotonic() - started,
        left_out=writer.left_out,
        largest=writer.largest,
        coding=how,
    )


def tokenized_lines(done: Tokenized) -> list[str]:
    """What was written, in lines for the console."""
    how = done.coding
    end = f"end of document {how.eod}" if how.eod is not None else "no end-of-document token"
    lines = [
        f"{done.prefix}.bin and .idx: {done.documents:,} documents, {done.tokens:,} tokens, {done.seconds:.1f} s",
        f"vocabulary: {how.vocab:,} tokens of {how.path or 'bytes'}, {end}; in {Path(done.prefix).name}{META_SUFFIX}",
    ]
    if done.left_out:
        lines.append(f"documents left out, empty or null: {done.left_out:,}")
    return lines


def verify_tokens(prefixes: Sequence[str], say: Callable[[str], None]) -> None:
    """Compare whole files with their checksums, and say of each that it is as it was written.

    Raises UserError naming every file that is not, after the others were looked at.
    """
    problems: list[Problem] = []
    for prefix in prefixes:
        try:
            reader = IndexedReader(prefix)
            reader.verify()
        except UserError as error:
            problems += error.problems
            continue
        except OSError as error:
            problems.append(Problem("", f"cannot read {prefix}: {error.strerror or error}"))
            continue
        checked = "as written" if reader.meta else f"sizes and index agree; no {META_SUFFIX[1:]}, so no checksums"
        say(f"{reader.prefix}: {reader.documents:,} documents, {reader.size:,} tokens, {checked}")
    if problems:
        raise UserError(*problems)
