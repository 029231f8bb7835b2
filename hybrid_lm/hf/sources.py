"""Our own modules as data: their top-level statements, and what their imports bind. Nothing is run."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import hybrid_lm

PACKAGE = "hybrid_lm"
STAND_INS = {"pydantic": "hybrid_lm.hf.plain_config"}
"""Packages that an export does without, and the module of ours that does their work there."""


class Symbol(NamedTuple):
    """A top-level name of one of our modules, or with an empty name the module itself."""

    module: str
    name: str


class BundleError(AssertionError):
    """Our sources use a form that cannot be bundled: an error of ours, found by the tests."""


@dataclass
class Statement:
    """A top-level statement with the comments above it."""

    node: ast.stmt
    first: int
    """Index of its first line."""
    last: int
    """Index after its last line."""
    defines: tuple[str, ...] = ()
    effect_on: str | None = None
    """For a statement that only has an effect: the name that it acts on."""


@dataclass
class Source:
    """One of our modules, taken apart."""

    name: str
    lines: list[str] = field(default_factory=list)
    doc: str = ""
    statements: list[Statement] = field(default_factory=list)
    ours: dict[str, Symbol] = field(default_factory=dict)
    """Local name -> what it was imported as."""
    others: dict[str, str] = field(default_factory=dict)
    """Local name -> the import statement that binds it."""

    def definition(self, name: str) -> Statement | None:
        """The statement that defines `name` here."""
        return next((s for s in self.statements if name in s.defines), None)


@cache
def file_of(module: str) -> Path | None:
    """The source of one of our modules, found without importing anything; None if there is no such module."""
    place = Path(hybrid_lm.__file__).parents[1].joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def read_source(name: str) -> Source:
    """Reads a module of ours without running it."""
    path = file_of(name)
    if path is None:
        raise BundleError(f"no source for {name}")
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    source = Source(name, text.split("\n"), ast.get_docstring(tree) or "")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            note_import(source, node, top=node in tree.body)
    end = 0
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            # The docstring of the module, or that of the assignment above it.
            if source.statements:
                source.statements[-1].last = node.end_lineno or 0
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            source.statements.append(read_statement(source, node, end))
        end = node.end_lineno or 0
    return source


def note_import(source: Source, node: ast.Import | ast.ImportFrom, *, top: bool) -> None:
    """Enters what an import binds: in `ours`, or, if it stands at the top, in `others`."""
    origin = node.module if isinstance(node, ast.ImportFrom) else None
    for alias in node.names:
        local = alias.asname or alias.name
        home = STAND_INS.get(origin or "", origin or "")
        if home.partition(".")[0] == PACKAGE:
            source.ours[local] = Symbol(home, alias.name)
        elif alias.name.partition(".")[0] == PACKAGE:
            raise BundleError(f"{source.name}: `import {alias.name}`; write `from ... import ...`")
        elif top and origin != "__future__":
            rename = f" as {alias.asname}" if alias.asname else ""
            source.others[local.partition(".")[0]] = (
                f"from {origin} import {alias.name}{rename}" if origin else f"import {alias.name}{rename}"
            )


def read_statement(source: Source, node: ast.stmt, end: int) -> Statement:
    """A statement, from the comments above it (below line `end`) to its end, with what it is for."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    while first > end and source.lines[first - 1].startswith("#"):
        first -= 1
    statement = Statement(node, first, node.end_lineno or 0)
    if isinstance(node, ast.FunctionDef) and node.name == "_":
        statement.effect_on = root(node.decorator_list[0])
    elif isinstance(node, ast.FunctionDef | ast.ClassDef):
        statement.defines = (node.name,)
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        names = [n for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)]
        if all(isinstance(n.ctx, ast.Store) for n in names):
            statement.defines = tuple(n.id for n in names)
        else:
            statement.effect_on = root(targets[0])
    elif isinstance(node, ast.Expr):
        statement.effect_on = root(node.value)
    else:
        raise BundleError(f"{source.name}:{node.lineno}: a {type(node).__name__} at the top of a module")
    return statement


def root(node: ast.expr) -> str | None:
    """The name that an expression starts with: `f` of `f(x).y[0]`."""
    while isinstance(node, ast.Call | ast.Attribute | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None
