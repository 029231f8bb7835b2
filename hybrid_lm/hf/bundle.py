"""Remote code for an export: our own sources, as far as an architecture needs them, as two files.

Starting from the classes that a loader asks for, every top-level statement that they reach is taken over as
it stands, comments included, in the order of the imports. What changes: imports of this package go; names
that two modules use for different things get their module's name behind them; pydantic is replaced by
`hf.plain_config`, the table of layers by the layers of this architecture, and the namespace of the operators
by the file's own.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import hybrid_lm
from hybrid_lm.hf.sources import PACKAGE, BundleError, Source, Statement, Symbol, file_of, read_source
from hybrid_lm.registry import table

WRAPPER = "hybrid_lm.hf.wrapper"
CONFIGURATION, MODELING = "configuration_hybrid_lm", "modeling_hybrid_lm"
TABLE = Symbol("hybrid_lm.registry", "table")


class Edit(NamedTuple):
    """A stretch of one line (column numbers in UTF-8 bytes) and what to write in its place."""

    line: int
    start: int
    end: int
    text: str


class Bundler:
    """Our sources, read as they are needed, and the statements that are taken over from each."""

    def __init__(self) -> None:
        self.sources: dict[str, Source] = {}
        self.order: list[str] = []

    def source(self, name: str) -> Source:
        if name not in self.sources:
            found = self.sources[name] = read_source(name)
            for symbol in found.ours.values():
                meant = self.resolve(*symbol)
                assert meant is not None, f"{name}: {symbol.module} has no {symbol.name}"
                self.source(meant.module)
            # After what it imports, so that everything is defined before it is used.
            self.order.append(name)
        return self.sources[name]

    def resolve(self, module: str, name: str) -> Symbol | None:
        """Where a name of a module is defined, through any number of imports; None if it is not ours."""
        source = self.source(module)
        if source.definition(name):
            return Symbol(module, name)
        # A package that imports a module of its own names itself: that is the module.
        if name in source.ours and source.ours[name] != (module, name):
            return self.resolve(*source.ours[name])
        return Symbol(f"{module}.{name}", "") if file_of(f"{module}.{name}") else None

    def uses(self, module: str, node: ast.AST) -> Iterator[tuple[ast.expr, Symbol]]:
        """The names of ours in a piece of code: the expression to replace, and what it means."""
        inside: set[int] = set()
        for part in ast.walk(node):
            if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                found = self.resolve(module, part.value.id)
                if found is not None and not found.name:
                    inside.add(id(part.value))
                    target = self.resolve(found.module, part.attr)
                    assert target is not None, f"{module}: {found.module} has no {part.attr}"
                    yield part, target
            elif isinstance(part, ast.Name) and id(part) not in inside:
                found = self.resolve(module, part.id)
                if found is not None and found.name:
                    yield part, found

    def reach(self, roots: Iterable[Symbol], known: set[Symbol]) -> set[Symbol]:
        """All that `roots` need, beyond `known`."""
        reached: set[Symbol] = set()
        open_ends = list(roots)
        while open_ends:
            symbol = open_ends.pop()
            if symbol in reached or symbol in known:
                continue
            reached.add(symbol)
            if symbol == TABLE:
                continue
            source = self.source(symbol.module)
            for statement in source.statements:
                if symbol.name in statement.defines or statement.effect_on == symbol.name:
                    open_ends += [Symbol(symbol.module, name) for name in statement.defines]
                    open_ends += [used for _, used in self.uses(symbol.module, statement.node)]
        return reached

    def kept(self, module: str, symbols: set[Symbol]) -> list[Statement]:
        """The statements of a module that are taken over."""
        names = {symbol.name for symbol in symbols if symbol.module == module and symbol != TABLE}
        return [s for s in self.source(module).statements if names & {*s.defines, s.effect_on}]

    def imports(self, symbols: set[Symbol]) -> dict[str, str]:
        """Name -> import statement of everything from outside that the kept statements use."""
        found: dict[str, str] = {}
        for module in self.order:
            source = self.source(module)
            for statement in self.kept(module, symbols):
                for part in ast.walk(statement.node):
                    if isinstance(part, ast.Name) and part.id in source.others:
                        line = source.others[part.id]
                        if found.setdefault(part.id, line) != line:
                            raise BundleError(f"{module}: `{line}` elsewhere is `{found[part.id]}`")
        return found

    def text(self, module: str, statement: Statement, names: dict[Symbol, str]) -> str:
        """A statement's source with the names that it has in the bundle."""
        source, edits = self.source(module), []
        for part, symbol in self.uses(module, statement.node):
            written = ast.unparse(part)
            if names[symbol] != written:
                if isinstance(part, ast.Name) and bound_inside(statement.node, part.id):
                    raise BundleError(f"{module}: {part.id} is also a local name near line {part.lineno}")
                edits.append(Edit(part.lineno, part.col_offset, part.end_col_offset or 0, names[symbol]))
        node = statement.node
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "_":
            start = node.col_offset + len("class " if isinstance(node, ast.ClassDef) else "def ")
            new = names[Symbol(module, node.name)]
            edits.append(Edit(node.lineno, start, start + len(node.name), new))
        for part in ast.walk(node):
            if not (isinstance(part, ast.Constant) and isinstance(part.value, str)):
                continue
            if part.value.startswith(f"{PACKAGE}::"):
                new = f'f"{{OPERATORS}}::{part.value.partition("::")[2]}"'
                edits.append(Edit(part.lineno, part.col_offset, part.end_col_offset or 0, new))
        lines = {n: source.lines[n - 1].encode() for n in range(statement.first + 1, statement.last + 1)}
        for edit in sorted(set(edits), reverse=True):
            line = lines[edit.line]
            lines[edit.line] = line[: edit.start] + edit.text.encode() + line[edit.end :]
        for part in ast.walk(node):
            # Imports of ours inside functions: what they bind is in this file.
            if isinstance(part, ast.ImportFrom) and (part.module or "").partition(".")[0] == PACKAGE:
                for n in range(part.lineno, (part.end_lineno or 0) + 1):
                    lines.pop(n)
        return b"\n".join(lines.values()).decode()


