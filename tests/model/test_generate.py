"""Generation: the draw, batches of unequal prompts, and where it stops."""

from __future__ import annotations

import pytest
import torch

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.generate import first_stop, generate, prefill, sample, settled

PROMPTS = [[1, 2, 3, 4, 5, 6, 7], [9], [11, 12, 13]]


@pytest.fixture
def model(hybrid_config):
    return build_model(hybrid_config.model_copy(update={"init": type(hybrid_config.init)(std=0.5)}))


def letters(tokens):
    return "".join(chr(ord("a") + t % 26) for t in tokens)


def test_greedy_is_argmax_of_the_whole_text(model):
    (made,) = generate(model, PROMPTS[:1], max_new_tokens=10, temperature=0)
    text = torch.tensor([PROMPTS[0] + made.tokens])
    expected = model(text).logits[0, len(PROMPTS[0]) - 1 : -1].argmax(-1)
    assert made.tokens == expected.tolist()
    assert made.finish == "length"


def test_a_batch_of_unequal_prompts_is_each_alone(model):
    together = generate(model, PROMPTS, max_new_tokens=12, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=12, temperature=0)[0] for prompt in PROMPTS]
    assert [made.tokens for made in together] == [made.tokens for made in alone]


def test_prefill_in_pieces_is_prefill(model):
    tokens = torch.randint(61, (2, 23))
    whole = prefill(model, tokens, state=model.empty_state(2))
    pieces = prefill(model, tokens, state=model.empty_state(2), piece=5)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)  # float32, two orders of the same sums


def test_the_draw():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    rng = torch.Generator().manual_seed(0)

    def share(**how):
        return torch.bincount(sample(logits, rng=rng, **how), minlength=4) / 4000

    # Four standard errors of a share among 4,000 draws: 4 * sqrt(0.25 / 4000) = 0.032.
    near = {"rtol": 0, "atol": 0.032}
    torch.testing.assert_close(share(), torch.tensor([0.5, 0.3, 0.15, 0.05]), **near)
    torch.testing.assert_close(share(top_k=2), torch.tensor([0.625, 0.375, 0, 0]), **near)
    torch.testing.assert_close(share(top_p=0.6), torch.tensor([0.625, 0.375, 0, 0]), **near)
    torch.testing.assert_close(share(top_p=0.5), torch.tensor([1.0, 0, 0, 0]), **near)
    squared = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(share(temperature=0.5), squared / squared.sum(), **near)
    assert share(temperature=0)[0] == 1
    assert len(sample(torch.zeros(500, 10), top_k=2, rng=rng).unique()) == 2, "also among equals"


def test_a_seed_repeats_the_draw(model):
    how = {"max_new_tokens": 9, "temperature": 1.0}
    assert generate(model, PROMPTS, seed=5, **how) == generate(model, PROMPTS, seed=5, **how)
    assert generate(model, PROMPTS, seed=5, **how) != generate(model, PROMPTS, seed=6, **how)


def test_stop_tokens_and_strings(model):
    (free,) = generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0, decode=letters)
    stop = free.tokens[4]
    (made,) = generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0, stop_tokens=[stop])
    assert made.tokens == free.tokens[: free.tokens.index(stop)]
    assert made.finish == "stop"
    first = free.tokens[:1]
    (made,) = generate(model, PROMPTS[:1], max_new_tokens=3, temperature=0, stop_tokens=first, decode=letters)
    assert made.text == ""
    assert not model.training
    model.train()
    generate(model, PROMPTS[:1], max_new_tokens=3)
    assert model.training, "as it was"
    word = free.text[5:7]
    (made,) = generate(
        model, PROMPTS[:1], max_new_tokens=12, temperature=0, decode=letters, stop_strings=[word]
    )
    assert made.text == free.text[: free.text.index(word)]
    assert made.finish == "stop_string"


def test_the_stream_shows_nothing_that_is_taken_back(model):
    (free,) = generate(model, PROMPTS[:1], max_new_tokens=12, temperature=0, decode=letters)
    word, shown = free.text[6:9], []
    (made,) = generate(
        model,
        PROMPTS[:1],
        max_new_tokens=12,
        temperature=0,
        decode=letters,
        stop_strings=[word],
        on_token=lambda row, token, text: shown.append(text),
    )
    assert "".join(shown) == made.text
    assert len(shown) > 1, "it comes in pieces"
    assert first_stop("abcd", ["cd", "bc"]) == 1
    assert settled("abc", ["cde"]) == 2
    assert settled("ab\ufffd", []) == 2, "half a character waits for its other half"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"top_k": 0}, "top_k = 0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"stop_strings": ["x"]}, "stop_strings need `decode`"),
        ({"stop_strings": [""], "decode": str}, "an empty string"),
    ],
)
def test_wrong_settings_are_named(model, how, message):
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, **{"max_new_tokens": 2, **how})
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[]], max_new_tokens=2)


def test_learned_positions_bound_the_length():
    config = {
        "d_model": 8,
        "vocab_size": 9,
        "pattern": "a",
        "layers": {"a": {"type": "attention", "n_heads": 1}},
        "embedding": {"positions": "learned", "max_positions": 6},
    }
    lm = build_model(ModelConfig.model_validate(config))
    assert len(generate(lm, [[1, 2, 3]], max_new_tokens=4)[0].tokens) == 4
    with pytest.raises(ValueError, match="ask for at most 4 new tokens"):
        generate(lm, [[1, 2, 3]], max_new_tokens=5)
