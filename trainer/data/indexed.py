"""Megatron-LM's tokenized format: PREFIX.bin holds token ids, PREFIX.idx says where sequences and documents start.

The layout of PREFIX.idx, little-endian, is that of Megatron-LM's `IndexedDataset`::

    magic "MMIDIDX\\0\\0" · u64 version 1 · u8 dtype code · u64 sequences S · u64 document entries D
    i32 tokens per sequence [S] · i64 byte offset of each sequence in PREFIX.bin [S] · i64 document entries [D]

Document d is the sequences [entry d, entry d+1), so D is one more than the number of documents.

Pairs that Pentad tokenized have a PREFIX.meta.json beside them (`configs.tokenized`), with checksums of both files.
"""

from __future__ import annotations

import contextlib
import math
import os
import struct
import uuid
import zlib
from array import array
from pathlib import Path
from types import TracebackType

import numpy as np

from ...configs.errors import UserError
from ...configs.tokenized import BLOCK_BYTES, META_SUFFIX, Coding, TokenMeta, read_meta, token_prefix
from .unfinished import SUFFIXES, folder_lock, open_locked, remove_abandoned

MAGIC = b"MMIDIDX\x00\x00"
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name).newbyteorder("<")
    for code, name in enumerate(("u1", "i1", "i2", "i4", "i8", "f8", "f4", "u2"), start=1)
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_HEADER = struct.Struct("<9sQBQQ")
# Up to this many bytes of .bin are looked at in whole when it is opened; of larger files, an even sample.
SCAN_BYTES = 2 << 30
_CHUNK = 1 << 22
_INDEX_IN_MEMORY = 64 << 20


