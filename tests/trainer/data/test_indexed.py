"""The .bin/.idx format: exact bytes, round trips, and what damaged files say."""

from __future__ import annotations

import struct
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from pentad.configs.errors import UserError
from pentad.trainer.data.indexed import DTYPES, IndexedReader, IndexedWriter


def write(prefix: Path, documents: list[list[int]], dtype: str = "u2", max_sequence: int = 2**31 - 1) -> str:
    with IndexedWriter(str(prefix), np.dtype(dtype), max_sequence) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=dtype))
    return str(prefix)


def hand_made_index(code: int, lengths: list[int], pointers: list[int], documents: list[int]) -> bytes:
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i{len(pointers)}q{len(documents)}q", *lengths, *pointers, *documents)
    return head + body


def test_writes_the_bytes_of_the_format(tmp_path: Path) -> None:
    write(tmp_path / "x", [[1, 2, 3], [], [65535]])
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<4H", 1, 2, 3, 65535)
    assert (tmp_path / "x.idx").read_bytes() == hand_made_index(8, [3, 0, 1], [0, 6, 6], [0, 1, 2, 3])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_round_trip_of_every_integer_type(tmp_path: Path, code: int) -> None:
    dtype = DTYPES[code].str
    documents = [[1, 2, 3], [4], [5, 6], [127]]
    reader = IndexedReader(write(tmp_path / "x", documents, dtype))
    assert (reader.dtype, reader.documents) == (np.dtype(dtype), 4)
    assert [reader.document(d).tolist() for d in range(4)] == documents
    assert reader.tokens.tolist() == list(chain(*documents))


def test_reads_documents_of_several_sequences_and_mode_bytes(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(struct.pack("<6i", *range(6)))
    index = hand_made_index(4, [2, 1, 3], [0, 8, 12], [0, 2, 3])
    (tmp_path / "x.idx").write_bytes(index + b"\0\0\0")
    reader = IndexedReader(str(tmp_path / "x.idx"))
    assert [reader.document(d).tolist() for d in range(2)] == [[0, 1, 2], [3, 4, 5]]


def test_a_long_document_becomes_several_sequences(tmp_path: Path) -> None:
    reader = IndexedReader(write(tmp_path / "x", [[1, 2, 3, 4, 5], [6]], max_sequence=2))
    assert reader.lengths.tolist() == [2, 2, 1, 1]
    assert [reader.document(d).tolist() for d in range(2)] == [[1, 2, 3, 4, 5], [6]]


def test_an_exception_leaves_the_old_files_alone(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", [[1]])
    with pytest.raises(KeyError), IndexedWriter(prefix, np.dtype("u2")) as writer:
        writer.add(np.array([7], np.uint16))
        raise KeyError
    assert IndexedReader(prefix).tokens.tolist() == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_ids_that_do_not_fit_the_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"70000"), IndexedWriter(str(tmp_path / "x"), np.dtype("u2")) as writer:
        writer.add(np.array([70000]))


GOOD = hand_made_index(8, [3, 1], [0, 6], [0, 1, 2])
DAMAGED = {
    "magic": (b"NOTANIDX\0" + GOOD[9:], 8, "x.idx is not a Megatron .idx file"),
    "empty": (b"", 8, "x.idx is not a Megatron .idx file"),
    "short header": (GOOD[:20], 8, "x.idx is truncated: 20 bytes"),
    "truncated": (GOOD[:-5], 8, "x.idx is truncated: 77 bytes, but 2 sequences and 3 document entries need 82"),
    "trailing bytes": (GOOD + bytes(7), 8, "x.idx has 89 bytes, but its header describes 82"),
    "version": (GOOD[:9] + struct.pack("<Q", 9) + GOOD[17:], 8, "version 9"),
    "dtype": (hand_made_index(9, [3, 1], [0, 6], [0, 1, 2]), 8, "unknown dtype code 9"),
    "negative length": (hand_made_index(8, [3, -1], [0, 6], [0, 1, 2]), 8, "sequence 1 has negative length"),
    "gap": (hand_made_index(8, [3, 1], [0, 8], [0, 1, 2]), 10, "sequence 1 starts at byte 8, not at 6"),
    "short bin": (GOOD, 6, "x.bin is too short: 6 bytes, but x.idx describes 8"),
    "long bin": (GOOD, 10, "x.bin is too long: 10 bytes, but x.idx describes 8"),
    "no documents": (hand_made_index(8, [3, 1], [0, 6], []), 8, "no document entries"),
    "document span": (hand_made_index(8, [3, 1], [0, 6], [0, 1]), 8, "documents span sequences 0 to 1, not 0 to 2"),
    "document order": (hand_made_index(8, [3, 1], [0, 6], [0, 5, 1, 2]), 8, "documents are not in order"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, case: str) -> None:
    index, size, message = DAMAGED[case]
    (tmp_path / "x.idx").write_bytes(index)
    (tmp_path / "x.bin").write_bytes(bytes(size))
    with pytest.raises(UserError) as caught:
        IndexedReader(str(tmp_path / "x"))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*x\.bin\n.*no such file: .*x\.idx"):
        IndexedReader(str(tmp_path / "x"))
