"""How layers are put together: a branch with its norms, parallel branches, weights that occurrences share."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hybrid_lm.config.schema import BlockConfig, PerCallConfig
from hybrid_lm.layers.base import Context, Layer, LayerList, LayerOptions, Module, State, StateList
from hybrid_lm.layers.parts import Linear, make_norm, zeros
from hybrid_lm.ops import linear

BEFORE = ("pre", "pre_each", "sandwich")
"""The placements with a norm before the layer."""


class Branch(Layer):
    """A layer with its norms: post_norm(layer(pre_norm(x))), without a residual."""

    reads_raw = True

    def __init__(self, layer: Layer, block: BlockConfig):
        super().__init__(layer.d_in, LayerOptions(), d_out=layer.d_out)
        # A layer that takes the stream raw has norms around its parts.
        placement = "none" if layer.reads_raw else block.placement
        self.pre_norm = make_norm(layer.d_in, block) if placement in BEFORE else None
        self.layer = layer
        self.post_norm = make_norm(layer.d_out, block) if placement in ("post", "sandwich") else None

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> State | None:
        return self.layer.empty_state(batch, max_tokens=max_tokens)

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        y, state = self.layer(x if self.pre_norm is None else self.pre_norm(x, ctx), state, ctx)
        return (y if self.post_norm is None else self.post_norm(y, ctx)), state

    def mixing_flops(self, context: int) -> float:
        return self.layer.mixing_flops(context)


class Residual(Branch):
    """One item of a pattern: x + multiplier * dropout(branch(x))."""

    gradient_checkpointing = False
    """Whether training keeps only the input and computes the rest again for the gradients. Chen et al. 2016,
    arXiv:1604.06174. transformers looks for this name and sets the function below."""
    _gradient_checkpointing_func = staticmethod(partial(checkpoint, use_reentrant=False))

    def __init__(self, layer: Layer, block: BlockConfig):
        super().__init__(layer, block)
        self.multiplier, self.dropout = block.residual_multiplier, block.dropout

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        # In forward, so that hooks of the module (FSDP's) run once, outside.
        if self.gradient_checkpointing and self.training and state is None:
            return self._gradient_checkpointing_func(partial(self.stateless, ctx), x, ctx.embeddings), None
        return self.added(x, state, ctx)

    def stateless(self, ctx: Context, x: Tensor, embeddings: Tensor | None) -> Tensor:
        """The output (b t d) as a function of all that gradients flow through."""
        return self.added(x, None, replace(ctx, embeddings=embeddings))[0]

    def added(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        """The stream with what the branch adds, (b t d), and the branch's memory."""
        y, state = Branch.forward(self, x, state, ctx)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        if self.multiplier != 1.0:
            y = y * self.multiplier
        return x + y, state


class Parallel(Layer):
    """Layers on one input, outputs summed: `a+m` (Falcon-H1, Hymba). With norms of their own they are
    branches: `a+f` with `placement: pre_each` (GPT-NeoX)."""

    def __init__(self, layers: Sequence[Layer]):
        super().__init__(layers[0].d_in, LayerOptions(), d_out=layers[0].d_out)
        self.layers = LayerList(layers)

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> StateList:
        return StateList([layer.empty_state(batch, max_tokens=max_tokens) for layer in self.layers])

    def forward(self, x: Tensor, state: StateList | None, ctx: Context) -> tuple[Tensor, StateList | None]:
        items = [None] * len(self.layers) if state is None else state.items
        done = [layer(x, item, ctx) for layer, item in zip(self.layers, items, strict=True)]
        y = done[0][0]
        for part, _ in done[1:]:
            y = y + part
        return y, None if state is None else StateList([item for _, item in done])

    def mixing_flops(self, context: int) -> float:
        return sum(layer.mixing_flops(context) for layer in self.layers)


class LoRA(Module):
    """A matrix with a low-rank addition, x W^T + (x A^T) B^T. Hu et al. 2021, arXiv:2106.09685; B starts at
    zero."""

    def __init__(self, d_out: int, d_in: int, rank: int):
        super().__init__()
        self.add("A", (rank, d_in), "matrix")
        self.add("B", (d_out, rank), "matrix", zeros)

    def forward(self, x: Tensor, ctx: Context, rows: slice = slice(None)) -> Tensor:
        """x (... d_in) -> what is added to W's output, (... d_out), or the given rows of it."""
        backend = ctx.backends.get("linear")
        return linear(linear(x, self.A, backend=backend), self.B[rows], backend=backend)


class Adapted(nn.Module):
    """A matrix that is somebody else's, and one's own addition to it: some rows of a LoRA."""

    def __init__(self, linear: nn.Module, lora: LoRA, rows: slice):
        super().__init__()
        self.linear, self.lora, self.rows = linear, lora, rows

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return self.linear(x, ctx) + self.lora(x, ctx, self.rows)


