"""What a model costs: parameters, operations and memory, per layer and in all."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from hybrid_lm.config.pattern import expand
from hybrid_lm.layers.base import Layer, Module
from hybrid_lm.layers.block import Shared
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import POLICY, entries
from hybrid_lm.model.lm import HybridLM

FAR = 1 << 20
"""Tokens after which a memory that is bounded has reached its bound."""


class LayerRow(NamedTuple):
    """One residual layer."""

    index: int
    name: str
    type: str
    parameters: int
    """Of its own; what is shared counts where it is first used."""
    state_bytes_fixed: int
    """Memory per sequence that does not grow."""
    state_bytes_per_token: int
    """Memory per sequence and token, where it grows without bound."""
    flops_per_token: float
    """Operations of the forward pass per token, at `context` tokens in view."""


def count(module: nn.Module) -> int:
    """Numbers in the parameters of a module."""
    return sum(parameter.numel() for parameter in module.parameters())


def matrix_elements(layer: nn.Module) -> int:
    """Elements of the matrices that a token is multiplied by, shared ones included, at each occurrence; of
    experts, its own."""
    shared = [part.core for part in layer.modules() if isinstance(part, Shared)]
    own = sum(
        round(part.used * getattr(part, name).numel())
        for part in layer.modules()
        if isinstance(part, Module)
        for name, spec in part.specs.items()
        if spec.kind in ("matrix", "output")
    )
    return own + sum(matrix_elements(core) for core in shared)


def state_bytes(layer: Layer, tokens: int) -> int:
    """Bytes of the memory of a layer on the meta device for one sequence with room for `tokens`, measured on
    its tensors."""
    state = layer.empty_state(1, max_tokens=tokens)
    return 0 if state is None else state.nbytes


def layer_table(model: HybridLM, context: int = 2048) -> list[LayerRow]:
    """A row for each residual layer. Build the model with `weights=False` to look at one of any size."""
    config, rows, counted = model.config, [], set()
    if not model.embed.weight.is_meta:
        # A memory with room for a million tokens is only looked at. Its own backends may be a GPU's.
        dtype = model.embed.weight.dtype
        model = build_model(config, backend="torch", weights=False).to(dtype)
    items = expand(config.pattern, list(config.layers), config.depth)
    for index, (name, layer) in enumerate(zip(items, model.layers, strict=True)):
        parameters = count(layer)
        for part in layer.modules():
            if isinstance(part, Shared) and id(part.core) not in counted:
                counted.add(id(part.core))
                parameters += count(part.core)
        # Far out, what is bounded no longer grows.
        per_token = (state_bytes(layer, FAR + 1024) - state_bytes(layer, FAR)) // 1024
        fixed = state_bytes(layer, FAR) - per_token * FAR
        flops = 2.0 * matrix_elements(layer) + layer.mixing_flops(context)
        kinds = "+".join(config.layers[part].type for part in name.split("+"))
        rows.append(LayerRow(index, name, kinds, parameters, fixed, per_token, flops))
    return rows


class Totals(NamedTuple):
    """The whole model."""

    parameters: int
    embedding_parameters: int
    state_bytes_fixed: int
    state_bytes_per_token: int
    flops_per_token: float
    """Forward pass, output matrix included."""


def totals(model: HybridLM, context: int = 2048) -> Totals:
    """Sums over the layers, with the embedding and the output matrix."""
    rows = layer_table(model, context)
    embedding = count(model.embed) + (count(model.embed_positions) if model.embed_positions else 0)
    embedding += count(model.lm_head) if model.lm_head else 0
    return Totals(
        count(model),
        embedding,
        sum(row.state_bytes_fixed for row in rows),
        sum(row.state_bytes_per_token for row in rows),
        sum(row.flops_per_token for row in rows) + 2.0 * model.head_weight.numel(),
    )


class ClassRow(NamedTuple):
    """One parameter class of a model: what it holds and what the policy says of it."""

    kind: str
    tensors: int
    parameters: int
    start: str
    decay: bool
    float32: bool
    lr: float


def class_table(model: HybridLM) -> list[ClassRow]:
    """The policy table with what of this model falls under each class."""
    found = list(entries(model))
    rows = []
    for kind, policy in POLICY.items():
        mine = [entry.parameter.numel() for entry in found if entry.spec.kind == kind]
        rows.append(
            ClassRow(kind, len(mine), sum(mine), policy.start, policy.decay, policy.float32, policy.lr)
        )
    return rows
