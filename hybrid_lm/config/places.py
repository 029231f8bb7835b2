"""Places of a model in words: layers by number (`3`), from-to (`0-11`) or recipe (`a`), and the parts around
them (`embed`, `embed_positions`, `final_norm`, `lm_head`)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from hybrid_lm.config.pattern import expand
from hybrid_lm.config.recipes import part_options
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.registry import nearest, table

ENDS = {
    "embed": ("embed.",),
    "embed_positions": ("embed_positions.",),
    "final_norm": ("final_norm.",),
    "lm_head": ("lm_head.", "lm_bias"),
}
"""The parts around the layers, and how the names of their parameters begin."""

NUMBERS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


class Spot(NamedTuple):
    """A layer of a pattern (counted from 0), or one branch of a parallel layer."""

    layer: int
    branch: int | None = None
    """None: the whole layer, with its norms."""


class Home(NamedTuple):
    """Where the weights of a recipe are."""

    recipe: str
    prefix: str
    """How the names of the parameters begin."""
    layer: int | None
    """None: weights that several layers use."""


def spots(word: str | int, items: Sequence[str]) -> list[Spot]:
    """The layers that `word` means in a pattern's items. The name of a recipe that stands in parallel with
    others means its branch.

    Raises ValueError for a number that is no layer's, and for a word that names none.
    """
    numbers = NUMBERS.fullmatch(str(word))
    if numbers:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if first > last or last >= len(items):
            raise ValueError(f"{word}: there are the layers 0-{len(items) - 1}")
        return [Spot(i) for i in range(first, last + 1)]
    found = []
    for i, item in enumerate(items):
        branches = item.split("+")
        same = [Spot(i, j) for j, name in enumerate(branches) if name == word]
        found += [Spot(i)] if item == word or len(same) == len(branches) else same
    if not found:
        raise ValueError(no_place(str(word), items))
    return found


def no_place(word: str, items: Sequence[str]) -> str:
    """What to say of a word that means nothing."""
    names = dict.fromkeys(name for item in items for name in item.split("+"))
    close = nearest(word, [*names, *ENDS])
    hint = f". Did you mean {close!r}?" if close else ""
    return f"{word!r} is no place; there are {', '.join(names)}, 0-{len(items) - 1}, {', '.join(ENDS)}{hint}"


def prefix(spot: Spot) -> str:
    """How the names of a place's parameters begin."""
    return f"layers.{spot.layer}." + ("" if spot.branch is None else f"layer.layers.{spot.branch}.")


def homes(model: ModelConfig) -> Iterator[Home]:
    """Where each recipe of a model has weights, those that are parts of other layers included."""

    def inside(path: str, item: str, layer: int | None) -> Iterator[Home]:
        names = item.split("+")
        for j, name in enumerate(names):
            recipe = model.layers[name]
            each = recipe.residual.apply(model.block).placement == "pre_each"
            branch = f"{path}layer.layers.{j}."
            yield Home(name, path if len(names) == 1 else branch, layer)
            inner = f"{path}layer." if len(names) == 1 else f"{branch}layer." if each else branch
            shared = [f"shared.{name}.{k}." for k in range(recipe.copies)]
            yield from (Home(name, core, None) for core in shared)
            options = table("layer")[recipe.type].Options.model_validate(dict(recipe.options))
            for key, text in part_options(options):
                for index, part in enumerate(expand(text, list(model.layers))):
                    for core, owner in [(core, None) for core in shared] or [(inner, layer)]:
                        yield from inside(f"{core}{key}.{index}.", part, owner)

    for i, item in enumerate(expand(model.pattern, list(model.layers), model.depth)):
        yield from inside(f"layers.{i}.", item, i)


def replaced(model: ModelConfig, replace: Mapping[str, str | None]) -> tuple[list[str], list[str]]:
    """A model's items with others at some places, and how the names of the parameters there begin.

    replace: place -> the item that stands there from now on; None: the same one, which starts afresh.

    Raises ValueError for a word that is no place, for a place that is named twice, and for an item that
    cannot stand there.
    """
    items = expand(model.pattern, list(model.layers), model.depth)
    new, prefixes, taken = [item.split("+") for item in items], [], dict[Spot, str]()
    for word, item in replace.items():
        if item is None:
            prefixes += within(model, [word])
            continue
        if word in ENDS and word not in model.layers:
            raise ValueError(f"{word}: null is all that can stand here; it starts afresh")
        for spot in spots(word, items):
            for other, earlier in taken.items():
                if other.layer == spot.layer and (None in (other.branch, spot.branch) or other == spot):
                    raise ValueError(f"{word}: {earlier} names layer {spot.layer} too")
            if spot.branch is not None and "+" in item:
                raise ValueError(f"{word}: {item} cannot be one branch of layer {spot.layer}")
            taken[spot] = word
            prefixes.append(prefix(spot))
            if spot.branch is None:
                new[spot.layer] = item.split("+")
            else:
                new[spot.layer][spot.branch] = item
    return ["+".join(names) for names in new], prefixes


def within(model: ModelConfig, words: Sequence[str | int]) -> list[str]:
    """How the names of the parameters at some places begin. The name of a recipe means all its weights:
    shared ones, and those of parts of other layers.

    Raises ValueError for a word that is no place, and for a number whose layer has weights that others use.
    """
    items = expand(model.pattern, list(model.layers), model.depth)
    known = list(homes(model))
    shared = {home.recipe for home in known if home.layer is None}
    found: list[str] = []
    for word in words:
        by_name = [home.prefix for home in known if home.recipe == word]
        if by_name:
            found += by_name
        elif word in ENDS:
            found += ENDS[word]
        else:
            for spot in spots(word, items):
                both = [home.recipe for home in known if home.layer == spot.layer and home.recipe in shared]
                if both:
                    raise ValueError(
                        f"{word}: layer {spot.layer} shares the weights of {both[0]} with others; name "
                        f"{both[0]}, and it means all of them"
                    )
                found.append(prefix(spot))
    return found
