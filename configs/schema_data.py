"""The `data` section: text to tokens, and the sources that data.name selects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .tables.derived import DERIVED, Derived


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Text to tokens."""

    path: str | None = None
    """A tokenizer.json, or its folder; none: the built-in byte tokenizer (256 bytes and one end-of-document token)."""
    eod: str | None = None
    """End-of-document token in the tokenizer.json; derived: the first of <|endoftext|>, <|end_of_text|>, </s>."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What every source has."""

    name: str
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Text to tokens; of bin and blend only its vocabulary is used, where the files do not say theirs."""
    document_mask: bool = False
    """Packed documents attend only to themselves, and their positions start at 0."""
    holdout: float = 0.01
    """Fraction of the sequences kept for evaluation, never trained on."""
    cache: Derived[str] = DERIVED
    """Folder of tokenized text; derived: the user's cache folder."""
    prefetch: int = 4
    """Microbatches prepared ahead by the loader thread; 0: none, each is made when it is needed."""


@dataclass(frozen=True, kw_only=True)
class StdlibData(DataConfig):
    """The source text of the running Python's standard library: real text on every machine."""

    name: Literal["stdlib"] = "stdlib"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""


@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Plain text, one document a file."""

    name: Literal["text"] = "text"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    paths: tuple[str, ...]
    """Files, folders or glob patterns."""


@dataclass(frozen=True, kw_only=True)
class JsonlData(TextData):
    """JSON lines, one document a line."""

    name: Literal["jsonl"] = "jsonl"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    field: str = "text"
    """The key that holds the text."""


@dataclass(frozen=True, kw_only=True)
class ParquetData(TextData):
    """Parquet files, one document a row."""

    name: Literal["parquet"] = "parquet"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    field: str = "text"
    """The column that holds the text."""


@dataclass(frozen=True, kw_only=True)
class BinData(DataConfig):
    """Megatron's tokenized format: PREFIX.bin and PREFIX.idx."""

    name: Literal["bin"] = "bin"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    paths: tuple[str, ...]
    """Prefixes, without the extension; several are concatenated."""
    eod: int | None = None
    """End-of-document token; none: a document ends where the index says."""


@dataclass(frozen=True, kw_only=True)
class BlendData(DataConfig):
    """A weighted mixture of .bin/.idx prefixes."""

    name: Literal["blend"] = "blend"
    """Selects the class of this section: stdlib, text, jsonl, parquet, bin or blend."""
    weights: dict[str, float]
    """Prefix to weight; weights are normalised to sum to 1, and 0 leaves a source out."""
    eod: int | None = None
    """End-of-document token; none: a document ends where the index says."""


DATASETS: dict[str, type] = {
    "stdlib": StdlibData,
    "text": TextData,
    "jsonl": JsonlData,
    "parquet": ParquetData,
    "bin": BinData,
    "blend": BlendData,
}
