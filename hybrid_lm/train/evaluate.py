"""Validation during a run: loss and bits per byte of held-out text, or a probe's accuracy in each setting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.data import IGNORE, Batch
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.train.source import Source


def to_tensors(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """tokens, labels and doc_ids (b t) on the device."""
    tokens, labels, doc_ids = (None if x is None else torch.from_numpy(x).to(device) for x in batch)
    assert tokens is not None
    assert labels is not None
    return tokens, labels, doc_ids


@torch.no_grad()
def validate(
    model: HybridLM,
    source: Source,
    *,
    n_batches: int | None = None,
    bf16: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Measures the model on the source's held-out batches, in evaluation mode.

    Text: `nll` (nats per token of text, ends of documents not scored), `bits_per_byte`, `perplexity`. Probe:
    `accuracy/<slice>` (share of scored tokens whose best guess is right) and `nll/<slice>` of each setting,
    `accuracy` the mean over settings. Always `seconds`. Empty if `stop()` came true on the way.
    """
    begin = time.perf_counter()
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums: dict[str, list[float]] = {}
    try:
        for name, batch in source.eval_batches(n_batches):
            if stop():
                return {}
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                measured = (_losses if source.bytes_per_token else _answers)(model, batch, device)
            sums[name] = [a + b for a, b in zip(sums.get(name, [0.0] * 3), measured, strict=True)]
    finally:
        model.train(was_training)
    metrics = _text(sums["val"], source.bytes_per_token) if source.bytes_per_token else _probe(sums)
    return metrics | {"seconds": time.perf_counter() - begin}


def _losses(model: HybridLM, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    """Sum of the losses, scored tokens, 0."""
    tokens, labels, doc_ids = to_tensors(batch, device)
    nll = model.token_loss(tokens, labels, doc_ids=doc_ids).nll
    return nll.cpu().double().sum().item(), float((labels != IGNORE).sum()), 0.0


def _answers(model: HybridLM, batch: Batch, device: torch.device) -> tuple[float, float, float]:
    """Sum of the losses, scored tokens, right answers."""
    tokens, labels, doc_ids = to_tensors(batch, device)
    scored = labels != IGNORE
    logits = model.logits(model.features(tokens, doc_ids=doc_ids)[0][scored]).float()
    nll = F.cross_entropy(logits, labels[scored], reduction="sum")
    return nll.item(), float(scored.sum()), float((logits.argmax(-1) == labels[scored]).sum())


def _text(sums: list[float], bytes_per_token: float) -> dict[str, float]:
    nll = sums[0] / sums[1]
    # exp overflows near 709 nats; a model that far off has no perplexity worth a name.
    perplexity = math.exp(nll) if nll < 700 else math.inf
    return {"nll": nll, "bits_per_byte": nll / math.log(2) / bytes_per_token, "perplexity": perplexity}


def _probe(sums: dict[str, list[float]]) -> dict[str, float]:
    metrics = {}
    for name, (nll, scored, right) in sums.items():
        metrics |= {f"accuracy/{name}": right / scored, f"nll/{name}": nll / scored}
    accuracies = [value for key, value in metrics.items() if key.startswith("accuracy/")]
    return {"accuracy": sum(accuracies) / len(accuracies), **metrics}
