"""From a data configuration to microbatches: sources opened, split, checked, and read at any position."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...configs.errors import Problem, UserError
from ...configs.schema import DataConfig
from ...parallel.labels import IGNORED
from .packing import Boundaries, TokenStream, pair_sum
from .sampler import Sampler, make_pattern, permute
from .sources import is_text, open_indexed, open_text_source, split_windows
from .tokenizer import Tokenizer, check_vocab, make_tokenizer


@dataclass(frozen=True)
class Microbatch:
    """b sequences of T tokens, on the CPU (pinned where asked for).

    `labels` are the next tokens, -1 where none may be learnt. `positions` (restarting at 0) and `documents`
    (counted from 0 in each sequence) are None unless documents are masked from each other. `samples` are run-wide
    numbers, step * global_batch + sequence. `valid` counts labels that are not -1; `pairs` are the
    unmasked attention pairs: half the squared length of every document (of every sequence, without document mask), and
    fewer where the model attends through a sliding window. It is the mean over the model's layers, whose windows may
    differ.
    """

    tokens: torch.Tensor  # int64 [b, T]
    labels: torch.Tensor  # int64 [b, T]
    positions: torch.Tensor | None  # int64 [b, T]
    documents: torch.Tensor | None  # int32 [b, T]
    samples: torch.Tensor  # int64 [b]
    valid: int
    pairs: float

    def pin(self) -> Microbatch:
        """The same microbatch in page-locked memory, from which copies to a GPU overlap with compute."""
        return dataclasses.replace(
            self, **{name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        )


@dataclass(frozen=True)
class Split:
    """The training or the held-out windows of all sources. Everything is a pure function of its arguments."""

    streams: tuple[TokenStream, ...]
    sampler: Sampler
    seq_len: int
    vocab: int
    document_mask: bool
    windows: tuple[int | None, ...] = (None,)

    @cached_property
    def _reaches(self) -> Counter[int]:
        """Tokens that a token may attend to, itself included, and the number of layers where these are so many."""
        return Counter(self.seq_len if w is None else min(w, self.seq_len) for w in self.windows)

    def _mean(self, twice: Callable[[int], int]) -> float:
        """The mean over the layers of half of `twice(reach)`, a whole number whatever the lengths."""
        found = [(layers, twice(reach)) for reach, layers in self._reaches.items()] or [(0, 0)]
        mean = sum(layers * each for layers, each in found) / self._reaches.total() if len(found) > 1 else found[0][1]
        return mean / 2

    @property
    def sequences(self) -> int:
        """Windows in this split, over all sources."""
        total, held = sum(self.sampler.windows), sum(self.sampler.heldout)
        return held if self.sampler.evaluate else total - held

    def batch(self, step: int, microbatch_index: int, *, global_batch: int, micro_batch: int) -> Microbatch:
        """Global microbatch i of a step: its sequences [i b, (i + 1) b). Raises UserError for an id >= vocab."""
        first = step * global_batch + microbatch_index * micro_batch
        samples = np.arange(first, first + micro_batch)
        return self.read(samples, *self.locate(samples))

    def read(self, samples: np.ndarray, source: np.ndarray, starts: np.ndarray) -> Microbatch:
        """The sequences `samples` (b,), which `locate` found at `source` (b,) and `starts` (b,); errors as of
        `batch`."""
        rows = np.empty((len(samples), self.seq_len + 1), np.int64)
        for s, at in self._turns(source):
            rows[at] = self.streams[s].windows(starts[at], self.seq_len)
        self._check_ids(rows, samples)
        tokens, labels = rows[:, :-1].copy(), rows[:, 1:].copy()
        if not self.document_mask:
            size = len(samples) * self.seq_len
            return Microbatch(
                torch.from_numpy(tokens), torch.from_numpy(labels), None, None, torch.from_numpy(samples),
                valid=size, pairs=len(samples) * self._mean(self._whole),
            )  # fmt: skip
        begins = np.zeros(rows.shape, bool)
        for s, at in self._turns(source):
            found = self.streams[s].boundaries(starts[at], self.seq_len)
            begins[at[found.window], found.offset] = True
        labels[begins[:, 1:]] = IGNORED
        documents = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
        column = np.arange(self.seq_len)
        positions = column - np.maximum.accumulate(np.where(begins[:, :-1], column, 0), axis=1)
        return Microbatch(
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            torch.from_numpy(positions),
            torch.from_numpy(documents),
            torch.from_numpy(samples),
            valid=int((labels != IGNORED).sum()),
            # L^2 is the sum of the first L odd numbers; a window adds 2 r for each token beyond its reach r.
            pairs=self._mean(lambda reach: int(np.where(positions < reach, 2 * positions + 1, 2 * reach).sum())),
        )

    def _turns(self, source: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Each source that is in `source` (n,), and where."""
        if len(self.streams) == 1:
            return [(0, np.arange(len(source)))]
        return [(s, np.flatnonzero(source == s)) for s in np.unique(source).tolist()]

    def _whole(self, reach: int) -> int:
        """Twice the pairs of a sequence that is one document."""
        return 2 * reach * self.seq_len - reach**2

    def global_counts(self, step: int, *, global_batch: int) -> tuple[int, float]:
        """(valid labels, pairs) of a step's whole global batch, the same on every rank without communication.

        A constant without document mask. With it, two bisections of the index per sequence, or, where documents end
        at a token (data.eod), one look at the batch's tokens.
        """
        size = global_batch * self.seq_len
        if not self.document_mask:
            return size, global_batch * self._mean(self._whole)
        source, starts = self.locate(np.arange(step * global_batch, (step + 1) * global_batch))
        valid = size
        found: list[tuple[Boundaries, int]] = []
        for s, at in self._turns(source):
            found.append((self.streams[s].boundaries(starts[at], self.seq_len), len(at)))
            valid -= len(found[-1][0].offset)
        return valid, self._mean(lambda reach: sum(pair_sum(cuts, n, self.seq_len, reach) for cuts, n in found))

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sequence (n,), by its number, and its first token there (n,)."""
        source, window = self.sampler.locate(samples)
        return source, window * self.seq_len

    def _check_ids(self, rows: np.ndarray, samples: np.ndarray) -> None:
        if rows.min() < 0:
            row = int(rows.min(axis=1).argmin())
            raise UserError(
                Problem("data", f"negative token id {rows.min()} in sample {samples[row]}; the file is damaged")
            )
        if rows.max() >= self.vocab:
            row = int(rows.max(axis=1).argmax())
            check_vocab(int(rows.max()), self.vocab, f"sample {samples[row]} of the data")


@dataclass(frozen=True)
class Dataset:
    """What a run reads. `heldout` is None when data.holdout is 0; `tokenizer` is None for .bin sources.

    `fingerprint` changes when tokens, split or order-relevant settings other than the seed change, and is equal on
    machines that hold equal data under other paths.
    """

    train: Split
    heldout: Split | None
    tokenizer: Tokenizer | None
    tokens: int
    documents: int
    fingerprint: str
    sources: tuple[str, ...] = ()

    def places(self, samples: Sequence[int]) -> list[tuple[str, int]]:
        """The source, by name, that each sequence of the training comes from, and its first token there."""
        source, first = self.train.locate(np.asarray(samples))
        return [(self.sources[s], start) for s, start in zip(source.tolist(), first.tolist(), strict=True)]


def open_data(
    cfg: DataConfig,
    *,
    seq_len: int,
    vocab: int,
    seed: int,
    windows: Sequence[int | None] = (None,),
    progress: bool = True,
) -> Dataset:
    """Open (and, the first time, tokenize) the sources of `cfg`; may be called by all ranks at once.

    `windows` are the sliding windows of the model's layers, None for full attention (`costs.flops.layer_windows`).

    Raises UserError for files that are missing, damaged or too small, and for token ids that do not fit `vocab`.
    """
    if not 0 <= cfg.holdout < 1:
        raise UserError(Problem("data.holdout", f"{cfg.holdout} is not a fraction in [0, 1)"))
    tokenizer = make_tokenizer(cfg.tokenizer) if is_text(cfg) else None
    if tokenizer is None:
        sources = open_indexed(cfg, vocab)
    else:
        sources = [open_text_source(cfg, tokenizer, vocab, progress=progress)]
    splits = [split_windows(source.name, source.stream.tokens, seq_len, cfg.holdout) for source in sources]
    problems = [split for split in splits if isinstance(split, Problem)]
    if problems:
        raise UserError(*problems)
    samples, held = zip(*(split for split in splits if not isinstance(split, Problem)), strict=True)
    streams, weights = [source.stream for source in sources], [source.weight for source in sources]
    sampler = Sampler(samples, held, make_pattern(weights), seed)
    train = Split(tuple(streams), sampler, seq_len, vocab, cfg.document_mask, tuple(windows))
    evaluate = dataclasses.replace(sampler, evaluate=True)
    return Dataset(
        train=train,
        heldout=dataclasses.replace(train, sampler=evaluate) if all(held) else None,
        tokenizer=tokenizer,
        tokens=sum(stream.tokens for stream in streams),
        documents=sum(stream.documents for stream in streams),
        fingerprint=_fingerprint(train, weights),
        sources=tuple(source.name for source in sources),
    )


def _fingerprint(split: Split, weights: list[float]) -> str:
    """Hash of sizes, settings and 64 sampled stretches of every stream: cheap for any size of data."""
    digest = hashlib.sha256(repr((split.seq_len, split.document_mask, split.sampler.heldout, weights)).encode())
    for stream in split.streams:
        digest.update(repr((stream.tokens, stream.documents, stream.eod)).encode())
        spots = permute(np.arange(min(64, stream.tokens)), stream.tokens, (0,))
        for start in spots.tolist():
            piece = np.empty(min(256, stream.tokens - start), np.int64)
            stream.read(start, piece)
            digest.update(piece.tobytes())
    return digest.hexdigest()[:32]
