"""Bits per byte and perplexity of held-out text, in the windows of lm-eval's rolling log-likelihood."""

from __future__ import annotations

import hashlib
import itertools
import lzma
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from hybrid_lm.data import IGNORE, Split, Tokenizer
from hybrid_lm.model.lm import HybridLM

Progress = Callable[[int, int], None]
"""Called with the tokens scored so far and the tokens to score."""


class Window(NamedTuple):
    """One forward pass over the stream EOT, token 1, ..., token n of a document."""

    begin: int
    """The model reads stream[begin : end]."""
    done: int
    """Tokens scored by the windows before."""
    end: int
    """Tokens scored after this one: it scores stream[done + 1 : end + 1]."""


def windows(n_tokens: int, seq_len: int, stride: int) -> Iterator[Window]:
    """The windows that score each token of a document of `n_tokens` exactly once.

    The first scores min(seq_len, n) tokens; each one after it scores the next `stride` (the last: what is
    left) and reads the `seq_len` tokens before the last one that it scores. So every token has all tokens
    before it in its document as context, the EOT included, or at least seq_len - stride + 1 of them. These
    are lm-eval's `get_rolling_token_windows` with max_seq_len = seq_len and context_len = seq_len - stride +
    1; its tasks use stride = seq_len.
    """
    done = 0
    while done < n_tokens:
        end = min(n_tokens, done + (stride if done else seq_len))
        yield Window(max(0, end - seq_len), done, end)
        done = end


class DocumentScore(NamedTuple):
    """One document: what a paired comparison of two models needs."""

    hash: str
    """First 16 hexadecimal digits of the SHA-256 of its UTF-8 text."""
    nll: float
    """Nats."""
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class LanguageResult:
    """How well a model predicts some documents. The end-of-text token is context, and never scored."""

    nll_nats: float
    """Sum over all scored tokens."""
    n_tokens: int
    n_bytes: int
    """Bytes of UTF-8 text."""
    seq_len: int
    stride: int
    by_position: list[float | None]
    """Mean nats at each place of a window: entry i is over tokens with i + 1 tokens of context (EOT too)."""
    documents: list[DocumentScore]

    @property
    def bits_per_byte(self) -> float:
        """Independent of the tokenizer, comparable with a compressor's."""
        return self.nll_nats / self.n_bytes / math.log(2)

    @property
    def perplexity(self) -> float:
        """exp(mean nats per token); comparable only between models with the same tokenizer."""
        mean = self.nll_nats / self.n_tokens
        return math.exp(mean) if mean < 700 else math.inf

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return asdict(self) | {"bits_per_byte": self.bits_per_byte, "perplexity": self.perplexity}


def evaluate_text(
    model: HybridLM,
    documents: Iterable[str] | Split,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> LanguageResult:
    """Scores documents, each on its own, after an end-of-text token.

    Args:
        documents: texts, or a split of a token store. Its bits are per byte of the text that it was made
            from, which for a tokenizer that does not keep every character is not what it decodes to.
        seq_len: tokens that the model reads at a time.
        stride: see `windows`; by default seq_len, as lm-eval has it. Smaller gives more context and costs
            more passes.
        batch_size: windows per forward pass; changes speed, not results.

    Raises:
        ValueError: for a stride outside 1..seq_len, a batch_size below 1, no text, and a length that the
            model's positions do not allow.
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ValueError(f"stride {stride}: must be between 1 and seq_len {seq_len}")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: must be at least 1")
    streams, names, n_bytes = _streams(documents, tokenizer)
    todo = [(row, window) for row, s in enumerate(streams) for window in windows(len(s) - 1, seq_len, stride)]
    if not todo:
        raise ValueError("no text to score: every document is empty")
    # Windows of like length share a batch; the longest come first, so that too little memory shows at once.
    todo.sort(key=lambda item: item[1].begin - item[1].end)
    total, scored = sum(len(s) - 1 for s in streams), 0
    nll = np.zeros(len(streams))
    place_nll, place_count = np.zeros(seq_len), np.zeros(seq_len, dtype=np.int64)
    with evaluating(model):
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            tokens, labels = _pack(streams, batch, tokenizer.eot_id)
            losses = _losses(model, tokens, labels)
            np.add.at(nll, [row for row, _ in batch], losses.sum(1))
            width = losses.shape[1]
            place_nll[:width] += losses.sum(0)
            place_count[:width] += (labels != IGNORE).sum(0)
            scored += sum(window.end - window.done for _, window in batch)
            if progress is not None:
                progress(scored, total)
    assert scored == total == place_count.sum(), "every token is scored once"
    scores = [
        DocumentScore(name, float(x), len(s) - 1, size)
        for name, x, s, size in zip(names, nll, streams, n_bytes, strict=True)
        if len(s) > 1
    ]
    places = [float(x / n) if n else None for x, n in zip(place_nll, place_count, strict=True)]
    return LanguageResult(float(nll.sum()), total, sum(n_bytes), seq_len, stride, places, scores)


@contextmanager
def evaluating(model: HybridLM) -> Iterator[None]:
    """No dropout and no gradients inside; the model's mode as before after it."""
    was = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was)


