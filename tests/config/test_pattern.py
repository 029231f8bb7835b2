"""The pattern language: what patterns mean, what is refused and how, limits, and the shortest form."""

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lm.config.pattern import PatternError, canon, expand, name_problem

# Published layer lists, each from its own source's rule or string.
MEGATRON_8B = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"  # Megatron-LM, Mamba hybrid 8B
NEMOTRON_3_NANO = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
LETTERS = {"M": "m", "*": "a", "-": "f", "E": "e"}
ZAMBA2 = ["m"] + (["m"] * 5 + ["z"]) * 7 + ["m"] * 4 + ["z"] + ["m"] * 3 + ["z"] + ["m"] * 2  # Zamba2-2.7B
JAMBA = [x for i in range(32) for x in ("a" if i % 8 == 4 else "m", "e" if i % 2 == 1 else "f")]
QWEN3_NEXT = [x for i in range(48) for x in ("a" if (i + 1) % 4 == 0 else "g", "e")]

MEANINGS = [
    ("m", "m"),
    ("(m f a f)x2", "m f a f m f a f"),
    ("m4a2", "m m m m a a"),
    ("m1a", "m a"),
    ("m f", "m f"),
    ("mf", "m f"),
    ("m x3", "m m m"),
    ("mamba2 x3 attn", "mamba2 mamba2 mamba2 attn"),
    ("mamba2", "mamba2"),
    ("((m)x2 a)x2", "m m a m m a"),
    ("(mma)x2", "m m a m m a"),
    ("(m4)x2", "m m m m m m m m"),
    ("(m f) x2\n\t a", "m f m f a"),
    ("a+m f", "a+m f"),
    ("a + m x2", "a+m a+m"),
    ("(a)+((m)) f", "a+m f"),
    ("(a+m f)x2", "a+m f a+m f"),
    ("a+a+attn", "a+a+attn"),
    ("m1+a1", "m+a"),
    ("m6 z (m5 z)x6 m4 z m3 z m2", " ".join(ZAMBA2)),
    ("((m f m e)x2 a f m e m f m e)x4", " ".join(JAMBA)),
    ("((g e)x3 a e)x12", " ".join(QWEN3_NEXT)),
    ("memem(a(em)x3)x5 emae(me)x4", " ".join(LETTERS[c] for c in NEMOTRON_3_NANO)),
    ("mfmfmffm(fmaf(mf)x4)x2 maf(fm)x5 afmff(mf)x3", " ".join(LETTERS[c] for c in MEGATRON_8B)),
]
NAMES = ["m", "f", "a", "e", "g", "z", "mamba2", "attn"]


@pytest.mark.parametrize(("text", "items"), MEANINGS)
def test_meaning(text, items):
    assert expand(text, NAMES) == tuple(items.split())


@pytest.mark.parametrize(
    ("text", "depth", "items"),
    [
        ("m f ...", 4, "m f m f"),
        ("(s s s l)...", 8, "s s s l s s s l"),
        ("(s s s l)...", 4, "s s s l"),
        ("e (m f ...) e", 6, "e m f m f e"),
        ("(m (f ...))x2", 6, "m f f m f f"),
        ("m f", 2, "m f"),
    ],
)
def test_fill(text, depth, items):
    assert expand(text, ["m", "f", "e", "s", "l"], depth) == tuple(items.split())


def test_a_known_name_wins_over_a_run():
    assert expand("mf", ["m", "f", "mf"]) == ("mf",)
    assert expand("m4", ["m", "m4"]) == ("m4",)
    assert expand("max3 max3 x3", ["m", "a", "max3"]) == ("max3",) * 4


