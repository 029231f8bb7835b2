"""Strict YAML: what words mean, where keys stand, and what is refused."""

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_lm.config.yaml import YamlError, load, scalar, value


@pytest.mark.parametrize(
    ("word", "meaning"),
    [
        ("3e-4", 3e-4),  # PyYAML: a string
        ("1e3", 1000.0),  # PyYAML: a string
        ("1.5", 1.5),
        (".5", 0.5),
        ("2.", 2.0),
        ("-1E+2", -100.0),
        ("12", 12),
        ("-7", -7),
        ("010", 10),  # PyYAML: 8
        ("0o10", 8),
        ("0xff", 255),
        ("12:30", "12:30"),  # PyYAML: 750
        ("1_000", "1_000"),  # PyYAML: 1000
        ("NO", "NO"),  # PyYAML: False
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("y", "y"),
        ("2024-01-01", "2024-01-01"),  # PyYAML: a date
        ("=", "="),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("inf", "inf"),
        ("nan", "nan"),
        ("e3", "e3"),
        ("0x", "0x"),
        ("1.2.3", "1.2.3"),
        ("\u0663", "\u0663"),  # ARABIC-INDIC DIGIT THREE
    ],
)
def test_words(word, meaning):
    read = scalar(word)
    assert read == meaning
    assert type(read) is type(meaning)
    assert load(f"key: {word}").data == {"key": meaning}


def test_quoted_and_block_text_is_text():
    document = load("a: '1'\nb: \"true\"\nc: |\n  3e-4\nd: >-\n  x\n  y\ne:\n")
    assert document.data == {"a": "1", "b": "true", "c": "3e-4\n", "d": "x y", "e": None}


def test_keys_are_words_whatever_they_look_like():
    assert load("on: 1\nnull: 2\n1: 3\n'<<': 4").data == {"on": 1, "null": 2, "1": 3, "<<": 4}


def test_lines():
    text = "# a comment\na:\n  b: 1\n  c: [1,\n    2]\n\nd: {e: 1,\n  f: 2}\n"
    assert load(text).lines == {
        ("a",): 2,
        ("a", "b"): 3,
        ("a", "c"): 4,
        ("a", "c", 0): 4,
        ("a", "c", 1): 5,
        ("d",): 7,
        ("d", "e"): 7,
        ("d", "f"): 8,
    }


@pytest.mark.parametrize(
    ("text", "line", "column", "words"),
    [
        ("a: 1\nb: 2\na: 3\n", 3, 1, "the key 'a' stands twice; first in line 1"),
        ("a: {b: 1, b: 2}", 1, 11, "the key 'b' stands twice"),
        ("a: *b", 1, 4, "aliases (*b) are not allowed; quote a text that begins with '*'"),
        ("a: &b 1", 1, 4, "anchors (&b) are not allowed"),
        ("&b a: 1", 1, 1, "anchors (&b) are not allowed"),
        (
            "a: !!python/object:os.system x",
            1,
            4,
            "tags (tag:yaml.org,2002:python/object:os.system) are not allowed",
        ),
        ("a: !!str 1", 1, 4, "tags"),
        ("<<: {a: 1}", 1, 1, "merge keys (<<) are not allowed"),
        ("? [a]\n: 1", 1, 3, "a key must be a word"),
        ("- 1", 1, 1, "a mapping of keys to values must stand here, not a list"),
        ("word", 1, 1, "a mapping of keys to values must stand here, not a single value"),
        ("", 1, 1, "a mapping of keys to values must stand here, not nothing"),
        ("# only a comment\n", 1, 1, "not nothing"),
        ("a: 1\n---\nb: 2", 2, 1, "a second document"),
        ("a: [1", 1, 6, "expected ',' or ']'"),
        ("a:\n\tb: 1", 2, 1, "indent with blanks, not with a tab"),
        ("pattern: *-*-", 1, 12, "while scanning an alias"),
        ("a: b: c", 1, 5, "mapping values are not allowed here"),
        ("a: 1\nb: \x00", 2, 4, "the character U+0000 is not allowed"),
        (b"a: 1\nb: \xff", 2, 4, "not UTF-8: byte 0xff"),
        ("a: 1e999", 1, 4, "1e999 is beyond the range of a float"),
        ("a: " + "9" * 5000, 1, 4, "a number of 5000 digits"),
        ("a: " + "[" * 40 + "]" * 40, 1, 35, "nested more than 32 deep"),
        ("a: " + "{b: " * 40, 1, 128, "nested more than 32 deep"),
        ("a: " + "x" * 1_000_000, 1, 1, "larger than 1,000,000 bytes"),
    ],
)
def test_refusals(text, line, column, words):
    with pytest.raises(YamlError) as caught:
        load(text)
    assert words in caught.value.message
    assert (caught.value.line, caught.value.column) == (line, column)


def test_the_picture():
    with pytest.raises(YamlError) as caught:
        load("model:\n  pattern: *m f\n")
    assert str(caught.value) == (
        "2:12: aliases (*m) are not allowed; quote a text that begins with '*'\n"
        "    pattern: *m f\n"  #
        "             ^"
    )


@pytest.mark.parametrize("text", ["a: " + "[" * 300_000, "a:\n" + "- " * 300_000, "{a: " * 200_000])
def test_deep_nesting_is_refused_at_once(text):
    start = time.perf_counter()
    with pytest.raises(YamlError, match="nested more than 32 deep"):
        load(text)
    assert time.perf_counter() - start < 5.0  # measured 0.2 s: the reader looks at all characters first


def outcome(raw):
    try:
        return load(raw)
    except YamlError as error:
        return error


@given(st.binary(max_size=200) | st.text("a:- {}[]&*!|>'\"%@`,?#\n\t~1.e", max_size=80))
@settings(max_examples=500, deadline=1000)
def test_any_bytes_are_read_or_refused(raw):
    result = outcome(raw)
    if isinstance(result, YamlError):
        assert result.line >= 1
        assert result.column >= 1
    else:
        assert isinstance(result.data, dict)


def test_override_values():
    assert value("[1, 2.5, NO]") == [1, 2.5, "NO"]
    assert value("{a: 1e3}") == {"a": 1000.0}
    assert value("'1'") == "1"
    assert value("(m f)x6") == "(m f)x6"
    assert value(" 3e-4 ") == 3e-4
    assert value("run #3: a test") == "run #3: a test"  # no comments and no mappings outside of brackets
    assert value("*") == "*"
    assert value("") is None
    with pytest.raises(YamlError, match="expected ',' or ']'"):
        value("[1, 2")
    with pytest.raises(YamlError):
        value("[1] 2")
