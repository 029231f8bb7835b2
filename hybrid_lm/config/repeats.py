"""How a list of layers is said in the fewest characters: the search behind `pattern.canon`.

Dynamic programming over prefixes. The last unit of a prefix is a single item or a repeat, and a repeat lies within one
of the list's maximal repetitions, of which there are fewer than items (Bannai et al. 2017, arXiv:1406.0263); the text of
its root is the same question again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EXACT_LAYERS = 512


class Run(NamedTuple):
    """`items[start:end]` has the period `period`, at least twice, and cannot be made longer."""

    start: int
    end: int
    period: int


def shortest(items: Sequence[str], limit: int) -> str:
    """The text that `pattern.canon` documents; letters are glued only where it would be longer than `limit`."""
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
    """All maximal repetitions with a primitive root, by period, then by start; O(n^2) comparisons of integers."""
    codes = np.unique(np.array(items, dtype=np.str_), return_inverse=True)[1]
    found: dict[tuple[int, int], Run] = {}
    for period in range(1, len(items) // 2 + 1):
        same = np.concatenate(([False], codes[period:] == codes[:-period], [False]))
        starts, ends = np.flatnonzero(same[1:] != same[:-1]).reshape(-1, 2).T
        for i in np.flatnonzero(ends - starts >= period):
            start, end = int(starts[i]), int(ends[i]) + period
            # A stretch already found with a smaller period has a root that is itself a repeat.
            found.setdefault((start, end), Run(start, end, period))
    return list(found.values())


def _glue(text: str) -> str:
    """`m f a` as `mfa`, but not the layer that a repeat belongs to."""
    return re.sub(r"(?<![\w+])(\w) (?=\w(?![\w+]| x\d))", r"\1", text)
