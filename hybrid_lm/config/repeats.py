"""How a list of layers is said in the fewest characters: the search behind `pattern.canon`.

Dynamic programming over prefixes. The last unit of a prefix is a single item or a repeat, and a repeat lies
within one of the list's maximal repetitions, of which there are fewer than items (Bannai et al. 2017,
arXiv:1406.0263); the text of its root is the same question again.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import NamedTuple

EXACT_LAYERS = 512


class Run(NamedTuple):
    """`items[start:end]` has the period `period`, at least twice, and cannot be made longer."""

    start: int
    end: int
    period: int


def shortest(items: Sequence[str], limit: int) -> str:
    """The text that `pattern.canon` documents; letters are glued only where it would be longer than
    `limit`."""
    text = _shortest(tuple(items), {}, exact=len(items) <= EXACT_LAYERS)
    return text if len(text) <= limit else min(_glue(text), _glue(" ".join(items)), key=len)


def _shortest(items: tuple[str, ...], known: dict[tuple[str, ...], str], exact: bool) -> str:
    if items in known:
        return known[items]
    # best[i]: cost of items[:i], and its last unit as (start, text)
    best: list[tuple[int, int]] = [(-1, 0)]
    last: list[tuple[int, str]] = [(0, "")]
    units: dict[int, list[tuple[int, int, int]]] = {}
    for run in runs(items):
        for start, end in _candidates(run, exact):
            units.setdefault(end, []).append((start, run.period, (end - start) // run.period))
    for end, item in enumerate(items, start=1):
        cost, nested = best[end - 1]
        chosen, unit = (cost + 1 + len(item), nested), (end - 1, item)
        for start, period, times in units.get(end, ()):
            root = _shortest(items[start : start + period], known, exact)
            group = period > 1
            text = f"({root})x{times}" if group else f"{root} x{times}"
            cost, nested = best[start]
            option = (cost + 1 + len(text), nested + text.count("("))
            if option < chosen:
                chosen, unit = option, (start, text)
        best.append(chosen)
        last.append(unit)
    known[items] = _join(last)
    return known[items]


def _join(last: list[tuple[int, str]]) -> str:
    texts, end = [], len(last) - 1
    while end:
        end, text = last[end]
        texts.append(text)
    return " ".join(reversed(texts))


def _candidates(run: Run, exact: bool) -> list[tuple[int, int]]:
    """The repeats (start, end) inside a run that may be units of a text."""
    start, end, period = run
    pairs = (
        [(a, b) for a in range(start, end) for b in range(a + 2 * period, end + 1, period)] if exact else []
    )
    if not exact:
        pairs = [(start, b) for b in range(start + 2 * period, end + 1, period)]
        pairs += [(a, end) for a in range(end - 2 * period, start, -period)]
    return pairs


def runs(items: Sequence[str]) -> list[Run]:
    """All maximal repetitions with a primitive root, by period, then by start; O(n^2) comparisons of
    integers."""
    numbers = {item: number for number, item in enumerate(dict.fromkeys(items))}
    codes = [numbers[item] for item in items]
    found: dict[tuple[int, int], Run] = {}
    for period in range(1, len(codes) // 2 + 1):
        # same[i]: items i and i + period are equal; a period's length of ones is a repeat
        same = bytes(map(operator.eq, codes, codes[period:])) + b"\0"
        once = b"\1" * period
        start = same.find(once)
        while start >= 0:
            end = same.index(b"\0", start)
            # A stretch already found with a smaller period has a root that is itself a repeat.
            found.setdefault((start, end + period), Run(start, end + period, period))
            start = same.find(once, end)
    return list(found.values())


def _glue(text: str) -> str:
    """`m f a` as `mfa`, but not the layer that a repeat belongs to."""
    return re.sub(r"(?<![\w+])(\w) (?=\w(?![\w+]| x\d))", r"\1", text)
