"""Documents to ids in any number of processes, in order and without holding the corpus in memory."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from hybrid_lm.data.text import Document
from hybrid_lm.data.tokenizer import Tokenizer, load_tokenizer

# Large enough that a hand-over to a process costs little beside encoding, small enough that all of them share
# the work.
BATCH_BYTES = 1_000_000
Encoded = list[tuple[np.ndarray, int, bytes]]
"""Ids, bytes of text and SHA-256 of each document of a batch."""
_tokenizer: Tokenizer | None = None


def encode_all(
    corpus: Iterable[Document], tokenizer: Tokenizer, saved: Path, workers: int
) -> Iterator[Encoded]:
    """Yields the batches of a corpus in its order; other processes read their tokenizer from `saved`.

    Raises ValueError with the document's name for a text that cannot be encoded, and if a process dies.
    """
    if workers == 1:
        yield from (_encode(tokenizer, batch) for batch in _batches(corpus))
        return
    # spawn: a forked child of a process with threads (torch, tokenizers) may hang.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_load, initargs=(saved,))
    waiting: deque = deque()
    try:
        # A window of tasks, because Executor.map would first read the whole corpus into memory.
        for batch in _batches(corpus):
            waiting.append(pool.submit(_encode_here, batch))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "preparing with several workers: one of them died (out of memory, or a script without "
            "`if __name__ == '__main__':`); workers=1 needs no processes"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def worker_count(n_bytes: int) -> int:
    """A process per core, but none that would start up for less than a few batches."""
    return min(os.cpu_count() or 1, 1 + n_bytes // (4 * BATCH_BYTES))


def _load(saved: Path) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(saved)


def _encode_here(batch: list[Document]) -> Encoded:
    assert _tokenizer is not None
    return _encode(_tokenizer, batch)


def _encode(tokenizer: Tokenizer, batch: list[Document]) -> Encoded:
    encoded = []
    for name, text in batch:
        data = text.encode("utf-8")
        try:
            ids = tokenizer.encode(text)
        except ValueError as error:
            raise ValueError(f"document {name}: {error}") from error
        encoded.append((ids, len(data), hashlib.sha256(data).digest()))
    return encoded


def _batches(corpus: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in corpus:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
