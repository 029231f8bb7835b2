"""Recall rows: a model that knows the answers, one that guesses, intervals, and memory counted two ways."""

import math

import numpy as np
import pytest
import torch

from hybrid_lm import probes
from hybrid_lm.config.schema import ModelConfig, ProbeData
from hybrid_lm.data import IGNORE
from hybrid_lm.eval.probe import evaluate_probe, measured_bytes, score, wilson, zoology_bytes
from hybrid_lm.model.build import build_model

DATA = ProbeData.model_validate(
    {"kind": "probe", "probe": "mqar", "preset": "ci", "test_params": {"n_pairs": [2, 4]}, "n_test": 50}
)


def config(pattern, **layers):
    return ModelConfig.model_validate(
        {"d_model": 32, "pattern": pattern, "layers": layers, "vocab_size": 256}
    )


MODEL = build_model(
    config("m a", m={"type": "mamba2", "d_state": 8, "head_dim": 16}, a={"type": "attention"})
)


class Oracle(torch.nn.Module):
    """Stands in for a model: one-hot logits of the right answer, wrong where `spoil` says so."""

    def __init__(self, probe, spoil=0):
        super().__init__()
        self.probe, self.spoil = probe, spoil
        self.head_weight = torch.nn.Parameter(torch.zeros(1))

    def features(self, tokens):
        labels = self.probe.oracle(tokens.numpy())
        labels[: self.spoil] = 0
        return torch.nn.functional.one_hot(torch.from_numpy(labels).clamp(min=0), 256) * 100.0, None

    def logits(self, x):
        return x


def test_an_oracle_is_right_and_a_spoiled_one_as_wrong_as_it_was_spoiled():
    probe = probes.get("mqar", "ci", n_pairs=4)
    tokens, labels = probe.generate(30, 0, "test")
    correct, nll = score(Oracle(probe), tokens, labels, batch_size=30)
    assert (correct == 4).all()
    assert nll.max() == pytest.approx(0.0, abs=1e-30)
    correct, nll = score(Oracle(probe, spoil=12), tokens, labels, batch_size=30)
    assert (correct[:12] == 0).all()
    assert (correct[12:] == 4).all()
    # Four answers, each with a logit 100 below the one of the wrong answer.
    assert nll[:12] == pytest.approx(400.0)


def test_scores_equal_those_of_all_logits():
    tokens, labels = probes.get("mqar", "ci").generate(20, 0, "test")
    logits = MODEL(torch.from_numpy(tokens)).logits
    scored = labels != IGNORE
    right = (logits.argmax(-1).numpy() == labels) & scored
    nll = -logits.log_softmax(-1).gather(-1, torch.from_numpy(labels).clamp(min=0)[..., None])[..., 0]
    correct, found = score(MODEL, tokens, labels, batch_size=7)
    assert (correct == right.sum(1)).all()
    # Each of the 8 losses, about 5.5, is rounded to float32.
    assert found == pytest.approx(
        (nll.detach().numpy() * scored).sum(1), rel=8 * torch.finfo(torch.float32).eps
    )


def test_rows_say_what_was_tested():
    rows = evaluate_probe(MODEL, DATA, batch_size=16)
    assert [row["setting"] for row in rows] == [{"n_pairs": 2}, {"n_pairs": 4}]
    for row, pairs in zip(rows, (2, 4), strict=True):
        assert row["n_sequences"] == 50
        assert row["n_scored"] == 50 * pairs == sum(row["scored"])
        assert row["accuracy"] == sum(row["correct"]) / row["n_scored"]
        assert row["low"] <= row["accuracy"] <= row["high"]
        assert row["plateau"] == 1 / pairs
        assert row["chance"] == 1 / 128
        # Untrained, with tied embeddings of size 0.02 behind a norm: near a uniform guess.
        assert abs(row["loss"] - math.log(256)) < 0.2
    hashes = [row["data_hash"] for row in rows]
    assert hashes == [row["data_hash"] for row in evaluate_probe(MODEL, DATA)]
    assert not {*hashes} & {row["data_hash"] for row in evaluate_probe(MODEL, DATA, seed=5)}


def test_a_vocabulary_that_is_too_small_is_refused():
    data = DATA.model_copy(update={"params": {"vocab_size": 300}})
    with pytest.raises(ValueError, match="probe mqar has 300 tokens, but the model knows 256"):
        evaluate_probe(MODEL, data)


def test_wilson_on_published_and_limiting_values():
    # One token per sequence is the plain interval; 15 of 50: 0.1910, 0.4375 (Wilson's formula by hand).
    ones = np.ones(50, dtype=int)
    right = (np.arange(50) < 15).astype(int)
    z, n, p = 1.959964, 50, 0.3
    # With n sequences of one token the design effect is n / (n - 1), which is clipped to the n sequences.
    expected = [
        (p + z * z / (2 * n) + s * z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))) / (1 + z * z / n)
        for s in (-1, 1)
    ]
    assert wilson(right, ones) == pytest.approx(expected, abs=1e-12)
    assert wilson(right, ones) == pytest.approx((0.191, 0.4375), abs=1e-3)
    # Eight tokens that stand and fall together are worth one.
    assert wilson(8 * right, 8 * ones) == pytest.approx(expected, abs=1e-12)
    # Sequences that all have half of theirs right: every token counts.
    low, high = wilson(np.full(50, 4), np.full(50, 8))
    assert high - low < 0.1
    assert wilson(8 * ones, 8 * ones)[0] == pytest.approx(50 / (50 + z * z))
    assert wilson(0 * ones, ones)[0] == 0.0


def test_wilson_covers_what_it_says():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        # Half of the variance is between sequences.
        skill = rng.beta(1.2, 0.8, 60)
        low, high = wilson(rng.binomial(8, skill), np.full(60, 8))
        hits += low <= 0.6 <= high
    # 95 % of 400 is 380; four standard deviations of the count are 17.
    assert 363 <= hits <= 397


def test_memory_two_ways():
    assert zoology_bytes(MODEL.config, 64) == 4 * (64 * 8 + 2 * 32 * 64)
    windowed = config("c w", c={"type": "short_conv"}, w={"type": "attention", "window": 16})
    assert zoology_bytes(windowed, 64) == 4 * (32 * 3 + 2 * 32 * 16)
    conv = {"type": "short_conv"}
    both = config("c+w f", c=conv, w=conv, f={"type": "mlp"})
    assert zoology_bytes(both, 64) == 4 * (2 * 32 * 3)
    unknown = config("z m", m={"type": "mamba"}, z={"type": "inject", "block": "m", "into": "m"})
    assert zoology_bytes(unknown, 64) is None
    shorter, longer = (measured_bytes(MODEL, np.zeros((1, t), dtype=np.int64)) for t in (64, 128))
    # Between the two, only the cache of keys and values grows.
    assert longer - shorter >= 64 * 4 * 2 * 32
    assert shorter > zoology_bytes(MODEL.config, 64)
