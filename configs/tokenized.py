"""PREFIX.meta.json beside PREFIX.bin and PREFIX.idx: how the tokens were made, and the checksums of both files."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .paths import TOKENIZER_FILE
from .schema_data import TokenizedData
from .strict_json import JsonError, expect_int, expect_list, expect_object, expect_text, read_json

META_SUFFIX = ".meta.json"
META_FORMAT = 1
BLOCK_BYTES = 16 << 20
"""Each block of this many bytes of PREFIX.bin has a checksum of its own, so that a sample of them can be checked."""
_MAX_VOCAB = 2**31
_CRC = 2**32 - 1


def token_prefix(prefix: str) -> str:
    """PREFIX of PREFIX, PREFIX.bin or PREFIX.idx, with ~ expanded."""
    expanded = os.path.expanduser(prefix)
    given = expanded.endswith((".bin", ".idx")) and not os.path.isfile(f"{expanded}.bin")
    return expanded[:-4] if given else expanded


def tokenizer_file(path: str) -> Path:
    """The tokenizer.json that `data.tokenizer.path` means: the file, or the one in that folder; with ~ expanded."""
    file = Path(path).expanduser()
    return file / TOKENIZER_FILE if file.is_dir() else file


@dataclass(frozen=True)
class Coding:
    """How text became tokens: the tokenizer's identity, where its file was (None: the byte tokenizer), the number of
    its ids, and the end-of-document token behind every document (None: there is none)."""

    identity: str
    path: str | None
    vocab: int
    eod: int | None


@dataclass(frozen=True)
class TokenMeta:
    """What PREFIX.meta.json says.

    `largest` is the largest token id (-1 without tokens), `left_out` counts documents without text. Sizes are in
    bytes; `bin_crc32` has one CRC-32 for each block of `BLOCK_BYTES`, `idx_crc32` is that of the whole file.
    """

    coding: Coding
    documents: int
    tokens: int
    largest: int
    left_out: int
    bin_bytes: int
    bin_crc32: tuple[int, ...]
    idx_bytes: int
    idx_crc32: int

    def to_json(self) -> str:
        """One JSON object, a key a line."""
        value = {"format": META_FORMAT, **asdict(self)}
        return json.dumps({**value, "crc32": _crc32(value)}, indent=1) + "\n"


def read_meta(prefix: str) -> TokenMeta | None:
    """What PREFIX.meta.json says; None where there is no such file.

    Raises:
        UserError: it is damaged, or of another format.
    """
    path = Path(token_prefix(prefix) + META_SUFFIX)
    try:
        # Corpora are often folders of links; what they lead to is held to the same rules.
        return _meta(read_json(path.resolve(), max_bytes=256 << 20))
    except FileNotFoundError:
        return None
    except (JsonError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path} is damaged ({reason}); tokenize again, or delete it to go without checksums") from None


def read_metas(data: TokenizedData) -> list[TokenMeta] | None:
    """What the files of every source say; None where one of them says nothing. Raises UserError as `read_meta`."""
    prefixes = [prefix for group, _ in data.groups for prefix in group]
    metas = [read_meta(prefix) for prefix in prefixes]
    known = [meta for meta in metas if meta is not None]
    return known if len(known) == len(metas) else None


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _meta(value: Any) -> TokenMeta:
    top = expect_object(value, "the file", ("format", "coding", *TokenMeta.__annotations__))
    if expect_int(top["format"], "format") != META_FORMAT:
        raise JsonError(f"format is {top['format']}; only {META_FORMAT} is known")
    if top.get("crc32") != _crc32({key: item for key, item in top.items() if key != "crc32"}):
        raise JsonError("its content does not have its checksum")
    coding = expect_object(top["coding"], "coding", Coding.__annotations__)
    vocab = expect_int(coding["vocab"], "vocab", 1, _MAX_VOCAB)
    blocks = tuple(expect_int(crc, "bin_crc32", 0, _CRC) for crc in expect_list(top["bin_crc32"], "bin_crc32"))
    bin_bytes = expect_int(top["bin_bytes"], "bin_bytes")
    if len(blocks) != -(-bin_bytes // BLOCK_BYTES):
        raise JsonError(f"{len(blocks)} checksums for {bin_bytes} bytes")
    return TokenMeta(
        coding=Coding(
            identity=expect_text(coding["identity"], "identity"),
            path=None if coding["path"] is None else expect_text(coding["path"], "path"),
            vocab=vocab,
            eod=None if coding["eod"] is None else expect_int(coding["eod"], "eod", 0, vocab - 1),
        ),
        documents=expect_int(top["documents"], "documents"),
        tokens=expect_int(top["tokens"], "tokens"),
        largest=expect_int(top["largest"], "largest", -1, vocab - 1),
        left_out=expect_int(top["left_out"], "left_out"),
        bin_bytes=bin_bytes,
        bin_crc32=blocks,
        idx_bytes=expect_int(top["idx_bytes"], "idx_bytes"),
        idx_crc32=expect_int(top["idx_crc32"], "idx_crc32", 0, _CRC),
    )
