"""Accuracy on recall probes, with intervals, floors, and the memory that the accuracy was bought with."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hybrid_lm import probes
from hybrid_lm.config.pattern import expand
from hybrid_lm.config.schema import ModelConfig, ProbeData
from hybrid_lm.data import IGNORE
from hybrid_lm.eval.language import evaluating
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.registry import table
from hybrid_lm.train.source import product

Row = dict[str, Any]
"""One tested setting, as plain values for JSON; `evaluate_probe` lists the keys."""

TEST_SEED = 1_000_003
"""Of the reported test examples: the same for all runs, and none that validation has seen."""


def evaluate_probe(
    model: HybridLM,
    data: ProbeData,
    *,
    seed: int = TEST_SEED,
    batch_size: int = 64,
    n_test: int | None = None,
) -> list[Row]:
    """Tests each combination of `data.test_params` on `n_test` (by default the data's) fresh examples.

    Each row has `probe`, `params` (all parameters of the setting), `setting` (those that vary),
    `n_sequences`, `n_scored` (labelled tokens), `accuracy` (right among all scored, argmax over the whole
    vocabulary), `low` and `high` (95 % interval, see `wilson`), `sequence_accuracy` (sequences with every
    scored token right), `loss` (mean nats at the scored tokens), `chance`, `plateau`, `seq_len`,
    `state_bytes` (measured after seq_len tokens), `zoology_bytes` (the same by the convention of published
    plots, None where it has none), `data_hash`, and per sequence `correct` and `scored`.

    Raises:
        ValueError: if the probe has more tokens than the model's vocabulary.
    """
    rows = []
    for setting in product("test_params", data.test_params):
        probe = probes.get(data.probe, data.preset, **{**data.params, **setting})
        vocab = model.config.vocab_size
        assert vocab is not None
        if probe.vocab_size > vocab:
            raise ValueError(f"probe {data.probe} has {probe.vocab_size} tokens, but the model knows {vocab}")
        tokens, labels = probe.generate(n_test or data.n_test, seed, "test")
        correct, nll = score(model, tokens, labels, batch_size)
        scored = (labels != IGNORE).sum(1)
        low, high = wilson(correct, scored)
        rows.append(
            {
                "probe": data.probe,
                "params": probe.params.model_dump(),
                "setting": setting,
                "n_sequences": len(tokens),
                "n_scored": int(scored.sum()),
                "accuracy": float(correct.sum() / scored.sum()),
                "low": low,
                "high": high,
                "sequence_accuracy": float((correct == scored).mean()),
                "loss": float(nll.sum() / scored.sum()),
                "chance": probe.chance,
                "plateau": probe.plateau,
                "seq_len": probe.seq_len,
                "state_bytes": measured_bytes(model, tokens[:1]),
                "zoology_bytes": zoology_bytes(model.config, probe.seq_len),
                "data_hash": hashlib.sha256(tokens.tobytes() + labels.tobytes()).hexdigest()[:16],
                "correct": correct.tolist(),
                "scored": scored.tolist(),
            }
        )
    return rows


def score(
    model: HybridLM, tokens: np.ndarray, labels: np.ndarray, batch_size: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Right answers and summed nats per sequence, (n) int64 and (n) float64, of tokens and labels (n t).

    The logits of unlabelled places are never computed: at small sizes they are nearly all of the work.
    """
    assert batch_size >= 1, batch_size
    device = model.head_weight.device
    correct, nll = np.zeros(len(tokens), dtype=np.int64), np.zeros(len(tokens))
    with evaluating(model):
        for start in range(0, len(tokens), batch_size):
            rows = slice(start, start + batch_size)
            x, _ = model.features(torch.from_numpy(tokens[rows]).to(device))
            sequence, place = np.nonzero(labels[rows] != IGNORE)
            wanted = torch.from_numpy(labels[rows][sequence, place]).to(device)
            logits = model.logits(x[torch.from_numpy(sequence), torch.from_numpy(place)]).float()
            right = (logits.argmax(-1) == wanted).cpu().numpy()
            loss = F.cross_entropy(logits, wanted, reduction="none").cpu().double().numpy()
            np.add.at(correct, start + sequence, right)
            np.add.at(nll, start + sequence, loss)
    return correct, nll


def wilson(correct: np.ndarray, scored: np.ndarray, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval for the accuracy sum(correct) / sum(scored), with sequences (n) as clusters.

    Tokens of one sequence succeed and fail together, so that the number of tokens overstates what was seen.
    The effective number is tokens / design effect, the design effect being the variance of the ratio between
    sequences over that of independent tokens (Korn & Graubard 1998), kept between the sequences and the
    tokens; the number of sequences where all answers are alike. Wilson 1927, JASA 22, p. 209.
    """
    n, total = len(scored), int(scored.sum())
    p = float(correct.sum() / total)
    effective = float(n)
    if n > 1 and 0.0 < p < 1.0:
        variance = n / (n - 1) * float(np.square(correct - p * scored).sum()) / total**2
        effective = min(max(p * (1 - p) / variance, n), total) if variance else total
    centre = (p + z * z / (2 * effective)) / (1 + z * z / effective)
    half = z / (1 + z * z / effective) * math.sqrt(p * (1 - p) / effective + z * z / (4 * effective**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def measured_bytes(model: HybridLM, tokens: np.ndarray) -> int:
    """Bytes of the model's whole memory of one sequence after reading tokens (1 t)."""
    state = model.empty_state(1)
    with evaluating(model):
        model.features(torch.from_numpy(tokens).to(model.head_weight.device), state=state)
    return state.nbytes


def zoology_bytes(config: ModelConfig, length: int) -> int | None:
    """Bytes of memory by the convention of Zoology's plots: four per number, no conv state of an SSM, all
    heads counted.

    Arora et al. 2023, arXiv:2312.04927, `_compute_state_size` of its code. None for a layer that the
    convention lacks.
    """
    total = 0
    for item in expand(config.pattern, list(config.layers), config.depth):
        for name in item.split("+"):
            recipe = config.layers[name]
            rule = ZOOLOGY.get(recipe.type)
            if rule is None:
                return None
            options = table("layer")[recipe.type].Options.model_validate(dict(recipe.options))
            total += 4 * rule(options, config.d_model, length)
    return total


def _attention(o: Any, d: int, length: int) -> int:
    return 2 * (o.n_heads * o.head_dim if o.head_dim else d) * min(length, o.window or length)


def _ssm(o: Any, d: int, length: int) -> int:
    return (o.d_inner or round(o.expand * d)) * o.d_state


ZOOLOGY: Mapping[str, Callable[[Any, int, int], int]] = {
    "attention": _attention,
    "mamba": _ssm,
    "mamba2": _ssm,
    "short_conv": lambda o, d, length: d * o.width,
    "mlp": lambda o, d, length: 0,
}
"""Numbers kept by a layer of each type, given its options, d_model and the length."""
