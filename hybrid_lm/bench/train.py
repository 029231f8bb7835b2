"""`bench train`: one training step of a Mamba-1 language model of 10 M parameters, of the same model in
transformers, and of a Llama of equal size."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lm.bench.machine import new_document, yardsticks
from hybrid_lm.bench.measure import (
    LIMIT,
    Candidate,
    add_ratios,
    choose,
    clock_of,
    compare,
    relative_errors,
)
from hybrid_lm.bench.models import (
    build_ours,
    count,
    model_backends,
    ours,
    transformers_model,
)

BATCH, LENGTH = 4, 512
D_MODEL, N_LAYERS, VOCAB = 320, 12, 4096
LLAMA_LAYERS, LLAMA_HEADS = 7, 5
CHECKED = 64
"""Tokens of the sequence on which logits and a gradient are compared with float64."""
BF16_LIMIT = 8 * torch.finfo(torch.bfloat16).eps
"""Errors of eps/2 from twelve layers, in each three products one after another, forward and backward, add up
to sqrt(72) eps/2; twice that. Measured: 1.5 eps."""


@dataclass
class Trained:
    """A model in training."""

    model: nn.Module
    logits: Callable[[nn.Module, Tensor], Tensor]
    """Of a model and tokens (b t): (b t v)."""
    bf16: bool = False
    true: nn.Module | None = None
    """The model in float64; None: that of our Mamba, with which this one shares its weights."""
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.model.train()

    def loss(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the mean loss of the tokens (b t+1) after the first."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            logits = self.logits(self.model, tokens[:, :-1])
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return logits, F.cross_entropy(logits.flatten(0, 1).to(dtype), tokens[:, 1:].flatten())

    def step(self, tokens: Tensor) -> None:
        """Forward, loss, backward, AdamW."""
        self.loss(tokens)[1].backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def outcome(self, tokens: Tensor) -> dict[str, Tensor]:
        """Logits, and the gradient of the embeddings, which has come through every layer."""
        logits, loss = self.loss(tokens)
        embedding = next(p for p in self.model.parameters() if p.shape == (VOCAB, D_MODEL))
        (d_embedding,) = torch.autograd.grad(loss, [embedding])
        return {"logits": logits.detach(), "d_embedding": d_embedding}


def our_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens).logits


def their_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, use_cache=False).logits


CONFIG = ours("mamba", d_model=D_MODEL, n_layers=N_LAYERS, vocab_size=VOCAB, options={"d_state": 16})


def transformers_mamba() -> nn.Module:
    sizes = {"hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "vocab_size": VOCAB}
    return transformers_model("mamba", head=True, like=build_ours(CONFIG, "torch"), use_mambapy=True, **sizes)


def train_ours(backend: str, bf16: bool) -> Trained:
    return Trained(build_ours(CONFIG, backend), our_logits, bf16)


def train_llama(bf16: bool) -> Trained:
    """As many parameters as the Mamba model, in 7 layers of equal width."""
    model = transformers_model(
        "llama",
        head=True,
        hidden_size=D_MODEL,
        num_hidden_layers=LLAMA_LAYERS,
        num_attention_heads=LLAMA_HEADS,
        intermediate_size=llama_width(count(build_ours(CONFIG, "torch"))),
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    return Trained(model, their_logits, bf16, true=copy.deepcopy(model).double().train())


def llama_width(parameters: int) -> int:
    """The inner width of its MLPs, a multiple of 8, that gives it so many parameters."""
    rest = parameters - VOCAB * D_MODEL - LLAMA_LAYERS * 4 * D_MODEL**2
    return 8 * round(rest / (LLAMA_LAYERS * 3 * D_MODEL) / 8)


def candidates() -> list[Candidate]:
    """Ours with every backend, in float32 and under bfloat16 autocast, and the peers."""
    found = []
    for bf16, suffix, limit in ((False, "", LIMIT), (True, "_bf16", BF16_LIMIT)):
        for backend in model_backends("mamba"):
            load = partial(train_ours, backend, bf16)
            found.append(Candidate(backend + suffix, load, ours=True, limit=limit))
        load = partial(train_llama, bf16)
        found.append(Candidate("llama" + suffix, load, packages=("transformers",), limit=limit))
    mambapy = Candidate(
        "transformers_mambapy",
        lambda: Trained(transformers_mamba(), their_logits),
        packages=("transformers", "mambapy"),
        rounds=2,
    )
    return [*found, mambapy]


def bench_train(
    *,
    lengths: Sequence[int] | None = None,
    only: Sequence[str] | None = None,
    threads: int = 1,
    repeat: int = 5,
    tell: Callable[[str], None] = lambda text: None,
    done: Callable[[Mapping[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Seconds of a step and tokens per second at batch 4; the arguments are those of `bench_ops`.

    Every model computes its logits whole and takes `F.cross_entropy` of them: the loss is the same work for
    all.
    """
    torch.set_num_threads(threads)
    clock = clock_of(threads)[1]
    names = choose("candidate", only, [c.name for c in candidates()])
    document = new_document("train", threads, repeat)
    chosen = [c for c in candidates() if c.name in names]
    for length in lengths or [LENGTH]:
        case = measure(chosen, length, repeat, clock, tell)
        document["cases"].append(case)
        done(document)
    return document


def measure(
    chosen: Sequence[Candidate],
    length: int,
    repeat: int,
    clock: Callable[[], float],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """All candidates at one length."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (BATCH, length + 1), generator=generator)
    few = tokens[:1, : CHECKED + 1]
    truth = Trained(build_ours(CONFIG, "torch").double(), our_logits).outcome(few)
    parameters: dict[str, int] = {}

    def check(trained: Trained) -> dict[str, float]:
        parameters[type(trained.model).__name__] = count(trained.model)
        true = truth if trained.true is None else Trained(trained.true, trained.logits).outcome(few)
        trained.true = None
        return relative_errors(trained.outcome(few), true)

    def run(trained: Trained) -> dict[str, list[float]]:
        start = clock()
        trained.step(tokens)
        return {"step_s": [clock() - start]}

    rows = compare(chosen, check=check, run=run, repeat=repeat, tell=lambda t: tell(f"train {length}: {t}"))
    base = add_ratios(rows, "step_s")
    for row in rows.values():
        if "step_s" in row:
            row["tokens_per_s"] = BATCH * length / row["step_s"]["median"]
    sizes = parameters.values() or [0]
    assert max(sizes) <= 1.02 * min(sizes), f"the models are not of equal size: {parameters}"
    return {
        "op": f"training step, batch {BATCH}",
        "tokens": length,
        "parameters": parameters,
        "yardsticks": yardsticks(clock),
        "base": base,
        "candidates": rows,
    }
