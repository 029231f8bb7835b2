"""The laws that every layer and every model keeps, each written once: our tests apply them to each registered
layer and to each shipped configuration, and `hybrid-lm check` applies them to the user's own.

They are checked in float64, where an error of logic (a leaked token, a lost state) stands out from rounding
by ten orders of magnitude, on a model whose every parameter is off its starting value, since norms of one and
biases of zero hide mistakes. A bound is `SLACK` roundings of the number format, relative to the largest
logit.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.config.pattern import canon, expand
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.layers.base import Choices, State
from hybrid_lm.model.build import build_model
from hybrid_lm.model.generate import pad_left
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM

SLACK = 2**10
"""Roundings that may add up. Two orders of sums over a few thousand products, through ten layers, differ by
less."""

FEWEST = 8
"""Tokens that every law can be told with."""

BF16_SLACK = 2.0
"""Roundings of bfloat16 per residual layer, in root mean square, relative to the root mean square of the
logits."""


BOUNDS = ("window", "chunk", "max_positions", "original_max_position_embeddings")
"""Settings, counted in tokens, on whose two sides a layer works differently."""


class Verdict(NamedTuple):
    """One law on one model."""

    law: str
    error: float
    """Measured, relative to the largest logit unless the note says otherwise."""
    bound: float
    note: str = ""
    """What was measured, or why the law could not be."""
    skipped: bool = False

    @property
    def holds(self) -> bool:
        """NaN is not within any bound."""
        return self.skipped or self.error <= self.bound


@dataclass
class Subject:
    """A model to be judged, and the tokens to do it with."""

    config: ModelConfig
    tokens: int = 100
    dtype: torch.dtype = torch.float64
    seed: int = 0
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        if self.tokens < FEWEST:
            raise ValueError(
                f"tokens = {self.tokens}: the laws cut a sequence in many ways and need {FEWEST} or more"
            )
        self.rng = torch.Generator().manual_seed(self.seed)
        limit = self.config.embedding.max_positions if self.config.embedding.positions == "learned" else None
        self.tokens = min(self.tokens, limit or self.tokens)
        self.model = self.build()

    def build(self, backend: str = "auto", dtype: torch.dtype | None = None) -> HybridLM:
        """The model with shaken weights; the same ones whatever the backend and the type."""
        model = build_model(self.config, seed=self.seed, backend=backend)
        shake(model, self.seed)
        return model.to(dtype or self.dtype)

    def draw(self, b: int, t: int | None = None) -> Tensor:
        """Tokens (b t)."""
        assert self.config.vocab_size is not None
        return torch.randint(self.config.vocab_size, (b, t or self.tokens), generator=self.rng)

    def bound(self) -> float:
        """The largest relative difference that rounding explains."""
        return SLACK * torch.finfo(self.dtype).eps


@torch.no_grad()
def shake(model: HybridLM, seed: int) -> None:
    """Moves every parameter off its start: vectors by 0.1 N(0, 1), matrices by a quarter of their spread."""
    rng = torch.Generator().manual_seed(seed + 1)
    for _, parameter, spec in entries(model):
        noise = torch.randn(parameter.shape, generator=rng)
        spread = 0.25 * float(parameter.std()) if parameter.dim() > 1 and spec.kind != "dynamics" else 0.0
        parameter += noise * (spread or 0.1)


def subject(config: ModelConfig, *, whole: bool = False, **settings) -> Subject:
    """A subject for `config`. Layers keep the laws one by one, so each distinct item stands at most twice
    (`whole`: as often as in the pattern) and the vocabulary is small: the widths and options are the
    configuration's own.
    """
    items = expand(config.pattern, list(config.layers), config.depth)
    if not whole:
        items = [item for i, item in enumerate(items) if items[:i].count(item) < 2]
    changed = {"pattern": canon(items), "depth": None, "vocab_size": min(config.vocab_size or 64, 64)}
    settings.setdefault("tokens", enough(config))
    return Subject(config.model_copy(update=changed), **settings)


def enough(config: ModelConfig) -> int:
    """Tokens that go beyond every bound in the layers' settings (a window, a chunk, a trained length) of up
    to 400."""

    def bounds(value: Any) -> Iterator[int]:
        if isinstance(value, Mapping):
            for key, part in value.items():
                if key in BOUNDS and isinstance(part, int):
                    yield part
                yield from bounds(part)

    found = [n for recipe in config.layers.values() for n in bounds(recipe.options) if n <= 400]
    return max([64, *found]) + 36


def worst_of(*errors: float) -> float:
    """The largest error; NaN if one is, where `max` would say so or not by the order of its arguments."""
    return float("nan") if any(math.isnan(error) for error in errors) else max(errors)


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference over the largest value of `b`; NaN stays NaN."""
    return float((a - b).abs().max() / b.abs().max())