def seen_with(module: nn.Module, name: str, replaced: nn.Module) -> nn.Module:
    """The same module, parameters and all, but for one part inside it: a view, not a copy."""
    view = copy.copy(module)
    # The parameters stay in the one dictionary that both have, so that loading and moving reach the view.
    view._modules = dict(module._modules)
    first, _, rest = name.partition(".")
    view._modules[first] = seen_with(module.get_submodule(first), rest, replaced) if rest else replaced
    return view


def parts(module: nn.Module) -> list[tuple[dict[str, Any], tuple[Any, ...]]]:
    """For each module inside, where it keeps its parts and what they are now."""
    return [(part._modules, (*part._modules.values(),)) for part in module.modules()]


class Shared(Layer):
    """One occurrence of a layer whose weights several occurrences use (Zamba, arXiv:2405.16712; Zamba2,
    arXiv:2411.15242).

    The weights belong to the model; the occurrence owns its memory and the small parts of `per_call`. A core
    that is a branch has the norms, shared as well.
    """

    def __init__(self, core: Layer, per_call: PerCallConfig | None):
        super().__init__(core.d_in, LayerOptions(), d_out=core.d_out)
        # As its core does: of the object here, of the class elsewhere.
        self.reads_raw = core.reads_raw  # type: ignore[misc]
        # In tuples, so that the weights are registered once, by their owner, and saved once.
        self._core = (core,)
        self.lora = nn.ModuleDict()
        self.additions: list[tuple[str, str, slice]] = []
        if per_call is not None and per_call.lora is not None:
            for entry in per_call.lora.on:
                self.add_to(entry.split("+"), per_call.lora.rank)
        self._parts, self._view = parts(core), (self.make_view(),)
        square = per_call is not None and per_call.out_proj
        self.out_proj = Linear(core.d_out, core.d_out, kind="output") if square else None

    def add_to(self, names: list[str], rank: int) -> None:
        """One more addition of this occurrence's, to the matrices of these names together."""
        inner = isinstance(self.core, Branch)
        matrices = together(self.core.layer if isinstance(self.core, Branch) else self.core, names)
        d_out, d_in = sum(len(shared.weight) for shared in matrices), matrices[0].weight.shape[1]
        key, start = "_".join(names).replace(".", "_"), 0
        self.lora[key] = LoRA(d_out, d_in, rank)
        for name, shared in zip(names, matrices, strict=True):
            rows = slice(start, start + len(shared.weight))
            self.additions.append((key, f"layer.{name}" if inner else name, rows))
            start = rows.stop

    def make_view(self) -> nn.Module:
        """The core as this occurrence sees it."""
        view: nn.Module = self.core
        for key, path, rows in self.additions:
            lora: Any = self.lora[key]
            view = seen_with(view, path, Adapted(self.core.get_submodule(path), lora, rows))
        return view

    @property
    def view(self) -> nn.Module:
        """The core as this occurrence sees it, made anew when a part of it was replaced, as PEFT does."""
        if self.additions and any((*now.values(),) != then for now, then in self._parts):
            self._parts, self._view = parts(self.core), (self.make_view(),)
        return self._view[0]

    @property
    def core(self) -> Layer:
        """The layer whose weights are used."""
        return self._core[0]

    def train(self, mode: bool = True) -> Self:
        # The view is no submodule, and has a mode of its own.
        self.view.train(mode)
        return super().train(mode)

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> State | None:
        return self.core.empty_state(batch, max_tokens=max_tokens)

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        y, state = self.view(x, state, ctx)
        return (y if self.out_proj is None else self.out_proj(y, ctx)), state

    def mixing_flops(self, context: int) -> float:
        return self.core.mixing_flops(context)


def together(layer: nn.Module, names: Sequence[str]) -> list[Linear]:
    """The matrices of these names; ValueError if one is missing or they do not read the same width."""
    found = [matrix(layer, name) for name in names]
    widths = {shared.weight.shape[1] for shared in found}
    if len(widths) > 1:
        raise ValueError(
            f"per_call.lora.on: {'+'.join(names)}: one addition reads one width, not {sorted(widths)}; name "
            "them apart"
        )
    return found


def matrix(layer: nn.Module, name: str) -> Linear:
    """The matrix called `name` in a layer; ValueError with the names there are."""
    found = {key: module for key, module in layer.named_modules() if isinstance(module, Linear)}
    if name not in found:
        raise ValueError(
            f"per_call.lora.on: no matrix {name!r} in {type(layer).__name__}; there are {', '.join(found)}"
        )
    return found[name]
