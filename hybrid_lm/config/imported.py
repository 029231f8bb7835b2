"""`init_from`: the `model` section and the tokenizer that a run takes over from the model it starts from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from pydantic import ValidationError

from hybrid_lm.config.explain import Finding, explain
from hybrid_lm.config.pattern import canon
from hybrid_lm.config.places import replaced
from hybrid_lm.config.recipes import Recipes
from hybrid_lm.config.schema import InitFromConfig, ModelConfig
from hybrid_lm.registry import locate, unknown

WHERE = ("init_from",)


class Imported(NamedTuple):
    """What a folder says of the model in it, without its weights."""

    model: ModelConfig
    tokenizer: dict[str, Any] | None
    """As `data.tokenizer`; None: there is none beside it."""


def run_folder(path: str) -> FilePath | None:
    """The run's folder, if `path` is that of a run or of one of its checkpoints."""
    for folder in (FilePath(path), FilePath(path).resolve().parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "manifest.json").is_file():
            return folder
    return None


def imported(path: str) -> Imported:
    """The architecture and the tokenizer of a run, a Hugging Face folder or a hub name.

    Raises ValueError for what is none of them, or an architecture that is not read here.
    """
    run = run_folder(path)
    # Found by their places: reading what others have written is not the business of the configuration.
    reader = "hybrid_lm.train.init_from:of_run" if run else "hybrid_lm.hf.architecture:of_checkpoint"
    return Imported(*locate(reader)(path if run is None else run))


def fill(data: dict[str, Any]) -> list[Finding]:
    """Completes, in place, the data of a run that has `init_from`; returns what is wrong with it.

    A `model` with a pattern is whole and stays as it is. Anything else in `model` differs from the imported
    one: recipes are added or changed, other fields set. `data.tokenizer`, if left out, is the imported one.
    """
    given, model = data.get("init_from"), data.get("model")
    if given is None or not isinstance(model, Mapping | None):
        return []
    try:
        wanted = InitFromConfig.model_validate(given)
    except ValidationError as error:
        found = explain(InitFromConfig, given, error)
        return [Finding((*WHERE, *finding.path), finding.reason, finding.picture) for finding in found]
    whole, text = "pattern" in (model or {}), data.setdefault("data", {"kind": "text"})
    bare = isinstance(text, dict) and text.get("kind") == "text" and text.get("tokenizer") is None
    if whole and not bare:
        return []
    try:
        found = imported(wanted.path)
    except ValueError as error:
        return [Finding((*WHERE, "path"), str(error))]
    if bare:
        if found.tokenizer is None:
            reason = "missing, and the imported model has none; say {kind: bytes}, or where there is one"
            return [Finding(("data", "tokenizer"), reason)]
        text["tokenizer"] = found.tokenizer
    if whole:
        return []
    try:
        data["model"] = changed(found.model, model or {}, wanted.replace)
    except ValueError as error:
        return [Finding((*WHERE, "replace"), str(error))]
    return []


def changed(base: ModelConfig, given: Mapping[str, Any], replace: Mapping[str, str | None]) -> dict[str, Any]:
    """The `model` section of `base` with what is given over it, and other items at the replaced places.

    Raises ValueError for places and recipes that are not there.
    """
    plain = base.model_dump()
    for recipe in plain["layers"].values():
        recipe["residual"] = {key: x for key, x in recipe["residual"].items() if x is not None}
    model = overlaid(plain, given)
    if given.get("depth") is not None:
        raise ValueError("model.depth: the imported pattern has its own; write model.pattern too")
    layers = model["layers"] if isinstance(model.get("layers"), dict) else {}
    items, _ = replaced(base, replace)
    for word, item in replace.items():
        for name in (item or "").split("+"):
            if name and name not in layers:
                raise ValueError(f"{word}: {item}: {unknown('recipe', name, layers)}; add it to model.layers")
    model |= {"pattern": canon(items), "depth": None}
    # Imported recipes that stand nowhere any more go; one that the user has written is an error of theirs.
    used = {name for name, _ in Recipes(model).seen}
    own = given.get("layers") or {}
    model["layers"] = {name: recipe for name, recipe in layers.items() if name in used or name in own}
    return model


def overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; a recipe of another type takes the place of the one below as a whole."""
    made = copy.deepcopy(dict(below))
    for key, value in above.items():
        old = made.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = "type" in old and value.get("type", old["type"]) != old["type"]
            made[key] = dict(value) if other else overlaid(old, value)
        else:
            made[key] = value
    return made
