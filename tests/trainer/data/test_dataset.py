"""Packing, document masks, splits and batches, against brute force over the list of documents."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from pentad.configs.errors import UserError
from pentad.configs.schema import BinData, BlendData, DataConfig, JsonlData, TextData
from pentad.trainer.data import packing
from pentad.trainer.data.dataset import Dataset, Microbatch, Split, open_data
from pentad.trainer.data.indexed import IndexedReader, IndexedWriter
from pentad.trainer.data.packing import TokenStream
from pentad.trainer.data.tokenizer import check_vocab

EOD, VOCAB, T = 99, 100, 16


def make_documents(seed: int, count: int = 60) -> list[list[int]]:
    """Random documents, some empty, some longer than a window, each non-empty one ending with EOD."""
    random = np.random.default_rng(seed)
    lengths = random.choice([0, 1, 2, 5, 16, 17, 33, 50], size=count)
    return [[*random.integers(0, EOD, n).tolist(), EOD] if n else [] for n in lengths.tolist()]


def write(prefix: Path, documents: list[list[int]], max_sequence: int = 2**31 - 1) -> str:
    with IndexedWriter(str(prefix), np.dtype("u2"), max_sequence) as writer:
        for document in documents:
            writer.add(np.array(document, np.uint16))
    return str(prefix)


def brute_force(documents: list[list[int]], start: int) -> tuple[list[int], list[int], list[int], list[int], int]:
    """tokens, labels, positions, documents, twice the pairs of the window that starts at token ``start``."""
    flat = [(token, d) for d, document in enumerate(documents) for token in document]
    window = flat[start : start + T + 1]
    tokens = [token for token, _ in window[:T]]
    owner = [d for _, d in window]
    labels = [window[i + 1][0] if owner[i + 1] == owner[i] else -1 for i in range(T)]
    order = sorted(set(owner[:T]))
    lengths = [owner[:T].count(d) for d in order]
    positions = [p for n in lengths for p in range(n)]
    return tokens, labels, positions, [order.index(d) for d in owner[:T]], sum(n * n for n in lengths)


def open_bin(cfg: DataConfig, seed: int = 0) -> Dataset:
    return open_data(cfg, seq_len=T, vocab=VOCAB, seed=seed, progress=False)


@pytest.mark.parametrize("eod", [None, EOD])
@pytest.mark.parametrize("max_sequence", [7, 1000])
def test_masked_batches_equal_brute_force(tmp_path: Path, eod: int | None, max_sequence: int) -> None:
    groups = [make_documents(seed) for seed in (1, 2, 3)]
    paths = tuple(write(tmp_path / str(i), g, max_sequence=max_sequence) for i, g in enumerate(groups))
    data = open_bin(BinData(paths=paths, eod=eod, document_mask=True, holdout=0))
    documents = list(chain(*groups))
    counts = np.zeros(2)
    for index in range(10):
        batch = data.train.batch(0, index, global_batch=30, micro_batch=3)
        _, windows = data.train.sampler.locate(batch.samples.numpy())
        wanted = [brute_force(documents, int(w) * T) for w in windows]
        assert batch.positions is not None and batch.documents is not None
        fields = (batch.tokens, batch.labels, batch.positions, batch.documents)
        for field, values in zip(fields, zip(*wanted, strict=True), strict=False):
            assert field.tolist() == list(values)
        assert batch.pairs == sum(w[4] for w in wanted) / 2
        assert batch.valid == sum(label >= 0 for w in wanted for label in w[1])
        counts += batch.valid, batch.pairs
    assert data.train.global_counts(0, global_batch=30) == tuple(counts)


def test_windows_tile_the_stream_without_mask(tmp_path: Path) -> None:
    documents = make_documents(5)
    flat = list(chain(*documents))
    data = open_bin(BinData(paths=(write(tmp_path / "x", documents),), holdout=0))
    count = data.train.sequences
    assert count == (len(flat) - 1) // T
    batch = data.train.batch(0, 0, global_batch=count, micro_batch=count)
    assert (batch.positions, batch.documents, batch.valid, batch.pairs) == (None, None, count * T, count * T * T / 2)
    assert data.train.global_counts(0, global_batch=count) == (batch.valid, batch.pairs)
    seen = sorted(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True))
    wanted = [(flat[i * T : i * T + T], flat[i * T + 1 : i * T + T + 1]) for i in range(count)]
    assert seen == sorted(wanted)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.samples.dtype) == (torch.int64,) * 3


def test_held_out_windows_are_never_trained_on(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [list(range(EOD))] * 40)
    data = open_bin(BinData(paths=(path,), holdout=0.1))
    assert data.heldout is not None
    total = (40 * EOD - 1) // T
    assert (data.heldout.sequences, data.train.sequences) == (round(0.1 * total), total - round(0.1 * total))
    train = set(data.train.sampler.locate(np.arange(3 * data.train.sequences))[1].tolist())
    held = set(data.heldout.sampler.locate(np.arange(3 * data.heldout.sequences))[1].tolist())
    assert not train & held
    assert train | held == set(range(total))
    other = open_bin(BinData(paths=(path,), holdout=0.1), seed=5)
    assert other.heldout is not None
    assert same(
        data.heldout.batch(0, 0, global_batch=4, micro_batch=4),
        other.heldout.batch(0, 0, global_batch=4, micro_batch=4),
    )


def same(one: Microbatch, two: Microbatch) -> bool:
    return all(torch.equal(a, b) for a, b in ((one.tokens, two.tokens), (one.labels, two.labels)))


def test_blend_draws_from_its_prefixes_by_weight(tmp_path: Path) -> None:
    low = write(tmp_path / "low", [[1, 2, 3] * 100])
    high = write(tmp_path / "high", [[51, 52, 53] * 30])
    data = open_bin(BlendData(weights={low: 3.0, high + ".bin": 1.0}, holdout=0, document_mask=True))
    batch = data.train.batch(0, 0, global_batch=400, micro_batch=400)
    from_high = (batch.tokens > 50).all(dim=1)
    assert ((batch.tokens > 50).any(dim=1) == from_high).all()
    assert int(from_high.sum()) == 100
    assert data.train.global_counts(0, global_batch=400) == (batch.valid, batch.pairs)


def test_fingerprint_follows_the_tokens_not_the_path(tmp_path: Path) -> None:
    documents = make_documents(1)
    one, two = write(tmp_path / "one", documents), write(tmp_path / "two", documents)
    three = write(tmp_path / "three", [[token ^ 1 for token in document] for document in documents])
    prints = [open_bin(BinData(paths=(path,))).fingerprint for path in (one, two, three)]
    assert prints[0] == prints[1] != prints[2]


def test_ids_beyond_the_vocabulary_are_found_at_set_up(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [[1] * 200 + [VOCAB]])
    with pytest.raises(UserError, match=r"x\.bin has token id 100, but the model has 100 tokens.*model.vocab to 101"):
        open_bin(BinData(paths=(path,)))
    with pytest.raises(UserError, match=r"token id 256, but the model has 100"):
        text = tmp_path / "a.txt"
        text.write_text("hello")
        open_bin(TextData(paths=(str(text),), cache=str(tmp_path)))
    check_vocab(256, 257)


def test_ids_missed_by_the_sample_of_a_large_file_are_found_in_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [1] * 4000
    tokens[1500] = VOCAB
    path = write(tmp_path / "x", [tokens])
    monkeypatch.setattr(packing, "SCAN_BYTES", 2000)
    monkeypatch.setattr(packing, "_SCAN_CHUNK", 500)
    data = open_bin(BinData(paths=(path,), holdout=0))
    with pytest.raises(UserError, match=r"sample .* has token id 100"):
        data.train.batch(0, 0, global_batch=data.train.sequences, micro_batch=data.train.sequences)


def test_negative_and_fractional_ids(tmp_path: Path) -> None:
    for dtype, message in (("i4", "negative token id -5"), ("f4", "holds float32, not token ids")):
        with IndexedWriter(str(tmp_path / dtype), np.dtype(dtype)) as writer:
            writer.add(np.array([1, -5] * 30, dtype))
        with pytest.raises(UserError, match=message):
            open_bin(BinData(paths=(str(tmp_path / dtype),)))


def test_too_little_data_and_bad_fractions(tmp_path: Path) -> None:
    short, one = write(tmp_path / "short", [[1] * T]), write(tmp_path / "one", [[1] * (T + 1)])
    with pytest.raises(UserError, match=r"short has 16 tokens, but one sequence needs 17"):
        open_bin(BinData(paths=(short,)))
    with pytest.raises(UserError, match=r"data.holdout: .*one has 1 sequences"):
        open_bin(BinData(paths=(one,)))
    assert open_bin(BinData(paths=(one,), holdout=0)).heldout is None
    with pytest.raises(UserError, match=r"data.holdout: 1.5"):
        open_bin(BinData(paths=(one,), holdout=1.5))
    with pytest.raises(UserError, match=r"has 0 tokens"):
        open_bin(BinData(paths=(write(tmp_path / "none", []),)))


def test_every_missing_prefix_is_reported(tmp_path: Path) -> None:
    weights = {str(tmp_path / "a"): 1.0, str(tmp_path / "b"): 1.0}
    with pytest.raises(UserError) as caught:
        open_bin(BlendData(weights=weights))
    assert len(caught.value.problems) == 4
    assert all(problem.key == "data.weights" for problem in caught.value.problems)
    with pytest.raises(UserError, match=r"data.paths: no prefixes"):
        open_bin(BinData(paths=()))


def test_text_and_jsonl_give_the_same_training_data(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo wörld " * 20, encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"body": "' + "héllo wörld " * 20 + '"}\n', encoding="utf-8")
    cache = str(tmp_path / "cache")
    text = open_data(TextData(paths=(str(tmp_path / "a.txt"),), cache=cache), seq_len=8, vocab=257, seed=0)
    cfg = JsonlData(paths=(str(tmp_path / "b.jsonl"),), field="body", cache=cache)
    assert open_data(cfg, seq_len=8, vocab=257, seed=0).fingerprint == text.fingerprint
    assert text.tokens == 14 * 20 + 1


def test_boundaries_of_many_windows_match_a_scan(tmp_path: Path) -> None:
    groups = [make_documents(seed, 300) for seed in (8, 9)]
    parts = [IndexedReader(write(tmp_path / str(i), g, max_sequence=9)) for i, g in enumerate(groups)]
    stream = TokenStream(parts)
    owner = np.repeat(np.arange(600), [len(d) for d in list(chain(*groups))])
    begins = np.flatnonzero(np.diff(owner)) + 1
    starts = np.random.default_rng(0).integers(0, stream.tokens - T - 1, 500)
    found = stream.boundaries(starts, T)
    for row, start in enumerate(starts.tolist()):
        inside = begins[(begins > start) & (begins <= start + T)] - start
        assert found.offset[found.window == row].tolist() == inside.tolist()


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("window", [1, 6, T, 3 * T])
def test_pairs_with_a_sliding_window_equal_a_count(tmp_path: Path, mask: bool, window: int) -> None:
    cfg = BinData(paths=(write(tmp_path / "x", make_documents(4)),), document_mask=mask, holdout=0)
    data = open_data(cfg, seq_len=T, vocab=VOCAB, seed=0, progress=False, windows=[window])
    batch = data.train.batch(0, 0, global_batch=20, micro_batch=20)
    owners = torch.zeros(20, T, dtype=torch.int32) if batch.documents is None else batch.documents
    wanted = 0
    for row in owners.tolist():
        wanted += sum(row[j] == row[i] for i in range(T) for j in range(max(0, i - window + 1), i + 1))
        # By convention L tokens count L^2 / 2, not (L^2 + L) / 2; with a window, the correction stops at its width.
        wanted -= sum(min(row.count(d), window) for d in set(row)) / 2
    assert batch.pairs == wanted
    assert data.train.global_counts(0, global_batch=20) == (batch.valid, wanted)


@pytest.mark.parametrize("mask", [False, True])
def test_pairs_of_layers_with_different_windows_are_their_mean(tmp_path: Path, mask: bool) -> None:
    cfg = BinData(paths=(write(tmp_path / "x", make_documents(4)),), document_mask=mask, holdout=0)

    def split(*windows: int | None) -> Split:
        return open_data(cfg, seq_len=T, vocab=VOCAB, seed=0, progress=False, windows=windows).train

    stacks: list[tuple[int | None, ...]] = [(6,), (None,), (6, None, 6)]
    near, all_, mixed = (split(*windows).batch(0, 0, global_batch=20, micro_batch=20) for windows in stacks)
    assert near.pairs < all_.pairs
    assert mixed.pairs == pytest.approx((2 * near.pairs + all_.pairs) / 3, rel=1e-15)
    assert split(6, None, 6).global_counts(0, global_batch=20) == (mixed.valid, pytest.approx(mixed.pairs, rel=1e-15))


def test_a_weight_of_zero_leaves_its_source_out(tmp_path: Path) -> None:
    path = write(tmp_path / "x", [list(range(EOD))] * 40)
    alone = open_bin(BlendData(weights={path: 0.3}))
    beside = open_bin(BlendData(weights={path: 0.3, str(tmp_path / "not there"): 0.0}))
    assert beside.fingerprint == alone.fingerprint
