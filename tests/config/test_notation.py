"""Other projects' notations: their published models in, the same notation out, and what cannot be said."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_lm.config.notation import (
    NotationError,
    from_jamba,
    from_layer_types,
    from_megatron,
    to_jamba,
    to_layer_types,
    to_megatron,
)
from hybrid_lm.config.pattern import PatternError, canon, expand

MEGATRON = {"M": "m", "*": "a", "-": "f", "E": "e", "G": "g"}
MEGATRON_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
QWEN3_NEXT = ["full_attention" if (i + 1) % 4 == 0 else "linear_attention" for i in range(48)]
QWEN3_SYMBOLS = {"linear_attention": "g", "full_attention": "a"}
JAMBA = {
    "num_hidden_layers": 32,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}


@pytest.mark.parametrize(("string", "layers"), [(MEGATRON_8B, 56), (NEMOTRON_3_NANO, 52)])
def test_megatron_strings(string, layers):
    items = from_megatron(string, MEGATRON)
    assert len(items) == layers
    assert to_megatron(items, MEGATRON) == string
    assert expand(canon(items), "mafeg") == items


def test_megatron_symbols_follow_the_table():
    assert from_megatron("MG*", {"M": "mamba2", "G": "delta", "*": "a+m"}) == ("mamba2", "delta", "a+m")
    assert to_megatron(["a+m"], {"*": "a+m"}) == "*"


@pytest.mark.parametrize(
    ("string", "column", "words"),
    [
        ("M-|M*", 3, "pipeline stages"),
        ("M*/M", 3, "multi-token prediction"),
        ("M D", 2, "unknown symbol ' '; known: *, -, E, G, M"),
        ("MD", 2, "unknown symbol 'D'"),
        ("mM", 1, "Did you mean 'M'?"),
        ("M4", 2, "unknown symbol '4'"),
        ("", 1, "an empty pattern"),
    ],
)
def test_megatron_strings_that_say_something_else(string, column, words):
    with pytest.raises(PatternError) as caught:
        from_megatron(string, MEGATRON)
    assert caught.value.column == column
    assert words in caught.value.message


def test_what_megatron_cannot_say():
    with pytest.raises(NotationError, match=r"layer 1: the parallel layers 'a\+m' have no symbol"):
        to_megatron(["m", "a+m"], MEGATRON)
    with pytest.raises(NotationError, match="layer 2: unknown layer 'w'; known: a, e, f, g, m"):
        to_megatron(["m", "f", "w"], MEGATRON)


def test_layer_types_of_blocks():
    items = from_layer_types(QWEN3_NEXT, QWEN3_SYMBOLS, ffn="e")
    assert canon(items) == "((g e)x3 a e)x12"
    assert to_layer_types(items, QWEN3_SYMBOLS, ffn="e") == QWEN3_NEXT


def test_layer_types_of_single_layers():
    symbols = {"mamba": "m", "attention": "a", "mlp": "f", "moe": "e"}
    items = from_layer_types(["mamba", "moe", "attention", "mlp"], symbols)
    assert items == ("m", "e", "a", "f")
    assert to_layer_types(items, symbols) == ["mamba", "moe", "attention", "mlp"]


def test_what_layer_types_cannot_say():
    with pytest.raises(
        NotationError, match=r"layer_types\[1\]: unknown layer type 'ful_attention'.*Did you mean"
    ):
        from_layer_types(["linear_attention", "ful_attention"], QWEN3_SYMBOLS)
    for items, words in [
        (["g", "e", "a"], "layer 2: 'a' must be followed by 'e', not by the end"),
        (["g", "a", "e"], "layer 0: 'g' must be followed by 'e', not by 'a'"),
        (["g", "e", "e"], "layer 2: 'e' follows no mixer, and every block begins with one"),
        (["g+a", "e"], "layer 0: the parallel layers 'g+a' have no symbol"),
        (["g", "e", "w", "e"], "layer 2: unknown layer 'w'"),
    ]:
        with pytest.raises(NotationError) as caught:
            to_layer_types(items, QWEN3_SYMBOLS, ffn="e")
        assert words in str(caught.value)


def test_jamba():
    items = from_jamba(JAMBA)
    assert canon(items) == "((m f m e)x2 a f m e m f m e)x4"
    assert to_jamba(items) == JAMBA


@given(st.integers(1, 20), st.integers(1, 9), st.integers(0, 8), st.integers(1, 9), st.integers(0, 8))
def test_jamba_there_and_back(blocks, attention, attention_at, experts, experts_at):
    periods = {
        "num_hidden_layers": blocks,
        "attn_layer_period": attention,
        "attn_layer_offset": attention_at % attention,
        "expert_layer_period": experts,
        "expert_layer_offset": experts_at % experts,
    }
    items = from_jamba(periods)
    back = to_jamba(items)
    assert from_jamba(back) == items
    assert back["attn_layer_offset"] < back["attn_layer_period"]


def test_what_jamba_cannot_say():
    with pytest.raises(
        NotationError, match="attn_layer_offset = 8 must be from 0 to attn_layer_period - 1 = 7"
    ):
        from_jamba({**JAMBA, "attn_layer_offset": 8})
    with pytest.raises(NotationError, match="attn_layer_offset = 0 must be from 0"):
        from_jamba({**JAMBA, "attn_layer_period": 0, "attn_layer_offset": 0})
    with pytest.raises(NotationError, match="the periods lacks expert_layer_offset"):
        from_jamba({key: value for key, value in JAMBA.items() if key != "expert_layer_offset"})
    with pytest.raises(NotationError, match="the table of symbols lacks attention, mlp, experts"):
        from_jamba(JAMBA, {"mamba": "m"})
    for pattern, words in [
        ("(m f a f)x2 m f m f", "attention in block 1 and 3 means every 2 blocks, but block 5 has none"),
        ("m f a f (m f)x3 a f a f", "attention in block 1 and 5 means every 4 blocks, but block 6 has it"),
        ("a f m f m f a f m f", None),
        ("m e m f m e m e", "experts in block 0 and 2 means every 2 blocks, but block 3 has it"),
        ("m f a", "layer 2: 'a' must be followed by 'f' or 'e', not by the end"),
        ("m f a+m f", "layer 2: the parallel layers 'a+m' have no symbol"),
    ]:
        items = expand(pattern, "mafe")
        if words is None:
            assert from_jamba(to_jamba(items)) == items
        else:
            with pytest.raises(NotationError) as caught:
                to_jamba(items)
            assert words in str(caught.value)