REFUSALS = [
    # text, depth, column, words of the message
    ("m3 q a", None, 4, "unknown layer 'q'; known: a, attn, e, f, g, m, mamba2, z"),
    ("mamba x3", None, 1, "Did you mean 'mamba2'?"),
    ("atn", None, 1, "Did you mean 'attn'?"),
    ("mqa", None, 2, "(in 'mqa', read as a run of one-letter names)"),
    ("(m a", None, 1, "'(' is never closed"),
    ("m a)", None, 4, "')' closes nothing"),
    ("mma x4", None, 1, "a run must be in parentheses before it is repeated: (mma)x4"),
    ("m4 x2", None, 1, "(m4)x2"),
    ("mm+f", None, 1, "each side of '+' must be a single name"),
    ("a+(m f)", None, 3, "each side of '+' must be a single name"),
    ("(a+m)+f", None, 1, "each side of '+' must be a single name"),
    ("(m ...)+f", 4, 1, "each side of '+' must be a single name"),
    ("a+", None, 3, "a layer's name must stand here, not the end of the pattern"),
    ("a+x3", None, 3, "'x3' repeats the item before it, and there is none"),
    ("+a", None, 1, "a layer's name must stand here, not '+'"),
    ("m0a", None, 1, "a count must be at least 1"),
    ("(m)x0", None, 4, "a count must be at least 1"),
    ("(m)x00", None, 4, "a count must be at least 1"),
    ("x3 m", None, 1, "'x3' repeats the item before it, and there is none"),
    ("(x3)", None, 2, "'x3' repeats the item before it, and there is none"),
    ("m x2 x3", None, 6, "one repeat after another; put the first in parentheses"),
    ("mx6", None, 2, "a repeat stands alone: 'm x6'"),
    ("attnx6", None, 1, "a repeat stands alone: 'attn x6'"),
    ("*-*-", None, 1, "unexpected character '*'"),
    ("m, a", None, 2, "unexpected character ','"),
    ("m .. a", None, 3, "unexpected character '.'"),
    ("m\u0663", None, 2, "unexpected character"),  # ARABIC-INDIC DIGIT THREE is no digit here
    ("m x\u0663", None, 4, "unexpected character"),
    ("", None, 1, "an empty pattern"),
    (" \n ", None, 4, "an empty pattern"),
    ("m ()", None, 4, "an empty group"),
    ("m4", 5, 1, "the pattern has 4 layers, but depth is 5"),
    ("m", 5, 1, "the pattern has 1 layer, but depth is 5"),
    ("m f ...", None, 5, "'...' needs the number of layers: set depth"),
    ("(mma)...", 32, 6, "'...' cannot fill depth 32; depth 30 or 33 would fit"),
    ("(mma)...", 2, 6, "'...' cannot fill depth 2; depth 3 would fit"),
    ("a (m f)...", 5, 8, "'...' repeats all that stands before it in its group"),
    ("... m", 5, 1, "'...' repeats what stands before it, and nothing does"),
    ("m ... a", 5, 3, "'...' must be the last of its group or of the pattern"),
    ("m ... x2", 5, 3, "'...' must be the last of its group or of the pattern"),
    ("(m ...) (a ...)", 5, 12, "'...' may stand only once"),
    ("m ...", 5000, 3, "depth is 5000, and a pattern has at most 4096 layers"),
]


@pytest.mark.parametrize(("text", "depth", "column", "words"), REFUSALS)
def test_refusal(text, depth, column, words):
    with pytest.raises(PatternError) as caught:
        expand(text, NAMES, depth)
    assert words in caught.value.message
    assert caught.value.column == column


def test_the_message_draws_a_caret():
    with pytest.raises(PatternError) as caught:
        expand("(m f q a)x2", ["m", "f", "a"])
    assert str(caught.value) == (
        "unknown layer 'q'; known: a, f, m (column 6)\n"  #
        "  (m f q a)x2\n"
        "       ^"
    )


def test_the_caret_of_a_long_pattern_points_into_a_window():
    text = "m " * 500 + "q" + " m" * 500
    with pytest.raises(PatternError) as caught:
        expand(text, ["m"])
    shown, pointer = str(caught.value).split("\n")[1:]
    assert caught.value.column == 1001
    assert shown[pointer.index("^")] == "q"
    assert len(shown) < 80
    assert shown.startswith("  …")
    assert shown.endswith("…")


def test_a_tab_or_a_newline_does_not_break_the_picture():
    with pytest.raises(PatternError) as caught:
        expand("m\n\tq", ["m"])
    assert str(caught.value).split("\n")[1:] == ["  m  q", "     ^"]


@pytest.mark.parametrize("name", ["x", "x3", "x12"])
def test_repeats_are_no_names(name):
    assert "repeats" in (name_problem(name) or "")


@pytest.mark.parametrize("name", ["", "3m", "a+m", "a b", "é", "a-b", "m."])
def test_other_words_that_are_no_names(name):
    assert "ASCII letters" in (name_problem(name) or "")


@pytest.mark.parametrize("name", ["m", "M", "_", "xy", "x3a", "mamba2", "swa_wide"])
def test_names(name):
    assert name_problem(name) is None
    assert expand(f"({name} {name} x2)x2", [name]) == (name,) * 6


def test_limits_hold_before_anything_is_expanded():
    assert len(expand("m" * 4096, ["m"])) == 4096
    assert len(expand("m x4096", ["m"])) == 4096
    assert expand("(" * 16 + "m" + ")" * 16, ["m"]) == ("m",)
    for text, words in [
        ("m" * 4097, "at most 4096 characters, this one 4097"),
        ("(" * 17 + "m" + ")" * 17, "nested more than 16 deep"),
        ("m x4097", "more than 4096 layers"),
        ("m4097", "more than 4096 layers"),
        ("m4000 m97", "more than 4096 layers"),
        ("(m4000)x2", "more than 4096 layers"),
        ("(" * 15 + "m" + ")x4096" * 15, "more than 4096 layers"),
        ("m x" + "9" * 4000, "more than 4096 layers"),
        ("m" + "9" * 4000, "more than 4096 layers"),
        ("(m4000 f ...)x2", "more than 4096 layers"),
    ]:
        with pytest.raises(PatternError, match=words):
            expand(text, ["m", "f"], 4096 if "..." in text else None)


