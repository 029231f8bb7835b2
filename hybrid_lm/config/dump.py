"""A configuration as text: YAML that loads to an equal one, and a fingerprint of the architecture."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import yaml as pyyaml

from hybrid_lm.config import yaml
from hybrid_lm.config.pattern import expand
from hybrid_lm.config.recipes import part_options
from hybrid_lm.config.schema import ModelConfig, Recipe, RunConfig
from hybrid_lm.registry import table


def dump_yaml(config: RunConfig) -> str:
    """The configuration as YAML, with its defaults; `load_config` of it is equal to `config`."""
    data = config.model_dump()
    if data["init_from"] is None:
        del data["init_from"]
    for recipe in data["model"]["layers"].values():
        recipe["residual"] = {key: value for key, value in recipe["residual"].items() if value is not None}
        for key in ("share", "per_call", "residual"):
            if not recipe[key]:
                del recipe[key]
    return pyyaml.dump(
        data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110
    )


class _Dumper(pyyaml.SafeDumper):
    """PyYAML's writer, with what our reader refuses left out and what it reads otherwise quoted."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> pyyaml.Node:
        try:
            # What cannot be seen (a control character, another line break) is written as an escape.
            plain = data.isprintable() and isinstance(yaml.scalar(data), str)
        except yaml.YamlError:
            plain = False
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else '"')


_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_representer(tuple, pyyaml.SafeDumper.represent_list)


def architecture_hash(config: RunConfig | ModelConfig) -> str:
    """SHA-256 (hex) of what `architecture` says without the defaults: equal for configurations that are the
    same model in other words, and not changed by an option that is new and not used."""
    model = config.model if isinstance(config, RunConfig) else config
    said = architecture(model, defaults=False)
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def architecture(model: ModelConfig, *, defaults: bool = True) -> dict[str, Any]:
    """The expanded layers with all their options, and the fields of the model around them.

    The names of recipes, the spelling of the pattern, unused recipes and the starting values (`model.init`)
    are not part of it; which occurrences share weights is. Options are compared as they are set: `n_kv_heads:
    null` and the number that it stands for are two things. defaults: with the options that are as they are by
    default.
    """
    parts = {"d_model", "vocab_size", "block", "embedding", "head", "final_norm"}
    around = model.model_dump(include=parts, exclude_defaults=not defaults)
    described = _Describer(model, defaults)
    layers = [described.item(item) for item in expand(model.pattern, list(model.layers), model.depth)]
    return {**around, "layers": layers}


class _Describer:
    """Recipes as plain data without their names; shared ones are numbered in the order in which they
    occur."""

    def __init__(self, model: ModelConfig, defaults: bool):
        self.model = model
        self.shown: dict[str, Any] = {"exclude_defaults": not defaults}
        self.shared: dict[str, int] = {}

    def item(self, item: str) -> list[dict[str, Any]]:
        return [self.recipe(name) for name in item.split("+")]

    def recipe(self, name: str) -> dict[str, Any]:
        recipe: Recipe = self.model.layers[name]
        options = table("layer")[recipe.type].Options.model_validate(dict(recipe.options))
        described = {
            "type": recipe.type,
            "residual": recipe.residual.apply(self.model.block).model_dump(**self.shown),
            "options": options.model_dump(**self.shown),
        }
        if recipe.copies:
            described["shared"] = self.shared.setdefault(name, len(self.shared))
            described["copies"] = recipe.copies
            if recipe.shares_norms:
                described["norms"] = True
            described["per_call"] = recipe.per_call and recipe.per_call.model_dump()
        for key, text in part_options(options):
            described["options"][key] = [self.item(item) for item in expand(text, list(self.model.layers))]
        return described
