"""Places of a model in words: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

import pytest

from hybrid_lm.config.imported import changed, overlaid
from hybrid_lm.config.places import Spot, replaced, spots, within
from hybrid_lm.config.schema import ModelConfig

RECIPES = {
    "a": {"type": "attention", "n_heads": 2},
    "m": {"type": "mamba2", "d_state": 8, "head_dim": 16},
    "f": {"type": "mlp", "d_ff": 32},
    "s": {"type": "mlp", "d_ff": 32, "share": {"copies": 2}},
    "z": {"type": "inject", "block": "s", "into": "m"},
}


def model(pattern: str, names: str, **more) -> ModelConfig:
    layers = {name: RECIPES[name] for name in names}
    return ModelConfig.model_validate({"d_model": 32, "pattern": pattern, "layers": layers, **more})


@pytest.mark.parametrize(
    ("word", "found"),
    [
        (0, [Spot(0)]),
        ("3", [Spot(3)]),
        ("1-3", [Spot(1), Spot(2), Spot(3)]),
        ("a", [Spot(0), Spot(2, 0)]),
        ("m", [Spot(2, 1)]),
        ("a+m", [Spot(2)]),
        ("f", [Spot(1), Spot(3)]),
    ],
)
def test_words_mean_layers_or_branches(word, found):
    assert spots(word, ["a", "f", "a+m", "f"]) == found


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("4", "4: there are the layers 0-3"),
        ("2-9", "2-9: there are the layers 0-3"),
        ("3-1", "3-1: there are the layers 0-3"),
        (-1, "'-1' is no place"),
        ("embd", r"'embd' is no place; there are a, f, m, 0-3, embed, .*Did you mean 'embed'\?"),
    ],
)
def test_words_that_mean_nothing_are_told_with_those_that_do(word, message):
    with pytest.raises(ValueError, match=message):
        spots(word, ["a", "f", "a+m", "f"])


def test_items_are_replaced_and_told_by_the_names_of_their_parameters():
    base = model("a f a+m f", "afm")
    items, fresh = replaced(base, {"a": "w", "3": None, "embed": None})
    assert items == ["w", "f", "w+m", "f"]
    assert fresh == ["layers.0.", "layers.2.layer.layers.0.", "layers.3.", "embed."]
    assert replaced(base, {"2": "w+f"})[0] == ["a", "f", "w+f", "f"]
    assert replaced(base, {}) == (["a", "f", "a+m", "f"], [])


@pytest.mark.parametrize(
    ("replace", "message"),
    [
        ({"q": "a"}, "'q' is no place"),
        ({"embed": "m"}, "embed: null is all that can stand here"),
        ({"0-2": "m", "a": "m"}, "a: 0-2 names layer 0 too"),
        ({"a": "m", "2": "m"}, "2: a names layer 2 too"),
        ({"m": "a+f"}, r"m: a\+f cannot be one branch of layer 2"),
    ],
)
def test_replacements_that_cannot_be(replace, message):
    with pytest.raises(ValueError, match=message):
        replaced(model("a f a+m f", "afm"), replace)


def test_a_name_means_all_weights_of_a_recipe():
    zamba = model("m z m z", "msz")
    shared = {"shared.s.0.", "shared.s.1."}
    assert set(within(zamba, ["s"])) == {"layers.1.layer.block.0.", "layers.3.layer.block.0.", *shared}
    assert within(zamba, ["m"]) == [
        "layers.0.",
        "layers.1.layer.into.0.",
        "layers.2.",
        "layers.3.layer.into.0.",
    ]
    assert within(zamba, [0, "lm_head"]) == ["layers.0.", "lm_head.", "lm_bias"]
    with pytest.raises(ValueError, match="1: layer 1 shares the weights of s with others; name s"):
        within(zamba, [1])


def test_a_model_is_changed_where_something_is_given():
    base = model("(a f)x2", "af", vocab_size=61)
    given = {"layers": {"m": RECIPES["m"], "f": {"act": "relu"}}, "block": {"dropout": 0.1}}
    made = changed(base, given, {"a": "m"})
    made = ModelConfig.model_validate(made)
    assert (made.pattern, set(made.layers), made.vocab_size) == ("m f m f", {"m", "f"}, 61)
    assert made.layers["f"].options["act"] == "relu"
    assert made.layers["f"].options["d_ff"] == 32
    assert (made.block.dropout, made.block.eps) == (0.1, base.block.eps)
    # A recipe of another type has nothing of the old one.
    other = overlaid({"a": {"type": "attention", "n_heads": 2}}, {"a": {"type": "mlp"}})
    assert other == {"a": {"type": "mlp"}}
    with pytest.raises(ValueError, match=r"a: w: unknown recipe 'w'; known: a, f; add it to model.layers"):
        changed(base, {}, {"a": "w"})
    with pytest.raises(ValueError, match=r"model\.depth: the imported pattern has its own"):
        changed(base, {"depth": 3}, {})
