"""YAML without its traps: read the way a person reads it, or not at all.

PyYAML's scanner, but not its meaning of words: scalars follow the core schema of YAML 1.2.2, section 10.3, so
`3e-4` and `1e3` are floats, `010` is ten, and `NO`, `on` and `12:30` are words. A key that stands twice, an
alias, an anchor, a tag, a merge key, a second document, or a tree deeper than 32 is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, NoReturn

import yaml

from hybrid_lm.config.report import caret

MAX_BYTES = 1_000_000
MAX_DEPTH = 32

Path = tuple[str | int, ...]

CONSTANTS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
MAX_DIGITS = 400  # more than any float holds; Python refuses to convert very long ones


class YamlError(ValueError):
    """Text that is not the YAML we read. `line` and `column` count from 1; `picture` shows the place."""

    def __init__(self, message: str, line: int = 1, column: int = 1, picture: str = ""):
        super().__init__(message, line, column, picture)
        self.message, self.line, self.column, self.picture = message, line, column, picture

    def __str__(self) -> str:
        return f"{self.line}:{self.column}: {self.message}" + (f"\n{self.picture}" if self.picture else "")


class Document(NamedTuple):
    """Plain data, and the line (from 1) of each key and list entry by its path."""

    data: dict[str, Any]
    lines: dict[Path, int]


def scalar(text: str) -> bool | int | float | str | None:
    """The value of an unquoted word by the core schema of YAML 1.2.

    Raises:
        YamlError: for a number with too many digits or beyond the range of a float.
    """
    if text in CONSTANTS:
        return CONSTANTS[text]
    if INTEGER.fullmatch(text):
        if len(text) > MAX_DIGITS:
            raise YamlError(f"a number of {len(text)} digits; at most {MAX_DIGITS} are read")
        base = {"0o": 8, "0x": 16}.get(text[:2], 10)
        return int(text, base)
    if FLOAT.fullmatch(text):
        value = float(text)
        if math.isinf(value):
            raise YamlError(f"{text} is beyond the range of a float; write .inf for infinity")
        return value
    return text


def value(text: str) -> Any:
    """The value of an override: `[...]`, `{...}` and quoted text as in a file, anything else one word or
    text.

    Raises:
        YamlError: as `load` does.
    """
    text = text.strip()
    if text[:1] not in ("[", "{", '"', "'"):
        return scalar(text)
    return _Reader(text).document()


def load(text: str | bytes) -> Document:
    """Reads one YAML document whose top level is a mapping.

    Raises:
        YamlError: with the line and the column.
    """
    if len(text) > MAX_BYTES:
        raise YamlError(f"larger than {MAX_BYTES:,} bytes; a configuration is never that long")
    if isinstance(text, bytes):
        text = _decode(text)
    reader = _Reader(text)
    data = reader.document()
    if not isinstance(data, dict):
        kind = {list: "a list", type(None): "nothing"}.get(type(data), "a single value")
        raise YamlError(f"a mapping of keys to values must stand here, not {kind}")
    return Document(data, reader.lines)


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        column = error.start - raw.rfind(b"\n", 0, error.start)
        raise YamlError(f"not UTF-8: byte 0x{raw[error.start]:02x}", line, column) from None


class _Reader:
    def __init__(self, text: str):
        self.text = text
        self.lines: dict[Path, int] = {}
        self.events = self.parse()

    def fail(self, message: str, mark: Any) -> NoReturn:
        lines = self.text.splitlines()
        picture = caret(lines[mark.line], mark.column + 1) if mark.line < len(lines) else ""
        raise YamlError(message, mark.line + 1, mark.column + 1, picture)

    def parse(self) -> Iterator[Any]:
        """The parser's events, without those of the stream; its errors as ours."""
        try:
            for event in yaml.parse(self.text, Loader=yaml.SafeLoader):
                if not isinstance(event, yaml.StreamStartEvent | yaml.StreamEndEvent):
                    yield event
        except yaml.MarkedYAMLError as error:
            parts = [part for part in (error.context, error.problem) if part]
            message = ": ".join(parts)
            if "'\\t'" in message:
                message += "; indent with blanks, not with a tab"
            self.fail(message, error.problem_mark or error.context_mark)
        except yaml.reader.ReaderError as error:
            before = self.text[: error.position]
            line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
            raise YamlError(f"the character U+{error.character:04X} is not allowed", line, column) from None

    def document(self) -> Any:
        if next(self.events, None) is None:
            return None
        data = self.node(next(self.events), ())
        next(self.events)
        extra = next(self.events, None)
        if extra is not None:
            self.fail("a second document; one file holds one", extra.start_mark)
        return data

    def node(self, event: Any, path: Path) -> Any:
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent):
            self.fail(f"aliases (*{event.anchor}) are not allowed; quote a text that begins with '*'", mark)
        if event.anchor is not None:
            self.fail(f"anchors (&{event.anchor}) are not allowed; quote a text that begins with '&'", mark)
        if event.tag is not None:
            self.fail(f"tags ({event.tag}) are not allowed; quote a text that begins with '!'", mark)
        if isinstance(event, yaml.ScalarEvent):
            return self.word(event)
        if len(path) >= MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} deep", mark)
        return self.mapping(path) if isinstance(event, yaml.MappingStartEvent) else self.sequence(path)

    def word(self, event: yaml.ScalarEvent) -> Any:
        if event.style:
            return event.value
        try:
            return scalar(event.value)
        except YamlError as error:
            self.fail(error.message, event.start_mark)

    def sequence(self, path: Path) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            inner = (*path, len(items))
            self.lines[inner] = event.start_mark.line + 1
            items.append(self.node(event, inner))
        return items

    def mapping(self, path: Path) -> dict[str, Any]:
        items: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.key(event)
            inner = (*path, key)
            if key in items:
                self.fail(
                    f"the key {key!r} stands twice; first in line {self.lines[inner]}", event.start_mark
                )
            self.lines[inner] = event.start_mark.line + 1
            items[key] = self.node(next(self.events), inner)
        return items

    def key(self, event: Any) -> str:
        """A key as it is written: `on`, `1` and `null` are names here."""
        if isinstance(event, yaml.CollectionStartEvent):
            self.fail("a key must be a word", event.start_mark)
        self.node(event, ())  # refuses an alias, an anchor, a tag
        if event.value == "<<" and not event.style:
            self.fail("merge keys (<<) are not allowed; write the keys out", event.start_mark)
        return event.value
