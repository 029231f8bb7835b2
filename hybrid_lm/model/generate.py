"""Text out of a model: prefill in pieces, then one token at a time through the same forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid_lm.model.decode import Decoder
from hybrid_lm.model.lm import HybridLM, ModelState

RECORDED = 16
"""New tokens from which on a recording of the step is worth its time, which is that of some steps."""


@dataclass
class Generation:
    """What one prompt became."""

    tokens: list[int] = field(default_factory=list)
    """The new tokens, without the one that ended it."""
    text: str | None = None
    """Their text, cut before a stop string; None without a tokenizer."""
    finish: str = "length"
    """Why it ended: length, stop (a stop token) or stop_string."""


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """One token per row of logits (b v), (b,) int64.

    `temperature` 0: the most likely one. `top_k`: only the k most likely. `top_p`: only the fewest that
    together have this probability (Holtzman et al. 2019, arXiv:1904.09751), at least one.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        best = logits.topk(top_k, -1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, best.indices, best.values)
    if top_p is not None and top_p < 1.0:
        ordered, index = logits.sort(-1, descending=True)
        p = ordered.softmax(-1)
        # A token stays while those before it have not reached top_p: the first always stays.
        drop = p.cumsum(-1) - p >= top_p
        logits = logits.masked_fill(drop.scatter(-1, index, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=rng).squeeze(-1)


def pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor | None]:
    """Prompts as one batch: tokens (b t), padded on the left, and doc_ids (b t), None if none is padded."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError(
            "a prompt needs at least one token; give the end-of-text token to start from nothing"
        )
    t = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros(len(prompts), t, dtype=torch.int64)
    docs = torch.zeros(len(prompts), t, dtype=torch.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, t - len(prompt) :] = torch.as_tensor(prompt)
        docs[row, t - len(prompt) :] = 1
    return tokens.to(device), None if bool(docs.all()) else docs.to(device)


@torch.no_grad()
def prefill(
    model: HybridLM, tokens: Tensor, *, state: ModelState, doc_ids: Tensor | None = None, piece: int = 2048
) -> Tensor:
    """Reads tokens (b t) into the state, at most `piece` at a time; logits (b v) for the next token."""
    x = None
    for start in range(0, tokens.shape[1], piece):
        part = slice(start, start + piece)
        docs = None if doc_ids is None else doc_ids[:, part]
        x, _ = model.features(tokens[:, part], state=state, doc_ids=docs)
    assert x is not None
    return model.logits(x[:, -1])


@torch.no_grad()
def stream(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    decoder: Decoder | None = None,
) -> Iterator[list[int]]:
    """The next token of every prompt, step after step: lists of b tokens. What the caller ignores is not
    undone. `decoder`: one of this model to go on with; it keeps what it has recorded from call to call."""
    check_sampling(model, max_new_tokens, temperature, top_k, top_p, max(map(len, prompts), default=0))
    device = model.embed.weight.device
    training = model.training
    model.eval()
    rng = None if seed is None else torch.Generator(device).manual_seed(seed)
    tokens, docs = pad_left(prompts, device)
    state = model.empty_state(len(prompts), max_tokens=tokens.shape[1] + max_new_tokens)
    logits = prefill(model, tokens, state=state, doc_ids=docs)
    if decoder is None and max_new_tokens >= RECORDED:
        decoder = Decoder(model)
    try:
        for step in range(max_new_tokens):
            chosen = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
            yield chosen.tolist()
            if step + 1 < max_new_tokens:
                if decoder is None:
                    logits = model(chosen[:, None], state=state).logits[:, -1]
                else:
                    logits = decoder.step(chosen, state)
    finally:
        model.train(training)


def generate(
    model: HybridLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_tokens: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    on_token: Callable[[int, int, str | None], None] | None = None,
    decoder: Decoder | None = None,
) -> list[Generation]:
    """Continues every prompt (a list of tokens) by at most `max_new_tokens` tokens.

    Args:
        temperature: 0 is greedy. `top_k`, `top_p`: see `sample`. `seed`: makes the draw repeatable.
        stop_tokens: end a continuation; not part of it.
        stop_strings: end it where one of them appears in its text; needs `decode`.
        decode: tokens -> text.
        on_token: called as tokens come, `(row, token, new text)`; the text, with `decode`, is held back while
        it could
            still become a stop string or an unfinished character.
        decoder: see `stream`; by default one of its own, for this call.
    """
    if stop_strings and decode is None:
        raise ValueError("stop_strings need `decode`, a function from tokens to text")
    if "" in stop_strings:
        raise ValueError("stop_strings: an empty string would end every text before it begins")
    done = [Generation(text=None if decode is None else "") for _ in prompts]
    open_rows = set(range(len(done)))
    printed = [0] * len(done)
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    for step in stream(model, prompts, max_new_tokens=max_new_tokens, decoder=decoder, **how):
        for row in sorted(open_rows):
            result, token = done[row], step[row]
            if token in stop_tokens:
                result.finish = "stop"
            else:
                result.tokens.append(token)
                if decode is not None:
                    result.text = decode(result.tokens)
                    cut = first_stop(result.text, stop_strings)
                    if cut is not None:
                        result.text, result.finish = result.text[:cut], "stop_string"
            finished = result.finish != "length" or len(result.tokens) == max_new_tokens
            if on_token is not None:
                new = None
                if result.text is not None:
                    safe = len(result.text) if finished else settled(result.text, stop_strings)
                    new, printed[row] = result.text[printed[row] : safe], max(safe, printed[row])
                on_token(row, token, new)
            if finished:
                open_rows.discard(row)
        if not open_rows:
            break
    return done


def first_stop(text: str, stop_strings: Sequence[str]) -> int | None:
    """Where the earliest of the stop strings begins in `text`."""
    found = [place for place in (text.find(stop) for stop in stop_strings) if place >= 0]
    return min(found, default=None)


def settled(text: str, stop_strings: Sequence[str]) -> int:
    """How much of `text` no later token can change: not a begun stop string, not an unfinished character at
    its end."""
    end = len(text.rstrip("\ufffd"))
    for stop in stop_strings:
        for length in range(min(len(stop) - 1, len(text)), 0, -1):
            if text.endswith(stop[:length]):
                end = min(end, len(text) - length)
                break
    return end


def check_sampling(
    model: HybridLM,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    prompt: int,
) -> None:
    """ValueError for settings that cannot be, before anything is computed."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: must be at least 1")
    if not temperature >= 0.0:
        raise ValueError(f"temperature = {temperature}: must be 0 (greedy) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: must be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}: must be above 0 and at most 1")
    limit = model.config.embedding.max_positions if model.embed_positions is not None else None
    if limit is not None and prompt + max_new_tokens - 1 > limit:
        raise ValueError(
            f"a prompt of {prompt} tokens and {max_new_tokens} new ones do not fit into the {limit} "
            f"positions that the model has learned; ask for at most {max(0, limit - prompt + 1)} new tokens"
        )
