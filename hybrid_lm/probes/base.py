"""The contract of a probe, and random numbers that are the same everywhere.

A probe is a pure function from parameters, seed, split and example number to an example. Reference suites
draw from global generators, so that one seed gives different data in different processes; here an example has
its own key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ValidationError

from hybrid_lm.config.base import Config
from hybrid_lm.registry import unknown

IGNORE = -100
"""The label of a position that is not scored, PyTorch's default `ignore_index`."""
CHUNK = 1024
"""Examples made at a time, so that memory does not grow with the number asked for."""
GOLDEN = np.uint64(0x9E3779B97F4A7C15)

SplitName = Literal["train", "test"]


class Probe(ABC):
    """A task with known answers; `get` in this package builds one."""

    name: ClassVar[str]
    Params: ClassVar[type[Config]]
    """What may be set, with meanings."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    """paper: a published setting; small: minutes on a CPU; ci: seconds."""

    params: Any
    """An instance of `Params`."""
    vocab_size: int
    """Tokens are 0 .. vocab_size - 1."""
    chance: float
    """Accuracy of a uniform guess among the tokens that can be an answer."""
    plateau: float
    """Accuracy of the best model that does not recall: where training rests before the mechanism forms."""

    def __init__(self, params: Config):
        self.params = params

    @classmethod
    def build(cls, preset: str = "small", **params: Any) -> Probe:
        """A preset with some values replaced; ValueError names the parameter and the fault."""
        if preset not in cls.PRESETS:
            raise ValueError(f"probe {cls.name}: {unknown('preset', preset, cls.PRESETS)}")
        for key in params:
            if key not in cls.Params.model_fields:
                raise ValueError(f"probe {cls.name}: {unknown('parameter', key, cls.Params.model_fields)}")
        try:
            return cls(cls.Params(**{**cls.PRESETS[preset], **params}))
        except ValidationError as error:
            faults = [
                f"{fault['loc'][0]} = {fault['input']!r}: {fault['msg']}"
                if fault["loc"]
                else fault["msg"].removeprefix("Value error, ")
                for fault in error.errors()
            ]
            raise ValueError(f"probe {cls.name}: {'; '.join(faults)}") from None

    def generate(
        self, n: int, seed: int, split: SplitName = "train", *, start: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Examples start .. start + n - 1 of a split: tokens and labels, int64 (n t).

        `labels[i, j]` is the token to predict after reading `tokens[i, : j + 1]`, or -100. An example depends
        on (params, seed, split, its number) alone; no example of `train` is one of `test`, whatever the
        seeds.
        """
        assert split in ("train", "test"), split
        parts = [
            self.examples(example_keys(seed, split, first, min(CHUNK, start + n - first)), split)
            for first in range(start, start + n, CHUNK)
        ]
        if not parts:
            return np.empty((0, self.seq_len), np.int64), np.empty((0, self.seq_len), np.int64)
        return np.concatenate([tokens for tokens, _ in parts]), np.concatenate(
            [labels for _, labels in parts]
        )

    @property
    @abstractmethod
    def seq_len(self) -> int:
        """Tokens in an example."""

    @abstractmethod
    def examples(self, keys: np.ndarray, split: SplitName) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 (n t), of the examples with these keys, uint64 (n)."""

    @abstractmethod
    def oracle(self, tokens: np.ndarray) -> np.ndarray:
        """Labels (n t) from tokens (n t) alone: right at every scored position."""

    def describe(self) -> str:
        """One line: what this probe is, its size, its floors."""
        values = ", ".join(f"{key} {value}" for key, value in self.params.model_dump().items())
        return f"{self.name}: {values}; chance {self.chance:.4f}, plateau {self.plateau:.4f}"

    def pretty(self, tokens: np.ndarray, labels: np.ndarray, columns: int = 16) -> str:
        """One example as text, (t) and (t): tokens, and under each its label or a dot."""
        width = len(str(self.vocab_size - 1))
        lines = []
        for row in range(0, len(tokens), columns):
            below = ["." if label == IGNORE else str(label) for label in labels[row : row + columns]]
            lines.append("tokens " + " ".join(f"{token:>{width}}" for token in tokens[row : row + columns]))
            lines.append("labels " + " ".join(f"{label:>{width}}" for label in below))
        return "\n".join(lines)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of 64 bits in which every input bit reaches every output bit (SplitMix64, Steele 2014).

    The sampler of text has its own: neither package imports the other, and neither may change its numbers.
    """
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def example_keys(seed: int, split: SplitName, start: int, n: int) -> np.ndarray:
    """The keys (n) uint64 of examples start .. start + n - 1: for one seed, all keys of both splits
    differ.
    """
    number = np.arange(start, start + n, dtype=np.uint64) * np.uint64(2) + np.uint64(split == "test")
    return mix(mix(np.array([seed % 2**64], dtype=np.uint64) + GOLDEN) + number * GOLDEN)


def words(keys: np.ndarray, purpose: int, n: int) -> np.ndarray:
    """Random uint64 (keys n): one independent stream for each key and purpose, in integers only."""
    stream = mix(keys + np.uint64(purpose + 1))
    return mix(stream[:, None] + np.arange(1, n + 1, dtype=np.uint64) * GOLDEN)


def uniform(word: np.ndarray) -> np.ndarray:
    """Words as float64 strictly between 0 and 1: the middles of 2^53 equal parts."""
    return ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