class IndexedReader:
    """Read-only view of PREFIX.bin and PREFIX.idx: opening costs no memory per token.

    `size` is the number of tokens, `bytes` that of PREFIX.bin, `meta` what PREFIX.meta.json says (None without
    one). Raises UserError when a file is missing, is damaged, or its sequences do not lie end to end in PREFIX.bin (as
    every known writer lays them out). Tokens are read, not memory-mapped: a file that is cut short while it is in use,
    or a disk that fails, is an error that names it instead of a SIGBUS that ends the process.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = token_prefix(prefix)
        self._bin, self._idx = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        missing = [f"no such file: {file}" for file in (self._bin, self._idx) if not file.is_file()]
        if missing:
            raise UserError(*missing)
        self.meta = read_meta(self.prefix)
        self._index, self._tokens = self._idx.open("rb", buffering=0), self._bin.open("rb", buffering=0)
        self._index_bytes, self.bytes = (os.fstat(file.fileno()).st_size for file in (self._index, self._tokens))
        if self.meta is not None:
            self._check_meta(self.meta)
        self.dtype, self.sequences, entries = self._read_header()
        start = _HEADER.size
        self.lengths = self._map("<i4", start, self.sequences)
        self.pointers = self._map("<i8", start + 4 * self.sequences, self.sequences)
        self.entries = self._map("<i8", start + 12 * self.sequences, entries)
        self.documents = entries - 1
        self._check()
        self.size = self.bytes // self.dtype.itemsize

    @property
    def tokens(self) -> np.ndarray:
        """All token ids [size], read into memory."""
        return self.read(0, self.size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Token ids [start, start + count), fewer where the file ends. Raises UserError if it was cut short."""
        count = max(0, min(count, self.size - start))
        out = np.empty(count, self.dtype)
        view, offset, done = out.data.cast("B") if count else memoryview(b""), start * self.dtype.itemsize, 0
        while done < len(view):
            # One call moves 2 GiB at most.
            got = os.preadv(self._tokens.fileno(), [view[done : done + (1 << 30)]], offset + done)
            if got == 0:
                now = os.fstat(self._tokens.fileno()).st_size
                raise UserError(f"{self._bin} was cut short while in use: {now} bytes, {self.bytes} when opened")
            done += got
        return out

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document."""
        start, stop = self.document_starts(np.array([index, index + 1])).tolist()
        return self.read(start, stop - start)

    def document_starts(self, index: np.ndarray) -> np.ndarray:
        """Token offsets [n] at which documents `index` [n] start; the one after the last starts at the end."""
        self._check_index_size()
        sequence = self.entries[index]
        if not self.sequences:
            return np.zeros(len(index), np.int64)
        start = self.pointers[np.minimum(sequence, self.sequences - 1)] // self.dtype.itemsize
        return np.where(sequence < self.sequences, start, self.size)

    def verify(self, share: float = 1.0) -> None:
        """Compare PREFIX.bin with its checksums, where it has any: whole, or an even sample of about that share.

        Raises UserError naming the first block that differs.
        """
        if self.meta is None:
            return
        every = math.ceil(1 / share)
        for block, wanted in list(enumerate(self.meta.bin_crc32))[::every]:
            at = block * BLOCK_BYTES
            data = os.pread(self._tokens.fileno(), BLOCK_BYTES, at)
            if zlib.crc32(data) != wanted:
                span = f"bytes {at} to {at + len(data)} do not have the checksum in {self.prefix}{META_SUFFIX}"
                raise UserError(f"{self._bin} is damaged: {span}; copy it again or tokenize again")

    def _map(self, dtype: str, offset: int, count: int) -> np.ndarray:
        """Part of the index: in memory, or, of a very large one, memory-mapped."""
        size = count * np.dtype(dtype).itemsize
        if self._index_bytes <= _INDEX_IN_MEMORY:
            return np.frombuffer(os.pread(self._index.fileno(), size, offset), dtype)
        return np.memmap(self._index, dtype, "r", offset, (count,)) if count else np.empty(0, dtype)

    def _check_index_size(self) -> None:
        """Looking at a mapped page that is no longer there would end the process."""
        now = os.fstat(self._index.fileno()).st_size if self._index_bytes > _INDEX_IN_MEMORY else self._index_bytes
        if now < self._index_bytes:
            raise UserError(f"{self._idx} was cut short while in use: {now} bytes, {self._index_bytes} when opened")

    def _check_meta(self, meta: TokenMeta) -> None:
        """Sizes, and the checksum of the index, which is small beside the tokens."""
        way = f"copy them again, tokenize again, or delete {self._idx.stem}{META_SUFFIX} if it is of other files"
        for file, actual, wanted in (
            (self._bin, self.bytes, meta.bin_bytes),
            (self._idx, self._index_bytes, meta.idx_bytes),
        ):
            if actual != wanted:
                fault = "too short" if actual < wanted else "too long"
                raise UserError(f"{file} is {fault}: {actual} bytes, but {META_SUFFIX[1:]} says {wanted}; {way}")
        checksum = 0
        for at in range(0, self._index_bytes, _CHUNK):
            checksum = zlib.crc32(os.pread(self._index.fileno(), _CHUNK, at), checksum)
        if checksum != meta.idx_crc32:
            raise UserError(f"{self._idx} is damaged: it does not have its checksum in {META_SUFFIX[1:]}; {way}")

    def _read_header(self) -> tuple[np.dtype, int, int]:
        size = self._index_bytes
        header = os.pread(self._index.fileno(), _HEADER.size, 0)
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
        actual = self.bytes
        if actual != offset:
            fault = "too short" if actual < offset else "too long"
            raise UserError(f"{self._bin} is {fault}: {actual} bytes, but {self._idx.name} describes {offset}")
        self._check_documents()

    def _check_documents(self) -> None:
        if self.entries[0] != 0 or self.entries[-1] != self.sequences:
            span = f"documents span sequences {self.entries[0]} to {self.entries[-1]}"
            raise UserError(f"{self._idx} is damaged: {span}, not 0 to {self.sequences}")
        for first in range(0, self.documents, _CHUNK):
            entries = self.entries[first : first + _CHUNK + 1]
            if (entries[1:] < entries[:-1]).any():
                raise UserError(f"{self._idx} is damaged: its documents are not in order")


class IndexedWriter:
    """Writes PREFIX.bin and PREFIX.idx; both appear, whole, when the `with` block ends without an exception.

    Documents longer than `max_sequence` tokens (lengths are 32-bit) become several sequences of one document.
    With `coding`, how the tokens were made, a PREFIX.meta.json with the checksums appears too. Raises OSError.
    """

    def __init__(
        self, prefix: str, dtype: np.dtype, max_sequence: int = 2**31 - 1, coding: Coding | None = None
    ) -> None:
        self.prefix = token_prefix(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.documents = self.tokens = self.left_out = 0
        self.largest = -1
        self._coding, self._max_sequence = coding, max_sequence
        self._code = _CODES[self.dtype]
        self._lengths, self._entries = array("i"), array("q", [0])
        self._checksums: list[int] = []
        self._block = self._block_crc32 = 0
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self.prefix)
        # A name of its own, so that two writers of one prefix cannot mix: the last one to finish wins.
        self._temporary = f"{self.prefix}.{uuid.uuid4().hex[:12]}.tmp"
        self._file = open_locked(self._temporary + ".bin")

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, token ids [n]. Raises ValueError for ids outside the file's type."""
        if tokens.dtype != self.dtype:
            info = np.iinfo(self.dtype)
            if tokens.size and (tokens.min() < info.min or tokens.max() > info.max):
                raise ValueError(f"token ids {tokens.min()} to {tokens.max()} do not fit {self.dtype.name}")
            tokens = tokens.astype(self.dtype)
        data = np.ascontiguousarray(tokens).data.cast("B") if tokens.size else memoryview(b"")
        self._file.write(data)
        self._count(data)
        for start in range(0, max(tokens.size, 1), self._max_sequence):
            self._lengths.append(min(self._max_sequence, tokens.size - start))
        self._entries.append(len(self._lengths))
        self.documents += 1
        self.tokens += tokens.size
        if tokens.size and tokens.dtype.kind != "f":
            self.largest = max(self.largest, int(tokens.max()))

    def _count(self, data: memoryview) -> None:
        """Add to the checksums of the blocks that `data` falls into."""
        at = 0
        while at < len(data):
            part = data[at : at + BLOCK_BYTES - self._block]
            self._block_crc32 = zlib.crc32(part, self._block_crc32)
            self._block += len(part)
            at += len(part)
            if self._block == BLOCK_BYTES:
                self._checksums.append(self._block_crc32)
                self._block = self._block_crc32 = 0

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            # Closing writes what is buffered, which fails once more on a full disk.
            with contextlib.suppress(OSError):
                self._file.close()
            for suffix in SUFFIXES:
                Path(self._temporary + suffix).unlink(missing_ok=True)

    def _publish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        lengths = np.frombuffer(self._lengths, np.int32) if self._lengths else np.empty(0, np.int32)
        ends = np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
        index = b"".join(
            (
                _HEADER.pack(MAGIC, 1, self._code, len(lengths), len(self._entries)),
                lengths.astype("<i4").tobytes(),
                (ends - lengths * np.int64(self.dtype.itemsize)).astype("<i8").tobytes(),
                np.frombuffer(self._entries, np.int64).astype("<i8").tobytes(),
            )
        )
        _write(self._temporary + ".idx", index)
        if self._coding is not None:
            _write(self._temporary + META_SUFFIX, self._meta(self._coding, index).to_json().encode())
        with folder_lock(Path(self.prefix).parent):
            # The index makes the files complete: an old one must not describe new tokens even for a moment.
            for suffix in (".idx", META_SUFFIX):
                Path(self.prefix + suffix).unlink(missing_ok=True)
            os.replace(self._temporary + ".bin", self.prefix + ".bin")
            if self._coding is not None:
                os.replace(self._temporary + META_SUFFIX, self.prefix + META_SUFFIX)
            os.replace(self._temporary + ".idx", self.prefix + ".idx")

    def _meta(self, coding: Coding, index: bytes) -> TokenMeta:
        return TokenMeta(
            coding=coding,
            documents=self.documents,
            tokens=self.tokens,
            largest=self.largest,
            left_out=self.left_out,
            bin_bytes=self.tokens * self.dtype.itemsize,
            bin_crc32=(*self._checksums, *([self._block_crc32] if self._block else [])),
            idx_bytes=len(index),
            idx_crc32=zlib.crc32(index),
        )


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
