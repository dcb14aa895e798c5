"""Documents to tokens, in one process or several."""

from __future__ import annotations

import functools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np

from ...configs.errors import Problem, UserError
from ...configs.schema import TokenizerConfig
from ..metrics.notices import ProgressLine
from .documents import Document
from .indexed import IndexedWriter
from .tokenizer import Tokenizer, make_tokenizer

_BATCH_CHARS = 1 << 20
_THREADS = 2
"""One in the package, one in Python."""


def write_documents(
    writer: IndexedWriter,
    tokenizer: Tokenizer,
    documents: Iterable[Document],
    progress: ProgressLine,
    *,
    append_eod: bool = True,
    workers: int = 1,
) -> None:
    """Tokenize `documents` in batches of about a million characters and add each, with its end token, to writer.

    `workers` processes share the batches; what is written is the same for any number of them.
    """
    end = np.array([tokenizer.eod] if append_eod else [], writer.dtype)
    for size, encoded in _encode_all(_batches(documents), tokenizer, workers):
        for tokens in encoded:
            writer.add(np.concatenate((tokens.astype(writer.dtype, copy=False), end)))
        progress.advance(size)


def _encode_all(
    batches: Iterator[list[Document]], tokenizer: Tokenizer, workers: int
) -> Iterator[tuple[float, list[np.ndarray]]]:
    """Input bytes and tokens of each batch, in order."""
    if workers <= 1:
        # Threads: the package's own encode one batch while this process reads, converts and writes others.
        with ThreadPoolExecutor(_THREADS, "tokenize") as threads:
            yield from _in_order(batches, threads, tokenizer.encode_batch, 2 * _THREADS)
        return
    # Forked, before this process has threads of its own: spawning runs the main module again, and the scripts that
    # installers write for commands do not guard theirs against that.
    pool = ProcessPoolExecutor(workers, get_context("fork"), initializer=_start, initargs=(os.getpid(),))
    try:
        yield from _in_order(batches, pool, functools.partial(_encode, tokenizer.cfg), 2 * workers)
    except BrokenProcessPool:
        message = f"one of {workers} worker processes was ended (out of memory?); use fewer"
        raise UserError(Problem("--workers", message)) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    batches: Iterator[list[Document]], pool: Executor, encode: Callable[[list[str]], list[np.ndarray]], ahead: int
) -> Iterator[tuple[float, list[np.ndarray]]]:
    """Input bytes and tokens of each batch; at most `ahead` of them are in the pool at once."""
    waiting: deque[tuple[float, Future[list[np.ndarray]]]] = deque()
    try:
        for batch in batches:
            waiting.append((_size(batch), pool.submit(encode, [document.text for document in batch])))
            if len(waiting) >= ahead:
                size, result = waiting.popleft()
                yield size, result.result()
        while waiting:
            size, result = waiting.popleft()
            yield size, result.result()
    finally:
        for _, result in waiting:
            result.cancel()


def _encode(cfg: TokenizerConfig, texts: list[str]) -> list[np.ndarray]:
    # One text at a time: the workers share the cores already.
    tokenizer = _tokenizer(cfg)
    return [tokenizer.encode(text) for text in texts]


@functools.lru_cache(1)
def _tokenizer(cfg: TokenizerConfig) -> Tokenizer:
    return make_tokenizer(cfg)


def _start(parent: int) -> None:
    """In a worker: interrupts are the parent's business, and without the parent there is nothing to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    # Workers hold both ends of their queue, so that of a parent that was killed never ends for them.
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _size(batch: list[Document]) -> float:
    return sum(document.size for document in batch)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
