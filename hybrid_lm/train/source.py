"""Where a run's batches come from: text or a probe behind one face, a batch being a pure function of (seed,
step, micro).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hybrid_lm import probes
from hybrid_lm.config.schema import ProbeData, RunConfig, TextData
from hybrid_lm.data import IGNORE, Batch, Tokenizer, TokenStore, Windows, is_store, open_or_prepare

EVAL_SEED = 0
"""Held-out batches and test examples are the same for every run, so that runs can be compared."""


class Source(Protocol):
    """What the training loop asks of its data."""

    vocab_size: int
    seq_len: int
    """The longest sequence it gives, in tokens."""
    fingerprint: str
    """SHA-256 of what decides every training batch besides the seed, the step and the batch size."""
    tokenizer: Tokenizer | None
    bytes_per_token: float | None
    """Of the scored held-out tokens: text is judged in bits per byte. None: a probe, judged by accuracy."""

    def batch(self, step: int, micro: int) -> Batch:
        """The batch of one forward pass: optimizer step (from 0) and place in its accumulation (from 0)."""
        ...

    def eval_batches(self, n: int | None = None) -> Iterator[tuple[str, Batch]]:
        """Held-out batches with the name of their slice; n: at most so many of text, None: everything."""
        ...

    def describe(self) -> str:
        """One line for people."""
        ...


def open_source(
    config: RunConfig,
    workdir: str | Path,
    *,
    prepared: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """The data that `config.data` names.

    Text that is no token store becomes one at `workdir/data`, and is read from there if it is already there.
    `prepared`: a store at `workdir/data` is taken as it is, without a look at the text it came from (the run
    goes on with its own copy).

    Raises ValueError for data that cannot be used, naming the key; OSError for a disk that cannot be written.
    """
    if isinstance(config.data, ProbeData):
        return ProbeSource(config, config.data)
    folder = Path(workdir) / "data"
    if prepared and is_store(folder):
        store = TokenStore.open(folder)
    else:
        store = open_or_prepare(config.data, folder, progress=progress)
    return TextSource(config, config.data, store)


class TextSource:
    """Windows of a token store."""

    def __init__(self, config: RunConfig, data: TextData, store: TokenStore):
        self.store, self.data = store, data
        self.batch_size, self.accumulate = config.train.batch_size, config.train.accumulate
        self.vocab_size, self.seq_len = store.vocab_size, data.seq_len
        self.tokenizer: Tokenizer | None = store.tokenizer
        self.train = Windows(store.split("train"), data.seq_len, config.train.seed, data.packing)
        held_out = store.split("val")
        # A short held-out split still has one window; the training split must have one of full length.
        length = min(data.seq_len, held_out.n_tokens - 1)
        self.val = Windows(held_out, length, EVAL_SEED, data.packing)
        n_scored = held_out.n_tokens - 1 - held_out.n_documents
        if n_scored < 1:
            raise ValueError(f"data.path = {data.path}: the held-out documents have no text; use more text")
        self.bytes_per_token: float | None = held_out.n_bytes / n_scored
        self.fingerprint = digest(
            {"store": store.fingerprint, "seq_len": data.seq_len, "packing": data.packing}
        )

    def batch(self, step: int, micro: int) -> Batch:
        return self.train.batch(step * self.accumulate + micro, self.batch_size)

    def eval_batches(self, n: int | None = None) -> Iterator[tuple[str, Batch]]:
        """Batches of the held-out split: the same random windows each time, or all in order if n batches
        would hold them.
        """
        if n is None or n * self.batch_size >= self.val.n_windows:
            batches = self.val.eval_batches(self.batch_size)
        else:
            batches = (self.val.batch(i, self.batch_size) for i in range(n))
        for tokens, labels, doc_ids in batches:
            # Bits per byte are those of the text: the end of a document is no byte of it.
            labels = np.where(labels == self.val.split.eot_id, IGNORE, labels)
            yield "val", Batch(tokens, labels, doc_ids)

    def describe(self) -> str:
        train, val = self.train.split, self.val.split
        corpus, tokenizer = self.store.meta["corpus"]["source"], self.store.meta["tokenizer"]["name"]
        told = (
            f"{corpus}: {train.n_tokens:,} training tokens in {train.n_documents:,} documents, "
            f"{val.n_tokens:,} held out, tokenizer {tokenizer} ({self.vocab_size:,} entries)"
        )
        return "; ".join([told, *self.store.notes])


class ProbeSource:
    """Examples of a probe: settings drawn per batch in training, tested one after another."""

    tokenizer: Tokenizer | None = None
    bytes_per_token: float | None = None

    def __init__(self, config: RunConfig, data: ProbeData):
        self.data, self.seed = data, config.train.seed
        self.batch_size, self.accumulate = config.train.batch_size, config.train.accumulate
        self.train = [
            self._probe("train_params", setting) for setting in product("train_params", data.train_params)
        ]
        tests = product("test_params", data.test_params)
        self.test = {slice_name(setting): self._probe("test_params", setting) for setting in tests}
        every = [*self.train, *self.test.values()]
        self.vocab_size = max(probe.vocab_size for probe in every)
        self.seq_len = max(probe.generate(1, 0)[0].shape[1] for probe in every)
        self.fingerprint = digest([data.probe, [probe.params.model_dump() for probe in self.train]])

    def _probe(self, key: str, setting: dict[str, Any]) -> probes.Probe:
        try:
            return probes.get(self.data.probe, self.data.preset, **{**self.data.params, **setting})
        except ValueError as error:
            raise ValueError(f"data.{key} {setting}: {error}" if setting else f"data: {error}") from None

    def batch(self, step: int, micro: int) -> Batch:
        number = step * self.accumulate + micro
        # Philox by its key: the choice of one batch does not depend on how many were drawn before.
        choice = np.random.Generator(np.random.Philox(key=[self.seed % 2**64, number])).integers(
            len(self.train)
        )
        probe = self.train[int(choice)]
        return Batch(
            *probe.generate(self.batch_size, self.seed, "train", start=number * self.batch_size), None
        )

    def eval_batches(self, n: int | None = None) -> Iterator[tuple[str, Batch]]:
        """The `n_test` examples of every tested setting; n does not shorten them: a probe's test is small and
        fixed.
        """
        for name, probe in self.test.items():
            for start in range(0, self.data.n_test, self.batch_size):
                count = min(self.batch_size, self.data.n_test - start)
                yield name, Batch(*probe.generate(count, EVAL_SEED, "test", start=start), None)

    def describe(self) -> str:
        first = (
            self.train[0].describe()
            if len(self.train) == 1
            else f"{len(self.train)} settings of {self.data.probe}"
        )
        return f"{first}; {self.data.n_test} test examples in each of: {', '.join(self.test)}"


def product(key: str, lists: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Every combination of the listed values: `{a: [1, 2], b: [3]}` is a 1 b 3, then a 2 b 3."""
    empty = [name for name, values in lists.items() if not values]
    if empty:
        raise ValueError(f"data.{key}.{empty[0]} = []: at least one value is needed")
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def slice_name(setting: dict[str, Any]) -> str:
    """`n_pairs=8,seq_len=64`; `test` for the probe as it is configured."""
    return ",".join(f"{name}={value}" for name, value in setting.items()) or "test"


def digest(data: Any) -> str:
    """SHA-256 (hex) of plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
