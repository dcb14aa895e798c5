"""The benchmark of tokens per second at twice the sequence that fits without offload, in small on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import offload_tokens
from offload_tokens import Model

SMALL = Model(layers=6, hidden=32, heads=2, ffn=64, vocab=320, dtype="fp32", device="cpu", microbatches=1)


def test_twice_the_sequence_that_fits_without_offload_fits_with_it() -> None:
    model = Model(**{**vars(SMALL), "limit": 1 << 21})
    rows = offload_tokens.compare(model, 64, 1, 4096)
    assert rows[1].seq_len == 2 * rows[0].seq_len
    assert all(each is not None for each in rows[0].tokens_per_s.values())
    assert rows[1].tokens_per_s["neither"] is None and rows[1].tokens_per_s["offload"] is not None
    assert "does not fit" in str(rows[1])


def test_where_nothing_or_everything_fits_there_is_no_table() -> None:
    with pytest.raises(RuntimeError, match="nothing fits"):
        offload_tokens.compare(Model(**{**vars(SMALL), "limit": 1}), 64, 1, 128)
    with pytest.raises(RuntimeError, match="everything fits"):
        offload_tokens.compare(Model(**{**vars(SMALL), "limit": 1 << 40}), 64, 1, 128)
