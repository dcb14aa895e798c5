"""The `data` section: text to tokens, and the sources that data.name selects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

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


@dataclass(frozen=True, kw_only=True)
class TextData(DataConfig):
    """Plain text, one document a file."""

    name: Literal["text"] = "text"
    paths: tuple[str, ...]
    """Files, folders or glob patterns."""


@dataclass(frozen=True, kw_only=True)
class RecordsData(TextData):
    """Files of records, one document a record."""

    field: str = "text"
    """The key or the column that holds the text."""


@dataclass(frozen=True, kw_only=True)
class JsonlData(RecordsData):
    """JSON lines, one document a line."""

    name: Literal["jsonl"] = "jsonl"


@dataclass(frozen=True, kw_only=True)
class ParquetData(RecordsData):
    """Parquet files, one document a row."""

    name: Literal["parquet"] = "parquet"


@dataclass(frozen=True, kw_only=True)
class TokenizedData(DataConfig):
    """What is tokens already: all other sources are text, which the job's tokenizer turns into them."""

    eod: int | None = None
    """End-of-document token; none: a document ends where the index says."""
    given: ClassVar[str]
    """The key that holds the prefixes."""

    @property
    def groups(self) -> list[tuple[tuple[str, ...], float]]:
        """The prefixes of each stream of tokens, and its weight in the mixture."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class BinData(TokenizedData):
    """Megatron's tokenized format: PREFIX.bin and PREFIX.idx."""

    name: Literal["bin"] = "bin"
    paths: tuple[str, ...]
    """Prefixes, without the extension; several are concatenated."""
    given: ClassVar[str] = "data.paths"

    @property
    def groups(self) -> list[tuple[tuple[str, ...], float]]:
        return [(self.paths, 1.0)] if self.paths else []


@dataclass(frozen=True, kw_only=True)
class BlendData(TokenizedData):
    """A weighted mixture of .bin/.idx prefixes."""

    name: Literal["blend"] = "blend"
    weights: dict[str, float]
    """Prefix to weight; weights are normalised to sum to 1, and 0 leaves a source out."""
    given: ClassVar[str] = "data.weights"

    @property
    def groups(self) -> list[tuple[tuple[str, ...], float]]:
        return [((prefix,), weight) for prefix, weight in self.weights.items() if weight != 0]


DATASETS: dict[str, type] = {
    kind.name: kind for kind in (StdlibData, TextData, JsonlData, ParquetData, BinData, BlendData)
}
"""By the name that data.name selects; a source is its class, listed here, and what `trainer/data` reads it with."""
