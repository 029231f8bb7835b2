"""How problems in a configuration are told: where, what, and what would work, all of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

WINDOW = 72  # characters of a long line that are shown


def caret(text: str, column: int, indent: str = "  ") -> str:
    """Two lines: `text`, cut to a window if it is long, and a caret under its `column` (from 1)."""
    at = column - 1
    start = max(0, min(at - WINDOW // 2, len(text) - WINDOW))
    end = start + WINDOW
    head, tail = "…" if start else "", "…" if end < len(text) else ""
    shown = "".join(c if c.isprintable() else " " for c in text[start:end])
    return f"{indent}{head}{shown}{tail}\n{indent}{' ' * (at - start + len(head))}^"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: `where: what`, and lines that show the place."""

    where: str
    what: str
    line: int = 0
    picture: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" + (f"\n{self.picture}" if self.picture else "")


class ConfigError(ValueError):
    """A configuration that cannot be used; `str()` is the whole report, one line per problem, in the file's
    order."""

    def __init__(self, source: str, problems: Iterable[Problem]):
        self.source = source
        self.problems = tuple(sorted(problems, key=lambda problem: problem.line))
        super().__init__(source, self.problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        told = "\n".join(str(problem) for problem in self.problems)
        return f"{self.source}: {len(self.problems)} problems\n" + "\n".join(
            f"  {line}" for line in told.split("\n")
        )


def show(value: Any) -> str:
    """A value in a message: as in YAML, text quoted, cut if long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= WINDOW else text[: WINDOW - 1] + "…"
