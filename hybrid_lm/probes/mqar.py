"""Multi-query associative recall: `k1 v1 k2 v2 ... then k2 again: which value?`

Arora et al. 2023, arXiv:2312.04927 (Zoology), in the semantics of its published generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from hybrid_lm.config.base import Config, Positive
from hybrid_lm.probes.base import IGNORE, Probe, SplitName, mix, uniform, words

KEYS, VALUES, SLOTS, FILLER, FIRST = range(5)
FIRST_TRIES = 64


class MQARParams(Config):
    """The size of an MQAR example."""

    vocab_size: Positive = 8192
    """Tokens; keys are in 1 .. V/2 - 1, values in V/2 .. V - 1, 0 is the filler. More than `seq_len`."""
    seq_len: Positive = 64
    """Tokens in an example, an even number, at least four per pair."""
    n_pairs: Positive = 8
    """Pairs of key and value, each asked for once."""
    power_a: Annotated[float, Field(gt=0.0)] = 0.01
    """Queries fall on slot g after the pairs with weight (g+1)^(a-1): 1 is uniform, 0.01 early."""
    filler: Literal["zero", "random", "random_disjoint"] = "zero"
    """Tokens between queries: 0; any token, which may be a live key; any but the example's keys and
    values.
    """

    @model_validator(mode="after")
    def _sizes(self) -> MQARParams:
        if self.seq_len % 2:
            raise ValueError(
                f"seq_len = {self.seq_len}: it must be even, queries stand at every second place"
            )
        if 4 * self.n_pairs > self.seq_len:
            raise ValueError(
                f"n_pairs = {self.n_pairs}: seq_len = {self.seq_len} has room for {self.seq_len // 4}; "
                "pairs and queries take 4 tokens each"
            )
        if self.vocab_size <= self.seq_len:
            raise ValueError(
                f"vocab_size = {self.vocab_size}: it must be larger than seq_len = {self.seq_len}"
            )
        return self


class MQAR(Probe):
    """Pairs, then queries: the label stands on the query token itself and the value is not written after it.

    Keys and values are uniform without replacement. Query slots are drawn one after another without
    replacement with p(g) proportional to (g+1)^(a-1), and the i-th drawn goes to the i-th key. With four
    tokens per pair every slot is taken and `power_a` only orders them.

    What keeps train and test apart: the first pair of an example is drawn from one half of all (key, value)
    pairs for train, from the other for test, the halves fixed by a hash. Later pairs are free. This is the
    one difference from the published generator.
    """

    name = "mqar"
    Params = MQARParams
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Zoology figure 2, first cell: 100,000 examples, two layers without MLP, d 64 to 512.
        "paper": {"vocab_size": 8192, "seq_len": 64, "n_pairs": 4},
        "small": {"vocab_size": 256, "seq_len": 64, "n_pairs": 16},
        "ci": {"vocab_size": 256, "seq_len": 32, "n_pairs": 8},
    }
    params: MQARParams

    def __init__(self, params: MQARParams):
        super().__init__(params)
        self.vocab_size = params.vocab_size
        self.first_value = params.vocab_size // 2
        self.n_keys, self.n_values = self.first_value - 1, params.vocab_size - self.first_value
        self.chance = 1 / self.n_values
        # "Say one of this context's values": attention without recall stays exactly here.
        self.plateau = 1 / params.n_pairs
        n_slots = params.seq_len // 2 - params.n_pairs
        self._slowness = np.arange(1, n_slots + 1, dtype=np.float64) ** (1.0 - params.power_a)

    @property
    def seq_len(self) -> int:
        return self.params.seq_len

    def examples(self, keys: np.ndarray, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        n, pairs, context = len(keys), self.params.n_pairs, 2 * self.params.n_pairs
        first_key, first_value = self._first_pair(keys, split)
        asked = 1 + draw(words(keys, KEYS, pairs), self.n_keys, first_key)
        answers = self.first_value + draw(words(keys, VALUES, pairs), self.n_values, first_value)
        places = context + 2 * self._slots(keys)

        tokens = np.zeros((n, self.seq_len), dtype=np.int64)
        labels = np.full((n, self.seq_len), IGNORE, dtype=np.int64)
        tokens[:, 0:context:2], tokens[:, 1:context:2] = asked, answers
        np.put_along_axis(tokens, places, asked, axis=1)
        np.put_along_axis(labels, places, answers, axis=1)
        if self.params.filler != "zero":
            tokens = np.where(tokens == 0, self._filler(keys, tokens[:, :context]), tokens)
        return tokens, labels

    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        """Exactly the labels for filler `zero` and `random_disjoint`.

        `random` filler may put a live key where a query could stand; the oracle answers there too, as a model
        must.
        """
        context = 2 * self.params.n_pairs
        value_of = np.full((len(tokens), self.vocab_size), IGNORE, dtype=np.int64)
        np.put_along_axis(value_of, tokens[:, 0:context:2], tokens[:, 1:context:2], axis=1)
        labels = np.full_like(tokens, IGNORE)
        labels[:, context::2] = np.take_along_axis(value_of, tokens[:, context::2], axis=1)
        return labels

    def _first_pair(self, keys: np.ndarray, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        """Key and value index (n) of the first pair, uniform in the split's half of all pairs."""
        tries = words(keys, FIRST, FIRST_TRIES) % np.uint64(self.n_keys * self.n_values)
        ours = (mix(mix(tries + np.uint64(1))) & np.uint64(1)) == np.uint64(split == "test")
        assert ours.any(axis=1).all(), "2^-64 per example"
        pair = tries[np.arange(len(keys)), ours.argmax(axis=1)].astype(np.int64)
        return np.divmod(pair, self.n_values)

    def _slots(self, keys: np.ndarray) -> np.ndarray:
        """Query slots (n pairs) by an exponential race. Efraimidis & Spirakis 2006.

        The order of arrival of clocks with rates w is a draw without replacement with weights w. The
        logarithm is the one step that is not integer: its last bit, which may differ between machines,
        decides only between two clocks that agree in about 50 bits.
        """
        times = -np.log(uniform(words(keys, SLOTS, len(self._slowness)))) * self._slowness
        return np.argsort(times, axis=1, kind="stable")[:, : self.params.n_pairs]

    def _filler(self, keys: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Random tokens (n t); `random_disjoint`: none of the row's context (n 2*pairs)."""
        word = words(keys, FILLER, self.seq_len)
        if self.params.filler == "random":
            return (word % np.uint64(self.vocab_size)).astype(np.int64)
        n_live = context.shape[1]
        rank = (word % np.uint64(self.vocab_size - n_live)).astype(np.int64)
        # The r-th token that is not live is r plus the number of live tokens below it; live token i of the
        # sorted row is below it if live[i] - i <= r. A large step per row turns all rows into one sorted
        # array.
        step = (np.arange(len(keys)) * (self.vocab_size + 1))[:, None]
        thresholds = np.sort(context, axis=1) - np.arange(n_live) + step
        before = np.searchsorted(thresholds.ravel(), (rank + step).ravel(), side="right").reshape(rank.shape)
        return rank + before - n_live * np.arange(len(keys))[:, None]


def draw(word: np.ndarray, n: int, first: np.ndarray) -> np.ndarray:
    """Draws (b k) of 0..n-1 without replacement, the first one given (b): Fisher and Yates' shuffle, stopped
    after k.

    The words' modulo favours small numbers by less than n / 2^64.
    """
    b, k = word.shape
    pool = np.tile(np.arange(n), (b, 1))
    rows = np.arange(b)
    left = np.arange(n, n - k, -1, dtype=np.uint64)
    picks = (word % left).astype(np.int64) + np.arange(k)
    picks[:, 0] = first
    for i in range(k):
        pick = picks[:, i]
        pool[:, i], pool[rows, pick] = pool[rows, pick], pool[:, i].copy()
    return pool[:, :k]
