"""From a configuration to a model: recipes become layers, occurrences share what they share, weights get
their start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hybrid_lm.config.base import Part
from hybrid_lm.config.pattern import expand
from hybrid_lm.config.schema import BlockConfig, ModelConfig, RunConfig
from hybrid_lm.layers.base import Layer
from hybrid_lm.layers.block import Branch, Parallel, Residual, Shared
from hybrid_lm.model.init import initialise
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops import backend as backends
from hybrid_lm.registry import table


class Builder:
    """Turns the items of a pattern into layers, keeping count of the occurrences of each recipe."""

    def __init__(self, config: ModelConfig):
        self.config = config
        self.shared: dict[str, list[Layer]] = {}
        self.calls: dict[str, int] = {}

    def residuals(self) -> list[Layer]:
        """The layers of the model's pattern."""
        c = self.config
        return [Residual(*self.item(text, c.d_model)) for text in expand(c.pattern, list(c.layers), c.depth)]

    def item(self, text: str, d_in: int) -> tuple[Layer, BlockConfig]:
        """The layer of one item (`a`, or `a+m` in parallel) and its place in the residual stream."""
        names = text.split("+")
        blocks = [self.config.layers[name].residual.apply(self.config.block) for name in names]
        if any(block != blocks[0] for block in blocks):
            raise ValueError(
                f"model.layers: {text} is one item of the residual stream, but {' and '.join(names)} have "
                "different `residual` settings"
            )
        block, layers = blocks[0], [self.occurrence(name, d_in) for name in names]
        if len(layers) == 1:
            return layers[0], block
        if block.placement == "pre_each":
            own = block.model_copy(update={"placement": "pre"})
            around = block.model_copy(update={"placement": "none"})
            return Parallel([Branch(layer, own) for layer in layers]), around
        if any(layer.reads_raw for layer in layers):
            raise ValueError(
                f"model.pattern: {text}: a layer that norms its own input cannot share the norm of a +; "
                "placement: pre_each gives each its own"
            )
        return Parallel(layers), block

    def occurrence(self, name: str, d_in: int) -> Layer:
        """One more occurrence of a recipe."""
        recipe = self.config.layers[name]
        if not recipe.copies:
            if recipe.per_call is not None:
                raise ValueError(
                    f"model.layers.{name}.per_call: only a recipe with `share` has calls; add share: true"
                )
            return self.layer(name, d_in)
        count = self.calls[name] = self.calls.get(name, -1) + 1
        copies = self.shared.setdefault(name, [])
        if len(copies) < recipe.copies and count == len(copies):
            core = self.layer(name, d_in)
            block = recipe.residual.apply(self.config.block)
            copies.append(Branch(core, block) if recipe.shares_norms else core)
        core = copies[count % recipe.copies]
        if core.d_in != d_in:
            raise ValueError(
                f"model.layers.{name}: shared weights cannot serve inputs of width {core.d_in} and {d_in}"
            )
        return Shared(core, recipe.per_call)

    def branch(self, text: str, d_in: int) -> Branch:
        """One item as a part of another layer: with its norms, without a residual of its own."""
        for name in text.split("+"):
            own = self.config.layers[name].residual
            if own.residual_multiplier is not None or own.dropout is not None:
                raise ValueError(
                    f"model.layers.{name}.residual: a part of another layer has no residual of its own; "
                    "take out residual_multiplier and dropout"
                )
        return Branch(*self.item(text, d_in))

    def layer(self, name: str, d_in: int) -> Layer:
        """A layer with weights of its own."""
        recipe = self.config.layers[name]
        kind = table("layer")[recipe.type]
        options = kind.Options.model_validate(dict(recipe.options))
        for key, reason in options.check(d_in):
            raise ValueError(f"model.layers.{name}.{key}: {reason}")
        parts = {
            key: [
                self.branch(text, kind.part_width(key, index, d_in))
                for index, text in enumerate(expand(getattr(options, key), list(self.config.layers)))
            ]
            for key, field in kind.Options.model_fields.items()
            if any(isinstance(mark, Part) for mark in field.metadata)
        }
        return kind(d_in, options, d_out=self.config.d_model, parts=parts)


def build_model(
    config: RunConfig | ModelConfig,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str | Mapping[str, str] = "auto",
    weights: bool = True,
) -> HybridLM:
    """The model that `config` describes, with the starting weights of `seed`, on `device`.

    Args:
        config: a run's configuration or its `model` section; `vocab_size` must be known.
        seed: of the weights; the same values on every device.
        dtype: of the parameters, except those that the policy table keeps in float32.
        backend: of all ops (`auto`: the best there is for the device) or of each.
        weights: False leaves them unset on the `meta` device, to be loaded or only counted.

    Raises:
        ValueError: for an architecture that cannot be built, naming the recipe and what would work.
    """
    model_config = config.model if isinstance(config, RunConfig) else config
    if model_config.vocab_size is None:
        raise ValueError("model.vocab_size is not set, and there is no tokenizer or probe to take it from")
    e = model_config.embedding
    if e.positions == "learned" and e.max_positions is None:
        raise ValueError(
            "model.embedding.max_positions is needed with learned positions: the longest sequence in tokens"
        )
    kind = torch.device(device).type
    chosen = backends.select(backend, "cpu" if kind == "meta" else kind)
    with torch.device("meta"):
        builder = Builder(model_config)
        layers = builder.residuals()
        model = HybridLM(model_config, layers, builder.shared, chosen)
    if not weights:
        return model.eval()
    model = model.to_empty(device=device).to(dtype)
    initialise(model, model_config.init, n_layers=len(layers), seed=seed)
    return model.eval()


def with_vocabulary(config: RunConfig, vocab_size: int) -> RunConfig:
    """`config` with the vocabulary of its data, which must fit one that is already set."""
    given = config.model.vocab_size
    if given is not None and given < vocab_size:
        raise ValueError(
            f"model.vocab_size = {given}, but the data has {vocab_size} different tokens; leave it "
            "out or raise it"
        )
    fields: dict[str, Any] = {"model": config.model.model_copy(update={"vocab_size": given or vocab_size})}
    return config.model_copy(update=fields)
