"""The pattern language: a short text that says which layer stands where.

    pattern  := item+                              items are separated by blanks
    item     := branch [ "xN" ]                    xN repeats the item before it, N >= 1
    branch   := atom ( "+" atom )*                 "+": parallel layers on one normed input, outputs summed
    atom     := NAME | "(" pattern ")"             a group takes part in "+" only if it is a single name
    NAME     := a known name; otherwise a run of one-letter names with optional counts: m4a2 = m m m m a a
    "..."    := once, at the end of a group or the pattern: repeat what stands before it to fill the depth

A word that is a known name is that name, whatever its letters. `x` and `x3` can be no names (`name_problem`),
so `x3` is always a repeat: after `)` or as a word of its own, never glued to a name. It repeats one layer or
one group: a run of several letters wants parentheses first, `(mma)x4`. `...` repeats all that stands before
it in its group, so `a (m f ...)` is one `a` and then as many `m f` as fit.

One recursive descent over the tokens, linear in the text. Every limit is checked before anything is expanded.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from hybrid_lm.config.repeats import shortest
from hybrid_lm.config.report import caret
from hybrid_lm.registry import nearest, unknown

MAX_CHARACTERS = 4096
MAX_NESTING = 16
MAX_LAYERS = 4096

# ASCII only, no nested quantifiers: each alternative is decided by its first character.
TOKEN = re.compile(r"(?P<blank>[ \t\r\n]+)|(?P<word>[A-Za-z0-9_]+)|(?P<fill>\.\.\.)|(?P<mark>[()+])")
REPEAT = re.compile(r"x[0-9]+")
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class PatternError(ValueError):
    """A pattern that cannot be read. `str()` is the message, the text around the fault, and a caret below it.

    `column` counts characters of `text` from 1.
    """

    def __init__(self, message: str, text: str, column: int):
        super().__init__(message, text, column)
        self.message, self.text, self.column = message, text, column

    def __str__(self) -> str:
        return f"{self.message} (column {self.column})\n{caret(self.text, self.column)}"


def name_problem(name: str) -> str | None:
    """Why a key of `model.layers` could not be used in a pattern, or None."""
    if not NAME.fullmatch(name):
        return "a layer's name is ASCII letters, digits and '_', and begins with no digit"
    if name == "x" or REPEAT.fullmatch(name):
        return "'x' and 'x3' mean repeats in a pattern and cannot name a layer"
    return None


def expand(text: str, names: Collection[str], depth: int | None = None) -> tuple[str, ...]:
    """The layers that a pattern stands for, in order; parallel layers as one item, `"a+m"`.

    Args:
        text: the pattern.
        names: the known layer names.
        depth: number of layers; needed by `...`, and checked without it.

    Raises:
        PatternError: with the column, the known names and the nearest one.
    """
    if len(text) > MAX_CHARACTERS:
        message = f"a pattern has at most {MAX_CHARACTERS} characters, this one {len(text)}"
        raise PatternError(message, text, MAX_CHARACTERS + 1)
    parser = _Parser(text, frozenset(names))
    group = parser.pattern()
    fills = _fills(parser, group, depth)
    items: list[str] = []
    _emit(group, fills, items)
    return tuple(items)


def canon(items: Sequence[str]) -> str:
    """The shortest text that `expand` turns back into `items`; the same items always give the same text.

    Shortest: fewest characters among the texts made of whole names, one blank between items, and nested
    repeats `m x3` and `(m f)x3`; ties go to fewer parentheses. That is exact up to 512 layers. Above, a
    repeat is sought only at the two ends of each stretch that repeats: 4,096 layers take well under a second,
    and a shorter text may exist. `...` is never used. Letters are glued (`mmf`) only where the text would
    pass the 4,096 characters that `expand` reads; read it back with names that have no such longer one.
    """
    assert items, "no pattern means no layers"
    return shortest(items, MAX_CHARACTERS)


@dataclass(frozen=True)
class _Group:
    """Items in order, `times` over; with `fill`, as often as it takes."""

    items: tuple[str | _Group, ...]
    times: int = 1
    fill: bool = False
    fixed: int = field(init=False)  # the group has fixed + fills * per_fill layers
    per_fill: int = field(init=False)

    def __post_init__(self) -> None:
        fixed = sum(1 if isinstance(item, str) else item.fixed for item in self.items)
        per_fill = sum(0 if isinstance(item, str) else item.per_fill for item in self.items)
        if self.fill:
            fixed, per_fill = 0, fixed
        object.__setattr__(self, "fixed", fixed * self.times)
        object.__setattr__(self, "per_fill", per_fill * self.times)

    @property
    def least(self) -> int:
        """Layers with one fill."""
        return self.fixed + self.per_fill


@dataclass(frozen=True)
class _Token:
    kind: str  # "word", "fill", "(", ")", "+" or "end"
    text: str
    start: int  # from 0

    @property
    def end(self) -> int:
        return self.start + len(self.text)


class _Parser:
    def __init__(self, text: str, names: frozenset[str]):
        self.text, self.names = text, names
        self.letters = frozenset(name for name in names if len(name) == 1)
        self.tokens = self.tokenize()
        self.index = 0
        self.fill_at: int | None = None

    def fail(self, message: str, at: int) -> NoReturn:
        raise PatternError(message, self.text, at + 1)

    def tokenize(self) -> list[_Token]:
        tokens, at = [], 0
        while at < len(self.text):
            match = TOKEN.match(self.text, at)
            if match is None:
                allowed = "a pattern has names, blanks, '(', ')', '+', 'x3' and '...'"
                self.fail(f"unexpected character {self.text[at]!r}; {allowed}", at)
            kind = str(match.lastgroup)
            if kind != "blank":
                tokens.append(_Token(match[0] if kind == "mark" else kind, match[0], at))
            at = match.end()
        return [*tokens, _Token("end", "", at)]

    @property
    def token(self) -> _Token:
        return self.tokens[self.index]

    def take(self) -> _Token:
        self.index += 1
        return self.tokens[self.index - 1]

    def pattern(self) -> _Group:
        group = self.items(nesting=0)
        if self.token.kind == ")":
            self.fail("')' closes nothing", self.token.start)
        return group

    def items(self, nesting: int) -> _Group:
        items: list[str | _Group] = []
        layers = 0
        while self.token.kind not in (")", "end", "fill"):
            start = self.token.start
            item = self.item(nesting)
            layers += 1 if isinstance(item, str) else item.least
            self.check_layers(layers, start)
            items.append(item)
        if self.token.kind == "fill":
            self.check_fill(items)
            self.fill_at = self.take().start
            return _Group(tuple(items), fill=True)
        if not items:
            self.fail(
                "an empty group" if nesting else "an empty pattern; known: " + self.known, self.token.start
            )
        return _Group(tuple(items))

    @property
    def known(self) -> str:
        return ", ".join(sorted(self.names)) or "none"

    def check_layers(self, layers: int, at: int) -> None:
        if layers > MAX_LAYERS:
            self.fail(f"more than {MAX_LAYERS} layers", at)

    def check_fill(self, items: list[str | _Group]) -> None:
        fill, before, after = self.token, self.tokens[self.index - 1], self.tokens[self.index + 1]
        if self.fill_at is not None:
            self.fail("'...' may stand only once in a pattern", fill.start)
        if not items:
            self.fail("'...' repeats what stands before it, and nothing does", fill.start)
        if after.kind not in (")", "end"):
            self.fail("'...' must be the last of its group or of the pattern", fill.start)
        if len(items) > 1 and before.end == fill.start:
            message = "'...' repeats all that stands before it in its group, not only the last item: "
            self.fail(
                message + "put a blank before it, or parentheses around both: 'a (m f ...)'", fill.start
            )

    def item(self, nesting: int) -> str | _Group:
        start = self.token.start
        item = self.branch(nesting)
        if not self.at_repeat():
            return item
        repeat = self.take()
        if isinstance(item, _Group) and self.text[start] != "(" and item.least > 1:
            run = self.text[start : repeat.start].strip()
            self.fail(f"a run must be in parentheses before it is repeated: ({run}){repeat.text}", start)
        times = self.count(repeat.text[1:], repeat.start)
        inner = (item,) if isinstance(item, str) else item.items
        fill = isinstance(item, _Group) and item.fill
        item = _Group((_Group(inner, fill=True),), times) if fill else _Group(inner, times)
        self.check_layers(item.least, repeat.start)
        if self.at_repeat():
            self.fail("one repeat after another; put the first in parentheses: (m x2)x3", self.token.start)
        return item

    def at_repeat(self) -> bool:
        return self.token.kind == "word" and REPEAT.fullmatch(self.token.text) is not None

    def count(self, digits: str, at: int) -> int:
        digits = digits.lstrip("0")
        if not digits:
            self.fail("a count must be at least 1", at)
        # By length first: the value of a long number is never computed.
        if len(digits) > len(str(MAX_LAYERS)) or int(digits) > MAX_LAYERS:
            self.fail(f"more than {MAX_LAYERS} layers", at)
        return int(digits)

    def branch(self, nesting: int) -> str | _Group:
        start = self.token.start
        first = self.atom(nesting)
        if self.token.kind != "+":
            return first
        names = [self.single(first, start)]
        while self.token.kind == "+":
            self.take()
            start = self.token.start
            names.append(self.single(self.atom(nesting), start))
        return "+".join(names)

    def single(self, atom: str | _Group, at: int) -> str:
        while isinstance(atom, _Group) and len(atom.items) == 1 and atom.times == 1 and not atom.fill:
            atom = atom.items[0]
        if not isinstance(atom, str) or "+" in atom:
            self.fail("each side of '+' must be a single name", at)
        return atom

    def atom(self, nesting: int) -> str | _Group:
        token = self.take()
        if token.kind == "(":
            if nesting == MAX_NESTING:
                self.fail(f"parentheses nested more than {MAX_NESTING} deep", token.start)
            group = self.items(nesting + 1)
            if self.take().kind != ")":
                self.fail("'(' is never closed", token.start)
            return group
        if token.kind == "word" and not REPEAT.fullmatch(token.text):
            return self.word(token)
        if token.kind == "word":
            self.fail(f"{_short(token.text)!r} repeats the item before it, and there is none", token.start)
        if token.kind == "fill":
            self.fail("a layer's name must stand here, not '...'", token.start)
        found = "the end of the pattern" if token.kind == "end" else f"{token.text!r}"
        self.fail(f"a layer's name must stand here, not {found}; known: {self.known}", token.start)

    def word(self, token: _Token) -> str | _Group:
        """A known name, or else a run of one-letter names with optional counts."""
        word = token.text
        if word in self.names:
            return word
        items: list[str | _Group] = []
        layers = at = 0
        while at < len(word):
            if word[at] not in self.letters:
                self.unknown(token, at)
            start = at
            at += 1
            while at < len(word) and word[at].isdigit():
                at += 1
            count = self.count(word[start + 1 : at], token.start + start) if at > start + 1 else 1
            layers += count
            self.check_layers(layers, token.start + start)
            items.append(word[start] if count == 1 else _Group((word[start],), count))
        return _Group(tuple(items))

    def unknown(self, token: _Token, at: int) -> NoReturn:
        word = token.text
        # A word that resembles a longer name, or whose first letter is unknown, was not meant as a run.
        whole = at == 0 or nearest(word, self.names - self.letters) is not None
        message = unknown("layer", _short(word if whole else word[at]), self.names)
        if not whole:
            message = f"{message} (in {_short(word)!r}, read as a run of one-letter names)"
        stem, x, digits = word.rpartition("x")
        if x and digits.isdigit() and (stem in self.names or set(stem) <= self.letters):
            message = f"{message}; a repeat stands alone: '{_short(stem)} x{_short(digits)}'"
        self.fail(message, token.start + (0 if whole else at))


def _short(word: str) -> str:
    return word if len(word) <= 40 else word[:39] + "…"


def _fills(parser: _Parser, group: _Group, depth: int | None) -> int:
    """How often `...` repeats its group so that the pattern has exactly `depth` layers."""
    if parser.fill_at is None:
        if depth is not None and group.fixed != depth:
            parser.fail(f"the pattern has {_layers(group.fixed)}, but depth is {depth}", 0)
        return 1
    if depth is None:
        parser.fail("'...' needs the number of layers: set depth", parser.fill_at)
    if depth > MAX_LAYERS:
        parser.fail(f"depth is {depth}, and a pattern has at most {MAX_LAYERS} layers", parser.fill_at)
    fills, rest = divmod(depth - group.fixed, group.per_fill)
    if fills >= 1 and not rest:
        return fills
    below = group.fixed + max(fills, 1) * group.per_fill
    near = f"{below} or {below + group.per_fill}" if below < depth else f"{below}"
    parser.fail(f"'...' cannot fill depth {depth}; depth {near} would fit", parser.fill_at)


def _layers(n: int) -> str:
    return "1 layer" if n == 1 else f"{n} layers"


def _emit(group: _Group, fills: int, out: list[str]) -> None:
    once: list[str] = []
    for item in group.items:
        if isinstance(item, str):
            once.append(item)
        else:
            _emit(item, fills, once)
    out.extend(once * (group.times * (fills if group.fill else 1)))
