"""Training windows as a pure function of (seed, step).

The state of the data is one integer, and it means the same on any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import numpy as np

from hybrid_lm.data.batch import IGNORE, Batch
from hybrid_lm.data.store import Split

ROUNDS = 6


class Windows:
    """The non-overlapping windows of a split, each once per epoch, in a new order every epoch.

    A window is `seq_len` tokens of the stream with the stream's next token as the label of each, so every
    label of the stream is scored at most once per epoch. A document begins with its EOT; its last token
    predicts the EOT that follows. packing: `isolate` numbers the documents of a window 1, 2, ...; `concat`
    gives no doc_ids.

    Raises ValueError if the split is shorter than one window.
    """

    def __init__(
        self, split: Split, seq_len: int, seed: int = 0, packing: Literal["isolate", "concat"] = "isolate"
    ):
        self.split, self.seq_len, self.seed, self.packing = split, seq_len, seed, packing
        # The last token of the stream is only ever a label.
        self.n_inputs = len(split.tokens) - 1
        self.n_windows = self.n_inputs // seq_len
        if self.n_windows == 0:
            raise ValueError(
                f"split {split.name}: {self.n_inputs} tokens are less than one window of "
                f"data.seq_len = {seq_len}; use a seq_len of at most {self.n_inputs}, or more text"
            )

    def batch(self, step: int, batch_size: int) -> Batch:
        """The batch of a step: tokens (b t), the same whatever was asked for before."""
        return self.samples(step * batch_size, batch_size)

    def samples(self, first: int, count: int) -> Batch:
        """Samples first .. first + count - 1 of the endless sequence that `batch` cuts up: one rank's share
        of a step.
        """
        number = np.arange(first, first + count, dtype=np.uint64)
        windows = permute(number % self.n_windows, self.n_windows, self.seed, number // self.n_windows)
        places = windows.astype(np.int64)[:, None] * self.seq_len + np.arange(self.seq_len + 1)
        stream = self.split.tokens[places].astype(np.int64)  # (b t+1)
        tokens = np.ascontiguousarray(stream[:, :-1])
        return Batch(tokens, np.ascontiguousarray(stream[:, 1:]), self._doc_ids(tokens))

    def eval_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every label of the split once and in order; the last batch may have fewer rows, the last row ends
        in padding.
        """
        n_rows = -(-self.n_inputs // self.seq_len)
        for row in range(0, n_rows, batch_size):
            rows = min(batch_size, n_rows - row)
            begin, size = row * self.seq_len, rows * self.seq_len
            stream = self.split.tokens[begin : begin + size + 1].astype(np.int64)
            n_real = len(stream) - 1
            tokens = np.full(size, self.split.pad_id, dtype=np.int64)
            labels = np.full(size, IGNORE, dtype=np.int64)
            tokens[:n_real], labels[:n_real] = stream[:-1], stream[1:]
            tokens, labels = tokens.reshape(rows, -1), labels.reshape(rows, -1)
            doc_ids = self._doc_ids(tokens)
            if doc_ids is not None:
                doc_ids.reshape(-1)[n_real:] = 0
            yield Batch(tokens, labels, doc_ids)

    def _doc_ids(self, tokens: np.ndarray) -> np.ndarray | None:
        if self.packing == "concat":
            return None
        # No text contains the EOT (see data.tokenizer), so each one in the stream opens a document.
        opens = tokens == self.split.eot_id
        opens[:, 0] = True
        return np.cumsum(opens, axis=1, dtype=np.int32)


def permute(index: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where a pseudo-random permutation of 0..n-1 sends each index, without a table.

    index, epoch: uint64 arrays of one shape. A balanced Feistel network (Luby & Rackoff 1988) permutes the
    smallest square domain of bits that holds n; an index that lands outside of 0..n-1 walks on until it is
    inside, which keeps the map a bijection (cycle walking: Black & Rogaway 2002).
    """
    half = np.uint64(max(1, -(-(n - 1).bit_length() // 2)))
    mask = np.uint64((1 << int(half)) - 1)
    key = mix(mix(np.full_like(index, seed % 2**64)) ^ epoch)
    out = index.copy()
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = out[outside] >> half, out[outside] & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (mix(right + mix(key[outside] + np.uint64(turn))) & mask)
        out[outside] = left << half | right
        outside = out >= n
    return out


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every input bit reaches every output bit (SplitMix64, Steele 2014).

    Probes have their own: neither package imports the other, and neither may change its numbers.
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
