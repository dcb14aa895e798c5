"""Megatron-LM's tokenized format: PREFIX.bin holds token ids, PREFIX.idx says where sequences and documents start.

The layout of PREFIX.idx, little-endian, is that of Megatron-LM's ``IndexedDataset``::

    magic "MMIDIDX\\0\\0" · u64 version 1 · u8 dtype code · u64 sequences S · u64 document entries D
    i32 tokens per sequence [S] · i64 byte offset of each sequence in PREFIX.bin [S] · i64 document entries [D]

Document d is the sequences [entry d, entry d+1), so D is one more than the number of documents.
"""

from __future__ import annotations

import os
import struct
import uuid
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

from ...configs.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")
_CHUNK = 1 << 22


def strip_suffix(prefix: str) -> str:
    """PREFIX of PREFIX, PREFIX.bin or PREFIX.idx, with ~ expanded."""
    expanded = os.path.expanduser(prefix)
    return expanded[:-4] if expanded.endswith((".bin", ".idx")) else expanded


class IndexedReader:
    """Read-only view of PREFIX.bin and PREFIX.idx, both memory-mapped: opening costs no memory per token.

    ``tokens`` [n] is the whole of PREFIX.bin. Raises UserError when a file is missing, is damaged, or its sequences
    do not lie end to end in PREFIX.bin (as every known writer lays them out).
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = strip_suffix(prefix)
        self._bin, self._idx = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        missing = [f"no such file: {file}" for file in (self._bin, self._idx) if not file.is_file()]
        if missing:
            raise UserError(*missing)
        self.dtype, self.sequences, entries = self._read_header()
        start = _HEADER.size
        self.lengths = self._map("<i4", start, self.sequences)
        self.pointers = self._map("<i8", start + 4 * self.sequences, self.sequences)
        self.entries = self._map("<i8", start + 12 * self.sequences, entries)
        self.documents = entries - 1
        self._check()
        count = self._bin.stat().st_size // self.dtype.itemsize
        self.tokens: np.ndarray = np.memmap(self._bin, self.dtype, "r") if count else np.empty(0, self.dtype)

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        start, stop = self.document_starts(np.array([index, index + 1]))
        return self.tokens[start:stop]

    def document_starts(self, index: np.ndarray) -> np.ndarray:
        """Token offsets [n] at which documents ``index`` [n] start; the one after the last starts at the end."""
        sequence = self.entries[index]
        total = self.tokens.size
        if not self.sequences:
            return np.zeros(len(index), np.int64)
        start = self.pointers[np.minimum(sequence, self.sequences - 1)] // self.dtype.itemsize
        return np.where(sequence < self.sequences, start, total)

    def _map(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return np.memmap(self._idx, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size = self._idx.stat().st_size
        with self._idx.open("rb") as file:
            header = file.read(_HEADER.size)
        if header[: len(MAGIC)] != MAGIC:
            raise UserError(f"{self._idx} is not a Megatron .idx file: it starts with {header[:9]!r}, not {MAGIC!r}")
        if size < _HEADER.size:
            raise UserError(f"{self._idx} is truncated: {size} bytes, its header alone has {_HEADER.size}")
        _, version, code, sequences, entries = _HEADER.unpack(header)
        if version != 1:
            raise UserError(f"{self._idx} has version {version}; only version 1 is known")
        if code not in DTYPES:
            raise UserError(f"{self._idx} has unknown dtype code {code}; known are 1 to {max(DTYPES)}")
        expected = _HEADER.size + 12 * sequences + 8 * entries
        if size < expected:
            needs = f"{sequences} sequences and {entries} document entries need {expected}"
            raise UserError(f"{self._idx} is truncated: {size} bytes, but {needs}")
        # Multimodal files append one mode byte per sequence, which text training does not need.
        if size not in (expected, expected + sequences):
            raise UserError(f"{self._idx} has {size} bytes, but its header describes {expected}")
        if entries < 1:
            raise UserError(f"{self._idx} has no document entries; it needs one more than it has documents")
        return DTYPES[code], sequences, entries

    def _check(self) -> None:
        """Lengths, offsets and document entries agree with each other and with the size of PREFIX.bin."""
        item, offset = self.dtype.itemsize, 0
        for first in range(0, self.sequences, _CHUNK):
            sizes = self.lengths[first : first + _CHUNK].astype(np.int64)
            if sizes.min() < 0:
                raise UserError(f"{self._idx} is damaged: sequence {first + int(sizes.argmin())} has negative length")
            ends = offset + np.cumsum(sizes) * item
            wrong = self.pointers[first : first + _CHUNK] != ends - sizes * item
            if wrong.any():
                at = first + int(wrong.argmax())
                raise UserError(
                    f"{self._idx} is damaged: sequence {at} starts at byte {self.pointers[at]}, "
                    f"not at {int((ends - sizes * item)[at - first])} where the one before it ends"
                )
            offset = int(ends[-1])
        actual = self._bin.stat().st_size
        if actual != offset:
            fault = "too short" if actual < offset else "too long"
            raise UserError(f"{self._bin} is {fault}: {actual} bytes, but {self._idx.name} describes {offset}")
        self._check_documents()

    def _check_documents(self) -> None:
        if self.entries[0] != 0 or self.entries[-1] != self.sequences:
            span = f"documents span sequences {self.entries[0]} to {self.entries[-1]}"
            raise UserError(f"{self._idx} is damaged: {span}, not 0 to {self.sequences}")
        for first in range(0, self.documents, _CHUNK):
            if (np.diff(self.entries[first : first + _CHUNK + 1]) < 0).any():
                raise UserError(f"{self._idx} is damaged: its documents are not in order")


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear, whole, when the ``with`` block ends without an exception.

    Documents longer than ``max_sequence`` tokens (lengths are 32-bit) become several sequences of one document.
    """

    def __init__(self, prefix: str, dtype: np.dtype, max_sequence: int = 2**31 - 1) -> None:
        self.prefix = strip_suffix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.documents = self.tokens = 0
        self._max_sequence = max_sequence
        self._code = _CODES[self.dtype]
        self._lengths, self._entries = array("i"), array("q", [0])
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, so that two writers of one prefix cannot mix: the last one to finish wins.
        self._temporary = f"{self.prefix}.{uuid.uuid4().hex[:12]}.tmp"
        self._file = open(self._temporary + ".bin", "wb", buffering=1 << 20)  # noqa: SIM115

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, token ids [n]. Raises ValueError for ids outside the file's type."""
        if tokens.dtype != self.dtype:
            info = np.iinfo(self.dtype)
            if tokens.size and (tokens.min() < info.min or tokens.max() > info.max):
                raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}")
            tokens = tokens.astype(self.dtype)
        self._file.write(np.ascontiguousarray(tokens).data)
        for start in range(0, max(tokens.size, 1), self._max_sequence):
            self._lengths.append(min(self._max_sequence, tokens.size - start))
        self._entries.append(len(self._lengths))
        self.documents += 1
        self.tokens += tokens.size

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._file.close()
            for suffix in (".bin", ".idx"):
                Path(self._temporary + suffix).unlink(missing_ok=True)

    def _publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        with open(self._temporary + ".idx", "wb") as file:
            file.write(_HEADER.pack(MAGIC, 1, self._code, len(lengths), len(self._entries)))
            file.write(lengths.astype("<i4").tobytes())
            file.write((ends - lengths * np.int64(self.dtype.itemsize)).astype("<i8").tobytes())
            file.write(np.frombuffer(self._entries, np.int64).astype("<i8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        # The index makes a pair complete: an old one must not describe the new tokens even for a moment.
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        os.replace(self._temporary + ".bin", self.prefix + ".bin")
        os.replace(self._temporary + ".idx", self.prefix + ".idx")
