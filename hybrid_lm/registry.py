"""Lazy tables `name -> "module:attribute"`, with an error that names the nearest known name.

A table imports nothing until an entry is asked for, so one missing optional dependency breaks one entry and
listing the names is free. `table("layer")` finds a table by its place, which lets the configuration edge ask
a layer for its `Options` without importing upwards.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from typing import Any

TABLES = {
    "layer": "hybrid_lm.layers:LAYERS",
    "probe": "hybrid_lm.probes:PROBES",
}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was probably meant to be, or None."""
    known = list(known)
    folded = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), folded, n=1, cutoff=0.6)
    return folded[close[0]] if close else None


def unknown(what: str, name: str, known: Iterable[str]) -> str:
    """The sentence for an unknown name: what it is, what is known, and what was probably meant."""
    known = sorted(known)
    close = nearest(name, known)
    hint = f". Did you mean {close!r}?" if close else ""
    return f"unknown {what} {name!r}; known: {', '.join(known) or 'none'}{hint}"


class UnknownName(ValueError):
    """A name that a table does not hold."""


def locate(place: str) -> Any:
    """Imports `"module:attribute"` and returns the attribute."""
    module, _, attribute = place.partition(":")
    return getattr(import_module(module), attribute)


class Registry(Mapping[str, Any]):
    """A read-only table of lazily imported objects."""

    def __init__(self, what: str, places: Mapping[str, str]):
        self.what = what
        self._places = dict(places)

    def __getitem__(self, name: str) -> Any:
        if name not in self._places:
            raise UnknownName(unknown(self.what, name, self._places))
        return locate(self._places[name])

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def place(self, name: str) -> str:
        """Where an entry lives, as `"module:attribute"`, without importing it."""
        return self._places[name]

    def add(self, name: str, place: str) -> None:
        """Adds an entry at run time: an out-of-tree layer, or a test's."""
        if name in self._places:
            raise ValueError(f"{self.what} {name!r} is already defined by {self._places[name]}")
        self._places[name] = place

    def remove(self, name: str) -> None:
        """Takes out an entry that `add` put in."""
        del self._places[name]


def table(what: str) -> Registry:
    """The table of all entries of one sort: `table("layer")["mamba2"]` is the class `Mamba2`."""
    return locate(TABLES[what])
