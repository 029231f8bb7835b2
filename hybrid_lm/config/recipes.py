"""The second look at `model`: what the schema cannot know, because it belongs to the layers.

Works on the data as it was written, so that one wrong section does not hide what is wrong in another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from hybrid_lm.config.base import Part
from hybrid_lm.config.explain import Finding, Path, explain
from hybrid_lm.config.pattern import PatternError, expand, name_problem
from hybrid_lm.config.report import caret
from hybrid_lm.config.schema import Recipe
from hybrid_lm.registry import table, unknown

LAYERS: Path = ("model", "layers")


def split_options(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a recipe that are its layer's own."""
    return {key: value for key, value in recipe.items() if key not in Recipe.model_fields}


def part_options(options: BaseModel) -> Iterator[tuple[str, str]]:
    """The options of a layer that name other recipes, with their pattern texts."""
    for key, field in type(options).model_fields.items():
        text = getattr(options, key)
        if text is not None and any(isinstance(mark, Part) for mark in field.metadata):
            yield key, text


class Recipes:
    """The recipes of `model.layers` with their options read by the layers; `findings` is what is wrong with
    them."""

    def __init__(self, model: Mapping[str, Any]):
        self.model = model
        layers = model.get("layers")
        layers = layers if isinstance(layers, Mapping) else {}
        self.raw = {name: recipe for name, recipe in layers.items() if isinstance(name, str)}
        self.options: dict[str, BaseModel] = {}
        self.findings: list[Finding] = []
        self.seen: set[tuple[str, int | None]] = set()
        for name, recipe in self.raw.items():
            self.read(name, recipe)
        if isinstance(model.get("pattern"), str) and self.raw:
            self.walk_pattern(model["pattern"])

    def add(self, path: Path, reason: str, picture: str = "") -> None:
        finding = Finding(path, reason, picture)
        if finding not in self.findings:
            self.findings.append(finding)

    def read(self, name: str, recipe: Any) -> None:
        """Has the layer's own `Options` read what the recipe says."""
        if problem := name_problem(name):
            self.add((*LAYERS, name), problem)
        if not isinstance(recipe, Mapping) or not isinstance(recipe.get("type"), str):
            return
        path, kinds = (*LAYERS, name), table("layer")
        if recipe["type"] not in kinds:
            self.add((*path, "type"), unknown("layer", recipe["type"], kinds))
            return
        try:
            options = kinds[recipe["type"]].Options
        except ImportError as error:
            self.add((*path, "type"), f"the layer cannot be imported: {error}")
            return
        given = split_options(recipe)
        try:
            self.options[name] = options.model_validate(given)
        except ValidationError as error:
            for finding in explain(options, given, error, more=Recipe.model_fields):
                self.add((*path, *finding.path), finding.reason)
        if recipe.get("per_call") is not None and recipe.get("share", False) is False:
            self.add((*path, "per_call"), "only a shared recipe has calls; add share: true")

    def items(self, path: Path, text: str, depth: int | None = None) -> tuple[str, ...]:
        """A pattern's items; none, and a finding, if it cannot be read."""
        try:
            return expand(text, list(self.raw), depth)
        except PatternError as error:
            # The report shows the whole value; the caret needs the text right above it.
            reason = f"{error.message} (column {error.column})"
            self.add(path, reason, caret(error.text, error.column, indent="    "))
            return ()

    def walk_pattern(self, text: str) -> None:
        depth, width = self.model.get("depth"), self.model.get("d_model")
        if depth is not None and not _positive(depth):
            return
        items = self.items(("model", "pattern"), text, depth)
        for item in sorted(set(items)):
            for name in item.split("+"):
                self.visit(name, width if _positive(width) else None, ())
        used = {name for name, _ in self.seen}
        if not items or any(name not in self.options for name in used):
            return  # what a broken recipe would have named is not known
        for name in self.raw:
            if name not in used and not name.startswith("_"):
                self.add((*LAYERS, name), "nothing names it; take it out, or begin its name with '_'")

    def visit(self, name: str, width: int | None, above: tuple[str, ...]) -> None:
        """Checks a recipe at an input width, and those that it names."""
        if (name, width) in self.seen:
            return
        self.seen.add((name, width))
        options = self.options.get(name)
        if options is None:
            return
        kind = table("layer")[self.raw[name]["type"]]
        path, above = (*LAYERS, name), (*above, name)
        if width is not None:
            for key, reason in options.check(width):  # type: ignore[attr-defined]
                self.add((*path, key), reason)
        for key, text in part_options(options):
            for index, item in enumerate(self.items((*path, key), text)):
                inner = None if width is None else kind.part_width(key, index, width)
                for part in item.split("+"):
                    if part in above:
                        circle = " -> ".join((*above[above.index(part) :], part))
                        self.add((*path, key), f"a recipe cannot contain itself: {circle}")
                        return
                    self.visit(part, inner, above)


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
