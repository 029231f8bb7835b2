"""Random architectures over the alphabet of each family export natively and come back; what is outside
becomes remote code, and the reason names it."""

from __future__ import annotations

import random
import types
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from native_models import CONFIGS
from pydantic import BaseModel
from transformers import AutoConfig

from hybrid_lm.config.pattern import canon, expand
from hybrid_lm.config.recipes import Recipes
from hybrid_lm.config.schema import Config, ModelConfig
from hybrid_lm.hf.convert import explicit, from_hf, to_hf
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import Family, differences, filled
from hybrid_lm.hf.native import choose
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.laws import shake
from hybrid_lm.model.build import build_model
from hybrid_lm.registry import table

DRAWS, CHANGES = 4, 4
"""Architectures for each family, and changes of one option to each."""
MORE = 4
"""Blocks of a drawn pattern that are there already."""

BOUND_ORDER = {
    "jamba": "attention and experts come back after a fixed number of layers",
    "deepseek_v3": "MLPs are in the first layers, experts in all others",
}
"""Families whose fields cannot say every order of their layers: the orders that they have are drawn."""

FOREIGN = {"short_conv": {"type": "short_conv", "width": 3}, "mamba": {"type": "mamba"}}
"""Layers for families that have none like them."""

COUPLED = {"window": "rope", "n_heads": "n_kv_heads"}
"""Options that decide about another one in some families."""


def drawn_fields(name: str, rng: random.Random) -> dict[str, Any]:
    """A native configuration: one of the family's, with some fields of its others."""
    made = dict(rng.choice(CONFIGS[name]))
    other = rng.choice(CONFIGS[name])
    for field in sorted(made.keys() | other.keys()):
        if rng.random() < 0.25 and made.get(field) != other.get(field):
            made.pop(field, None)
            made |= {field: other[field]} if field in other else {}
    return made


def architectures(name: str, rng: random.Random) -> Iterator[ModelConfig]:
    """Random architectures of a family: options by its fields, layers by position."""
    family, found, tries = FAMILIES[name], 0, 0
    while found < DRAWS:
        tries += 1
        # Fields of two configurations need not go together; most do.
        assert tries < 20 * DRAWS, f"{found} of {tries} drawn configurations are possible"
        try:
            config = family.read(AutoConfig.for_model(name, **drawn_fields(name, rng)).to_dict())
            build_model(config, weights=False)
        # Whatever the class itself says of fields that do not go together.
        except Exception:
            continue
        found += 1
        yield config if name in BOUND_ORDER else reordered(config, blocks_of(family, config), rng)


def blocks_of(family: Family, config: ModelConfig) -> list[tuple[str, ...]]:
    """The items of each of its blocks, each sort once."""
    items = list(expand(config.pattern, list(config.layers), config.depth))
    blocks = [tuple(items.pop(0) for _ in block) for block in family.describe(config).blocks]
    return list(dict.fromkeys(blocks))


def reordered(config: ModelConfig, blocks: Sequence[tuple[str, ...]], rng: random.Random) -> ModelConfig:
    """The same recipes in another order: all of `blocks`, and up to `MORE` of them again."""
    drawn = [*blocks, *rng.choices(blocks, k=rng.randint(0, MORE))]
    rng.shuffle(drawn)
    made = explicit(config) | {"pattern": canon([item for block in drawn for item in block]), "depth": None}
    used = {name for name, _ in Recipes(made).seen}
    made["layers"] = {name: recipe for name, recipe in made["layers"].items() if name in used}
    return ModelConfig.model_validate(made)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_any_order_of_its_layers_goes_out_and_comes_back(name):
    family, rng = FAMILIES[name], random.Random(f"order of {name}")
    for config in architectures(name, rng):
        fields = choose(config, f"native:{name}").fields
        again = family.read(filled(family, fields))
        assert not list(differences(family.describe(config), family.describe(again))), config.pattern
        # `auto` takes this class, or one that stands before it and says the same.
        assert choose(config).family is not None
    round_trip(family, config)


def round_trip(family: Family, config: ModelConfig) -> None:
    """Weights go out, compute the same there, and come back bit for bit."""
    model = build_model(config, seed=1)
    shake(model, 1)
    theirs = to_hf(model, format=f"native:{family.name}")
    cached = not family.cached_differs(theirs.config.to_dict())
    verify_object(theirs, model, native=family.tolerance, cached=cached)
    back = from_hf(theirs, check=False)
    pairs = zip(model.named_parameters(), back.named_parameters(), strict=True)
    assert all(one[0] == other[0] and torch.equal(one[1], other[1]) for one, other in pairs)