def bound_inside(node: ast.AST, name: str) -> bool:
    """Whether a function somewhere in `node` has a parameter or variable of this name."""
    for function in ast.walk(node):
        if isinstance(function, ast.FunctionDef | ast.Lambda):
            for part in ast.walk(function):
                if isinstance(part, ast.arg) and part.arg == name:
                    return True
                if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Store):
                    return True
    return False


def unique_names(symbols: set[Symbol], taken: set[str]) -> dict[Symbol, str]:
    """A name in the bundle for each symbol: its own, with its module's behind it if two have it."""
    count = Counter(symbol.name for symbol in symbols) + Counter(taken)
    names = {
        s: s.name if count[s.name] == 1 else f"{s.name}_{s.module.rpartition('.')[2]}"
        for s in sorted(symbols)
    }
    twice = [name for name, n in Counter(names.values()).items() if n > 1 or name in taken]
    if twice:
        raise BundleError(f"names that stay ambiguous: {', '.join(twice)}")
    return names


HEADER = '''"""{what} of a hybrid_lm model, as one file that needs torch and transformers only.

Generated by hybrid_lm {version} from its own sources; do not edit. Apache-2.0.
"""

from __future__ import annotations

'''

OPERATORS = """# Operators have ASCII names, known to the whole process: this copy has a namespace of its own.
OPERATORS = "hybrid_lm_" + re.sub(r"\\W", "_", ascii(__name__))

"""

LAYERS = '''
# The layers of this architecture, in place of hybrid_lm's table of all there are.
LAYERS = {{{entries}}}


def {name}(what: str) -> dict[str, type]:
    """The table of layers."""
    assert what == "layer", what
    return LAYERS
'''


def bundle(layer_types: Iterable[str]) -> dict[str, str]:
    """File name -> source of the remote code for models made of these layer types (keys of the layer table).

    Deterministic: the same sources and types give the same text.
    """
    bundler = Bundler()
    places = {kind: Symbol(*table("layer").place(kind).split(":")) for kind in sorted(set(layer_types))}
    for kind, symbol in places.items():
        if file_of(symbol.module) is None:
            raise ValueError(
                f"layer {kind!r} lives in {symbol.module}: remote code can hold layers of {PACKAGE} only"
            )
    bundler.source(WRAPPER)
    for symbol in places.values():
        bundler.source(symbol.module)
    first = bundler.reach([Symbol(WRAPPER, "HybridLMConfig")], set())
    second = bundler.reach([Symbol(WRAPPER, "HybridLMForCausalLM"), *places.values()], first)
    taken = {*bundler.imports(first | second), "OPERATORS", "LAYERS"}
    names = unique_names(first | second, taken)
    layers = ", ".join(f'"{kind}": {names[symbol]}' for kind, symbol in places.items())
    own_table = LAYERS.format(entries=layers, name=names[TABLE])
    shared = sorted({names[s] for s in used_by(bundler, second) & first})
    link = f"from .{CONFIGURATION} import (\n    " + ",\n    ".join(shared) + ",\n)\n\n"
    return {
        f"{CONFIGURATION}.py": write(bundler, first, names, "The configuration", "", ""),
        f"{MODELING}.py": write(bundler, second, names, "The code", link + OPERATORS, own_table),
    }


def used_by(bundler: Bundler, symbols: set[Symbol]) -> set[Symbol]:
    """Everything of ours that the kept statements name."""
    return {
        used
        for module in bundler.order
        for statement in bundler.kept(module, symbols)
        for _, used in bundler.uses(module, statement.node)
    }


def write(
    bundler: Bundler, symbols: set[Symbol], names: dict[Symbol, str], what: str, head: str, tail: str
) -> str:
    """One file: header, imports, `head`, the statements of each module under its docstring, `tail`."""
    imports = {*bundler.imports(symbols).values(), *(["import re"] if "re." in head else [])}
    ordered = sorted(imports, key=lambda line: (line.startswith("from"), line))
    parts = [HEADER.format(what=what, version=hybrid_lm.__version__), "\n".join(ordered), "\n\n", head]
    for module in bundler.order:
        kept = bundler.kept(module, symbols)
        if kept:
            doc = bundler.source(module).doc.split("\n")
            title = f"\n# {module}: " + "\n# ".join(doc).replace("# \n", "#\n")
            parts.append(title.rstrip() + "\n\n")
            parts += [bundler.text(module, statement, names).rstrip() + "\n\n" for statement in kept]
    parts.append(tail)
    return re.sub(r"\n{4,}", "\n\n\n", "".join(parts)).rstrip() + "\n"