def causal(s: Subject) -> Verdict:
    """No token's logits depend on a later token: their gradient there is exactly zero (and at the token
    itself is not)."""
    tokens, found = s.draw(2), {}
    hook = s.model.embed.register_forward_hook(lambda _m, _a, y: found.setdefault("x", y))
    try:
        logits = s.model(tokens).logits
    finally:
        hook.remove()
    worst = 0.0
    for place in sorted({0, s.tokens // 3, s.tokens * 2 // 3}):
        weights = torch.randn(logits[:, place].shape, generator=s.rng, dtype=logits.dtype)
        (grad,) = torch.autograd.grad((logits[:, place] * weights).sum(), found["x"], retain_graph=True)
        later = grad[:, place + 1 :].abs().max() if place + 1 < s.tokens else grad.new_zeros(())
        # A model that ignores its input would be causal too.
        worst = worst_of(
            worst, float(later), float("nan") if not bool(grad[:, place].abs().max() > 0) else 0.0
        )
    return Verdict("causal", worst, 0.0, "gradient of logits with respect to later tokens")


@torch.no_grad()
def chunked_is_recurrent(s: Subject) -> Verdict:
    """The chosen backends compute what the sequential references do."""
    tokens, docs = s.draw(2), documents(s)
    reference = s.build(backend="reference")
    error = relative(s.model(tokens, doc_ids=docs).logits, reference(tokens, doc_ids=docs).logits)
    chosen = sorted(set(s.model.backends.values()))
    return Verdict("chunked = recurrent", error, s.bound(), f"{', '.join(chosen)} against reference")


def documents(s: Subject) -> Tensor:
    """Document numbers (2 t): three in the first row, padding and two in the second."""
    t = s.tokens
    docs = torch.ones(2, t, dtype=torch.int32)
    docs[0, t // 4 :], docs[0, t // 2 :] = 2, 3
    docs[1, : t // 5], docs[1, t * 3 // 5 :] = 0, 2
    return docs


@torch.no_grad()
def split_is_whole(s: Subject) -> Verdict:
    """Reading in any pieces gives the logits and the memory of reading at once."""
    tokens = s.draw(2)
    once = s.model.empty_state(2)
    whole, worst = s.model(tokens, state=once).logits, 0.0
    for cuts in ([1], [s.tokens - 1], sorted(torch.randint(1, s.tokens, (4,), generator=s.rng).tolist())):
        state = s.model.empty_state(2, max_tokens=s.tokens // 2)
        pieces = [s.model(part, state=state).logits for part in tokens.tensor_split(cuts, 1) if part.shape[1]]
        worst = worst_of(worst, relative(torch.cat(pieces, 1), whole), state_error(state, once))
    return Verdict("any split = whole", worst, s.bound(), "logits and memory, three ways to cut")


def state_error(a: State, b: State) -> float:
    """Largest relative difference between two memories of the same tokens, over what both hold (a memory of a
    window may
    hold more or fewer of the tokens that nobody can see any more)."""
    worst, others = 0.0, b.tensors()
    for name, x in a.tensors().items():
        y = others[name]
        length = min(x.shape[1], y.shape[1]) if x.dim() > 1 else None
        if length != 0 and y.is_floating_point():
            x, y = (x, y) if length is None else (x[:, -length:], y[:, -length:])
            worst = worst_of(worst, float((x - y).abs().max() / (y.abs().max() + torch.finfo(y.dtype).tiny)))
    return worst


@torch.no_grad()
def steps_are_whole(s: Subject) -> Verdict:
    """Decoding token by token gives the logits of reading at once, and so does going back to a fork and
    reading again."""
    tokens, state = s.draw(2), s.model.empty_state(2)
    whole, steps = s.model(tokens).logits, []
    for i in range(s.tokens):
        if i == s.tokens // 2:
            earlier = state.fork()
            s.model(s.draw(2, 3), state=state)
            state.rollback(earlier)
        steps.append(s.model(tokens[:, i : i + 1], state=state).logits)
    return Verdict(
        "token by token = whole",
        relative(torch.cat(steps, 1), whole),
        s.bound(),
        "with a fork and a rollback",
    )


@torch.no_grad()
def packed_is_separate(s: Subject) -> Verdict:
    """Documents packed in a row get the logits that each gets alone."""
    tokens, docs, worst = s.draw(2), documents(s), 0.0
    packed = s.model(tokens, doc_ids=docs).logits
    for row in range(2):
        for doc in docs[row].unique().tolist():
            place = (docs[row] == doc).nonzero()[:, 0]
            if doc:
                worst = worst_of(
                    worst, relative(packed[row, place], s.model(tokens[row, place][None]).logits[0])
                )
    state, half = s.model.empty_state(2), s.tokens // 2 + 1
    parts = [
        s.model(tokens[:, p], state=state, doc_ids=docs[:, p]).logits
        for p in (slice(0, half), slice(half, None))
    ]
    worst = worst_of(worst, relative(torch.cat(parts, 1), packed))
    return Verdict("packed = separate", worst, s.bound(), "also when a row is cut inside a document")


@torch.no_grad()
def padded_is_unpadded(s: Subject) -> Verdict:
    """Padding on the left changes nothing, in the prompt or in what is decoded after it."""
    t = s.tokens
    rows = [s.draw(1, n)[0] for n in (max(1, t - 4), t // 2, 2)]
    tokens, docs = pad_left([row.tolist() for row in rows])
    state, worst = s.model.empty_state(3), 0.0
    after = s.draw(3, 3)
    first = s.model(tokens, state=state, doc_ids=docs).logits
    padded = [first, *(s.model(after[:, i : i + 1], state=state).logits for i in range(3))]
    for i, row in enumerate(rows):
        alone = s.model(torch.cat([row, after[i]])[None]).logits[0]
        mine = torch.cat([part[i] for part in padded])[-len(row) - 3 :]
        worst = worst_of(worst, relative(mine, alone))
    return Verdict("left-padded = unpadded", worst, s.bound(), "prompt and three decoded tokens")


@torch.no_grad()
def alone_is_in_batch(s: Subject) -> Verdict:
    """A sequence gets the same logits alone and among others; gathered memories go on like their rows."""
    tokens, more = s.draw(3), s.draw(3, 2)
    state = s.model.empty_state(3)
    together = s.model(tokens, state=state).logits
    worst = worst_of(*(relative(together[i], s.model(tokens[i : i + 1]).logits[0]) for i in range(3)))
    order = torch.tensor([2, 0])
    gathered = state.gather(order)
    after = s.model(more[order], state=gathered).logits
    worst = worst_of(worst, relative(after, s.model(more, state=state).logits[order]))
    return Verdict("alone = in a batch", worst, s.bound(), "and gathered rows go on as before")


@torch.no_grad()
def saved_is_loaded(s: Subject) -> Verdict:
    """Weights and memories come back from disk bit for bit."""
    from safetensors.torch import load_file, save_file

    tokens, more = s.draw(2), s.draw(2, 2)
    state = s.model.empty_state(2)
    s.model(tokens, state=state)
    with tempfile.TemporaryDirectory() as folder:
        weights, memory = Path(folder) / "model.safetensors", Path(folder) / "state.safetensors"
        save_file({name: x.contiguous() for name, x in s.model.state_dict().items()}, str(weights))
        state.save(memory)
        other = build_model(s.config, seed=s.seed + 1).to(s.dtype)
        other.load_state_dict(load_file(str(weights)))
        restored = other.empty_state(2).load(memory)
    error = float((other(tokens).logits - s.model(tokens).logits).abs().max())
    again = other(more, state=restored).logits - s.model(more, state=state).logits
    return Verdict(
        "save -> load exact", worst_of(error, float(again.abs().max())), 0.0, "weights and memory, absolute"
    )


def gradients_are_finite(s: Subject) -> Verdict:
    """Every parameter that is learned by gradients gets a finite one, not zero throughout, in float32."""
    model = s.build(dtype=torch.float32).train()
    tokens, docs = s.draw(2), documents(s)
    labels = s.draw(2).masked_fill(docs == 0, -100)
    model.token_loss(tokens, labels, doc_ids=docs).objective.sum().backward()
    bad = []
    for name, parameter, _ in entries(model):
        if not parameter.requires_grad:
            continue
        grad = parameter.grad
        if grad is None or not bool(grad.isfinite().all()) or not bool(grad.any()):
            bad.append(name)
    note = f"bad: {', '.join(bad[:4])}" if bad else f"{sum(1 for _ in entries(model))} parameters"
    return Verdict("finite gradients", float(len(bad)), 0.0, note)


@torch.no_grad()
def bf16_stays_close(s: Subject) -> Verdict:
    """bfloat16 throughout moves the logits by a few roundings per layer, in root mean square.

    Where a layer chooses, both make the same choices: a token between two experts goes to either, and what
    the other makes of it is no rounding.
    """
    tokens, docs = s.draw(2), documents(s)
    model, choices = s.build(dtype=torch.bfloat16), Choices()
    with choosing(s.model, choices):
        exact = s.model(tokens, doc_ids=docs).logits.double()
    with choosing(model, Choices(choices.made)):
        rounded = model(tokens, doc_ids=docs).logits.double()
    error = float(((rounded - exact).square().mean() / exact.square().mean()).sqrt())
    bound = BF16_SLACK * torch.finfo(torch.bfloat16).eps * (len(s.model.layers) + 1) ** 0.5
    return Verdict("bf16 drift bounded", error, bound, "root mean square")


@contextmanager
def choosing(model: HybridLM, choices: Choices) -> Iterator[None]:
    """The model's layers choose by `choices`, for one call."""
    hook = model.layers[0].register_forward_pre_hook(lambda _, given: setattr(given[2], "choices", choices))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def compiled_is_eager(s: Subject) -> Verdict:
    """torch.compile takes the model as one graph and computes the same, in float32: its kernels have their
    own last bits of
    exp, sin and cos, and the tables of rope are float32 whatever the model is."""
    name = "compiled = eager"
    tokens, docs = s.draw(2), documents(s)
    model = s.build(dtype=torch.float32)
    eager = model(tokens, doc_ids=docs).logits
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=s.compiler)
    try:
        error = relative(compiled(tokens, doc_ids=docs).logits, eager)
    except Exception as failure:
        if "InvalidCxxCompiler" not in f"{type(failure).__name__}{failure}":
            raise
        return Verdict(name, 0.0, 0.0, "no C++ compiler for torch.compile", skipped=True)
    finally:
        torch.compiler.reset()
    bound = SLACK * torch.finfo(torch.float32).eps
    return Verdict(name, error, bound, f"fullgraph, {s.compiler}, float32")


LAWS: tuple[Callable[[Subject], Verdict], ...] = (
    causal,
    chunked_is_recurrent,
    split_is_whole,
    steps_are_whole,
    packed_is_separate,
    padded_is_unpadded,
    alone_is_in_batch,
    saved_is_loaded,
    gradients_are_finite,
    bf16_stays_close,
    compiled_is_eager,
)
"""In the order in which `check` prints them."""