def text_hash(text: str) -> str:
    """Names a document in a comparison."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def held_out(split: Split, tokenizer: Tokenizer, max_bytes: int | None = None) -> Split:
    """Whole documents of a split in the order of their text's hash, until they hold `max_bytes` (at least
    one).

    The order is arbitrary but fixed: a part of it is a fair sample of the split and the same for every model.
    """
    hashes = [text_hash(tokenizer.decode(tokens)) for tokens in split.documents()]
    rows, size = [], 0
    for row in sorted(range(len(hashes)), key=hashes.__getitem__):
        if max_bytes is not None and size >= max_bytes:
            break
        rows.append(row)
        size += int(split.doc_bytes[row])
    return split.chosen(rows)


def texts_of(split: Split, tokenizer: Tokenizer) -> list[str]:
    """The documents as text: the original but for what the tokenizer does not keep (some collapse blanks)."""
    return [tokenizer.decode(tokens) for tokens in split.documents()]


def compression_baselines(documents: Iterable[str]) -> dict[str, float]:
    """Bits per byte of general compressors on the same documents, joined in their order into one stream.

    They see no other text: a model that was trained on like documents should beat them, an untrained one
    cannot.
    """
    data = "".join(documents).encode()
    sizes = {
        "zlib -9": len(zlib.compress(data, 9)),
        "lzma": len(lzma.compress(data, format=lzma.FORMAT_ALONE, preset=9 | lzma.PRESET_EXTREME)),
    }
    return {name: 8 * size / len(data) for name, size in sizes.items()}


def _streams(
    documents: Iterable[str] | Split, tokenizer: Tokenizer
) -> tuple[list[np.ndarray], list[str], list[int]]:
    """The stream, the hash and the bytes of each document."""
    if isinstance(documents, Split):
        starts = [*documents.starts, len(documents.tokens) - 1]
        streams = [documents.tokens[a:b] for a, b in itertools.pairwise(starts)]
        return streams, [text_hash(tokenizer.decode(s[1:])) for s in streams], documents.doc_bytes.tolist()
    texts = list(documents)
    eot = np.array([tokenizer.eot_id], dtype=np.int64)
    streams = [np.concatenate([eot, tokenizer.encode(text)]) for text in texts]
    return streams, [text_hash(text) for text in texts], [len(text.encode()) for text in texts]


def _pack(
    streams: Sequence[np.ndarray], batch: Sequence[tuple[int, Window]], filler: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (b t) of some windows; models are causal, so filler on the right changes nothing."""
    width = max(window.end - window.begin for _, window in batch)
    tokens = np.full((len(batch), width), filler, dtype=np.int64)
    labels = np.full((len(batch), width), IGNORE, dtype=np.int64)
    for i, (row, (begin, done, end)) in enumerate(batch):
        tokens[i, : end - begin] = streams[row][begin:end]
        labels[i, done - begin : end - begin] = streams[row][done + 1 : end + 1]
    return tokens, labels


def _losses(model: HybridLM, tokens: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Nats (b t), float64."""
    device = model.head_weight.device
    loss = model.token_loss(torch.from_numpy(tokens).to(device), torch.from_numpy(labels).to(device))
    return loss.nll.cpu().double().numpy()
