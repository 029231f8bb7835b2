"""`bench generate`: decoding one token at a time through four layers at d_model 768, batch 1, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrid_lm.bench.machine import new_document, yardsticks
from hybrid_lm.bench.measure import (
    Candidate,
    add_ratios,
    choose,
    clock_of,
    compare,
    relative_errors,
)
from hybrid_lm.bench.models import build_ours, model_backends, ours, transformers_model
from hybrid_lm.model.lm import HybridLM

D_MODEL, N_LAYERS, VOCAB = 768, 4, 256
LENGTH = 16
"""Tokens that a candidate decodes in a row: in a round of single ones it would find another's weights in the
cache."""
SKIPPED = 1
"""Of these, the first ones are not counted."""
CHECKED = 8

OPTIONS: dict[str, dict[str, Any]] = {"mamba": {"d_state": 16}, "mamba2": {"d_state": 128, "n_groups": 8}}
"""transformers' defaults, where they are not ours."""
SIZES: dict[str, dict[str, Any]] = {"mamba": {}, "mamba2": {"num_heads": 2 * D_MODEL // 64}}
CONFIGS = {
    kind: ours(kind, d_model=D_MODEL, n_layers=N_LAYERS, vocab_size=VOCAB, options=options)
    for kind, options in OPTIONS.items()
}


class OurDecoder:
    """Our layers and their state."""

    def __init__(self, model: HybridLM):
        self.model, self.state = model, model.empty_state(1)

    def step(self, token: Tensor) -> Tensor:
        """token (1 1) -> (1 1 d): embeddings, layers, final norm."""
        y, _ = self.model.features(token, state=self.state)
        return y


class TheirDecoder:
    """transformers' layers and their cache: its forward, without the loop of `generate`."""

    def __init__(self, model: nn.Module):
        self.model, self.cache = model, None

    def step(self, token: Tensor) -> Tensor:
        """As ours."""
        out = self.model(input_ids=token, cache_params=self.cache, use_cache=True)
        self.cache = out.cache_params
        return out.last_hidden_state


def decoder(kind: str, backend: str) -> OurDecoder:
    """Ours on a backend."""
    return OurDecoder(build_ours(CONFIGS[kind], backend))


def their_decoder(kind: str) -> TheirDecoder:
    """transformers' model with our weights."""
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "vocab_size": VOCAB, **SIZES[kind]}
    like = build_ours(CONFIGS[kind], "torch")
    return TheirDecoder(transformers_model(kind, head=False, like=like, **sizes))


def candidates(kind: str) -> list[Candidate]:
    """Ours with every backend, and transformers."""
    mine = [
        Candidate(backend, lambda backend=backend: decoder(kind, backend), ours=True)
        for backend in model_backends(kind)
    ]
    peer = Candidate("transformers", lambda: their_decoder(kind), packages=("transformers",))
    return [*mine, peer]


def bench_generate(
    *,
    lengths: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    threads: int = 1,
    repeat: int = 5,
    tell: Callable[[str], None] = lambda text: None,
    done: Callable[[Mapping[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Milliseconds per layer and token of Mamba-1 and Mamba-2; the arguments are those of `bench_ops`, the
    lengths the tokens that are decoded in a round."""
    torch.set_num_threads(threads)
    clock = clock_of(threads)[1]
    names = choose("candidate", only, [c.name for kind in CONFIGS for c in candidates(kind)])
    document = new_document("generate", threads, repeat)
    for kind in CONFIGS:
        chosen = [c for c in candidates(kind) if c.name in names]
        for length in lengths or [LENGTH]:
            case = measure(kind, chosen, length, repeat, clock, lambda t, kind=kind: tell(f"{kind}: {t}"))
            document["cases"].append(case)
            done(document)
    return document


@torch.inference_mode()
def measure(
    kind: str,
    chosen: Sequence[Candidate],
    length: int,
    repeat: int,
    clock: Callable[[], float],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """All candidates of one kind of layer."""
    tokens = torch.randint(VOCAB, (length + SKIPPED, 1, 1), generator=torch.Generator().manual_seed(0))
    few = torch.randint(VOCAB, (CHECKED, 1, 1), generator=torch.Generator().manual_seed(1))
    exact = OurDecoder(build_ours(CONFIGS[kind], "torch").double())
    truth = {"features": torch.cat([exact.step(token) for token in few])}

    def check(loaded: OurDecoder | TheirDecoder) -> dict[str, float]:
        return relative_errors({"features": torch.cat([loaded.step(token) for token in few])}, truth)

    def run(loaded: OurDecoder | TheirDecoder) -> dict[str, list[float]]:
        times = []
        for token in tokens:
            start = clock()
            loaded.step(token)
            times.append((clock() - start) * 1e3 / N_LAYERS)
        return {"token_layer_ms": times[SKIPPED:]}

    rows = compare(chosen, check=check, run=run, repeat=repeat, tell=tell)
    return {
        "op": f"decode, {kind}",
        "tokens": length,
        "yardsticks": yardsticks(clock),
        "base": add_ratios(rows, "token_layer_ms"),
        "candidates": rows,
    }