def outcome(text, names, depth=None):
    try:
        return expand(text, names, depth)
    except PatternError as error:
        return error


LONG = ["m" * 4096, "m " * 2048, "(" * 4096, "(m" * 2048, "q" * 4096, "m+" * 2048, "mq" * 2048, "m1" * 2048]
LONG += ["((m)x1 " * 500, "." * 4096, "(" * 16 + "m " * 2000 + ")" * 16, "x9" * 2048, "m x" + "1" * 4093]


@pytest.mark.parametrize("text", LONG)
def test_no_text_takes_long(text):
    start = time.perf_counter()
    outcome(text, ["m", "mamba", "attention"])
    # Measured: 13 ms at most; a quadratic step over 4,096 characters would take seconds.
    assert time.perf_counter() - start < 1.0


TEXTS = st.text(max_size=60) | st.text("mfax+.() 0123\u0663", max_size=60)


@given(TEXTS, st.none() | st.integers(1, 99))
@settings(max_examples=500, deadline=1000)
def test_any_text_is_read_or_refused(text, depth):
    names = ["m", "f", "a", "max"]
    result = outcome(text, names, depth)
    if isinstance(result, PatternError):
        assert 1 <= result.column <= len(text) + 1
        assert str(result).endswith("^")
    else:
        assert depth is None or len(result) == depth
        assert expand(canon(result), names) == result


WORDS = st.sampled_from(["m", "f", "a", "attn", "a+m", "mamba2"])


def repeated(inner):
    return st.builds(lambda text, times: f"({text})x{times}", inner, st.integers(1, 5))


PATTERNS = st.recursive(
    st.lists(WORDS, min_size=1, max_size=6).map(" ".join),
    lambda inner: st.lists(repeated(inner) | WORDS, min_size=1, max_size=4).map(" ".join),
    max_leaves=12,
)


@given(PATTERNS)
@settings(max_examples=200, deadline=None)
def test_canon_says_the_same_in_no_more_words(text):
    items = expand(text, NAMES)
    short = canon(items)
    assert expand(short, NAMES) == items
    assert canon(expand(short, NAMES)) == short
    # `text` is itself one of the texts among which canon chooses, up to the length where the search is exact
    assert len(short) <= len(text) or len(items) > 512


def shortest_by_force(items):
    """Length of the shortest text by the interval recursion over every split and every repeat; O(n^3)."""
    best = {}
    for size in range(1, len(items) + 1):
        for i in range(len(items) - size + 1):
            j = i + size
            options = [len(items[i])] if size == 1 else []
            options += [best[i, k] + 1 + best[k, j] for k in range(i + 1, j)]
            for period in range(1, size // 2 + 1):
                if size % period == 0 and items[i : j - period] == items[i + period : j]:
                    count = len(f"x{size // period}")
                    options.append(best[i, i + period] + count + (1 if period == 1 else 2))
            best[i, j] = min(options)
    return best[0, len(items)]


def test_canon_is_shortest():
    for size in range(1, 10):
        for items in itertools.product(["m", "f"], repeat=size):
            assert len(canon(items)) == shortest_by_force(items)
    for string in (MEGATRON_8B, NEMOTRON_3_NANO):
        items = [LETTERS[c] for c in string]
        assert len(canon(items)) == shortest_by_force(items)
    assert len(canon(ZAMBA2)) == shortest_by_force(ZAMBA2)


@pytest.mark.parametrize(
    ("items", "text"),
    [
        (JAMBA, "((m f m e)x2 a f m e m f m e)x4"),
        (QWEN3_NEXT, "((g e)x3 a e)x12"),
        (["a+m", "f"] * 36, "(a+m f)x36"),
        (["m"], "m"),
        (["m", "m"], "m m"),
        (["m"] * 4096, "m x4096"),
        (["m", "f"] * 2048, "(m f)x2048"),
    ],
)
def test_canon_of_published_patterns(items, text):
    assert canon(items) == text
    assert expand(text, NAMES) == tuple(items)


def test_canon_of_4096_layers_is_quick_and_can_be_read():
    state, letters = 1, []
    for _ in range(4096):  # a linear congruential generator: layers without a pattern, Knuth's MMIX constants
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        letters.append("mf"[state >> 63])
    start = time.perf_counter()
    short = canon(letters)
    assert time.perf_counter() - start < 10.0  # measured 0.2 s
    assert expand(short, ["m", "f"]) == tuple(letters)