@pytest.mark.parametrize("name", [name for name in CONFIGS if len(FAMILIES[name].layout.blocks) > 1])
def test_one_sort_of_block_alone_goes_out_or_is_refused(name):
    family, rng = FAMILIES[name], random.Random(f"alone {name}")
    sorts = {block: config for config in architectures(name, rng) for block in blocks_of(family, config)}
    for block, config in sorts.items():
        alone = reordered(config, [block], rng)
        # What the class cannot be made of or run with is refused; what is not refused runs.
        if why_not(alone, name) is None:
            round_trip(family, alone)


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_option_outside_is_named(name):
    rng, outside = random.Random(f"outside {name}"), 0
    for config in architectures(name, rng):
        for _ in range(CHANGES):
            changed, option = with_another_option(config, rng)
            try:
                build_model(changed, weights=False)
            except ValueError:
                # Not outside of the family: it is no model.
                continue
            reason = why_not(changed, name)
            if reason is not None:
                outside += 1
                words = said_by(FAMILIES[name], option)
                assert any(word in reason for word in words), f"{option}: {reason}"
    assert outside, "nothing of what was drawn was outside"


@pytest.mark.parametrize("name", list(CONFIGS))
def test_one_layer_outside_is_named(name):
    rng = random.Random(f"layer outside {name}")
    for config in architectures(name, rng):
        items = list(expand(config.pattern, list(config.layers), config.depth))
        at = rng.randrange(len(items))
        made, kinds = (
            explicit(config),
            {kind for item in FAMILIES[name].layout.blocks for kind in chain(*item)},
        )
        kind = next(kind for kind in FOREIGN if kind not in kinds)
        made["layers"]["foreign"] = FOREIGN[kind]
        made |= {"pattern": canon([*items[:at], "foreign", *items[at:]]), "depth": None}
        changed = ModelConfig.model_validate(made)
        reason = why_not(changed, name)
        assert reason is not None
        assert kind in reason or f"{len(items) + 1} layers are no whole number" in reason, reason
        target = choose(changed)
        assert target.family is None
        assert target.reasons.keys() == set(FAMILIES)


def why_not(config: ModelConfig, name: str) -> str | None:
    """The reason for which an architecture is not of a family; None if it is."""
    try:
        choose(config, f"native:{name}")
    except ConversionError as error:
        return str(error).removeprefix(f"not {name}: ")
    return None


def said_by(family: Family, option: str) -> list[str]:
    """The words by which a reason can name an option: itself, what it decides about, and the fields and
    options of a rule that is about it."""
    about = [rule for rule in family.rules if option in repr(vars(rule))]
    ours = (str(path).rpartition(".")[2] for rule in about for path in flat(vars(rule).get("ours", ())))
    fields = (field for rule in about for field in rule.theirs)
    return [option, *ours, *fields, *([COUPLED[option]] if option in COUPLED else [])]


def flat(paths: str | Sequence[str]) -> Sequence[str]:
    """One path or several."""
    return [paths] if isinstance(paths, str) else paths


def with_another_option(config: ModelConfig, rng: random.Random) -> tuple[ModelConfig, str]:
    """The same architecture but for one option of one recipe or of the model, and that option's name."""
    data = explicit(config)
    places: list[tuple[dict[str, Any], type[Config]]] = [
        (recipe, table("layer")[recipe["type"]].Options) for recipe in data["layers"].values()
    ]
    fields = ModelConfig.model_fields
    places += [(data[key], fields[key].annotation) for key in ("block", "embedding", "head")]  # type: ignore[misc]
    while True:
        section, kind = rng.choice(places)
        option = rng.choice(sorted(kind.model_fields))
        value = another(section[option], kind.model_fields[option].annotation, rng)
        if value != section[option]:
            section[option] = value
            try:
                return ModelConfig.model_validate(data), option
            except ValueError:
                return with_another_option(config, rng)


def another(value: Any, kind: Any, rng: random.Random) -> Any:
    """Another value of an option's type; the same if there is none to be thought of."""
    kinds = list(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else [kind]
    if type(None) in kinds:
        kinds.remove(type(None))
        if value is not None and rng.random() < 0.5:
            return None
    kind = rng.choice(kinds)
    if get_origin(kind) is Literal:
        return rng.choice([x for x in get_args(kind) if x != value])
    if isinstance(value, bool) or kind is bool:
        return not value
    if isinstance(value, int) and kind is int:
        return rng.choice([value * 2, value + 1])
    if isinstance(value, float):
        return value * 2 + 0.125
    if isinstance(value, dict) and isinstance(value.get("theta"), float):
        return {**value, "theta": value["theta"] * 2}
    if value is None and isinstance(kind, type) and issubclass(kind, BaseModel):
        return {}
    return {int: 8, float: 0.375}.get(kind, value) if value is None else value
