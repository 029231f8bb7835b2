"""How layers are put together: a branch with its norms, parallel branches, weights that occurrences share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from hybrid_lm.config.schema import BlockConfig, PerCallConfig
from hybrid_lm.layers.base import Context, Layer, LayerList, LayerOptions, Module, State, StateList
from hybrid_lm.layers.parts import Linear, make_norm, zeros


class Branch(Layer):
    """A layer with its norms: post_norm(layer(pre_norm(x))), without a residual."""

    def __init__(self, layer: Layer, block: BlockConfig):
        super().__init__(layer.d_in, LayerOptions(), d_out=layer.d_out)
        pre = block.placement in ("pre", "sandwich") and not layer.reads_raw
        self.pre_norm = make_norm(layer.d_in, block) if pre else None
        self.layer = layer
        self.post_norm = make_norm(layer.d_out, block) if block.placement in ("post", "sandwich") else None

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> State | None:
        return self.layer.empty_state(batch, max_tokens=max_tokens)

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        y, state = self.layer(x if self.pre_norm is None else self.pre_norm(x), state, ctx)
        return (y if self.post_norm is None else self.post_norm(y)), state

    def mixing_flops(self, context: int) -> float:
        return self.layer.mixing_flops(context)


class Residual(Branch):
    """One item of a pattern: x + multiplier * dropout(branch(x))."""

    def __init__(self, layer: Layer, block: BlockConfig):
        super().__init__(layer, block)
        self.multiplier, self.dropout = block.residual_multiplier, block.dropout

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        y, state = super().forward(x, state, ctx)
        if self.dropout:
            y = F.dropout(y, self.dropout, self.training)
        if self.multiplier != 1.0:
            y = y * self.multiplier
        return x + y, state


class Parallel(Layer):
    """Layers on one input, outputs summed: `a+m` (Falcon-H1, Hymba)."""

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
    """A low-rank addition B A to a matrix (o i). Hu et al. 2021, arXiv:2106.09685; B starts at zero."""

    def __init__(self, d_out: int, d_in: int, rank: int):
        super().__init__()
        self.add("A", (rank, d_in), "matrix")
        self.add("B", (d_out, rank), "matrix", zeros)

    def delta(self) -> Tensor:
        """The matrix to add, (o i)."""
        return self.B @ self.A


class Shared(Layer):
    """One occurrence of a layer whose weights several occurrences use (Zamba, arXiv:2405.16712; Zamba2,
    arXiv:2411.15242).

    The weights belong to the model; the occurrence owns its memory and the small parts of `per_call`.
    """

    def __init__(self, core: Layer, per_call: PerCallConfig | None):
        super().__init__(core.d_in, LayerOptions(), d_out=core.d_out)
        # In a tuple, so that the weights are registered once, by their owner, and saved once.
        self._core = (core,)
        lora = per_call.lora if per_call else None
        self.lora = nn.ModuleDict()
        self.targets = tuple(lora.on) if lora else ()
        if lora is not None:
            for name in lora.on:
                self.lora[name.replace(".", "_")] = LoRA(*matrix(core, name).weight.shape, rank=lora.rank)
        square = per_call is not None and per_call.out_proj
        self.out_proj = Linear(core.d_out, core.d_out, kind="output") if square else None

    def adapter(self, name: str) -> LoRA:
        """The addition to the matrix of that name."""
        found = self.lora[name.replace(".", "_")]
        assert isinstance(found, LoRA)
        return found

    @property
    def core(self) -> Layer:
        """The layer whose weights are used."""
        return self._core[0]

    def empty_state(self, batch: int, *, max_tokens: int | None = None) -> State | None:
        return self.core.empty_state(batch, max_tokens=max_tokens)

    def forward(self, x: Tensor, state: State | None, ctx: Context) -> tuple[Tensor, State | None]:
        if self.targets:
            own = {
                f"{name}.weight": matrix(self.core, name).weight + self.adapter(name).delta()
                for name in self.targets
            }
            y, state = functional_call(self.core, own, (x, state, ctx))
        else:
            y, state = self.core(x, state, ctx)
        return (y if self.out_proj is None else self.out_proj(y)), state

    def mixing_flops(self, context: int) -> float:
        return self.core.mixing_flops(context)


def matrix(layer: Layer, name: str) -> Linear:
    """The matrix called `name` in a layer; ValueError with the names there are."""
    found = {key: module for key, module in layer.named_modules() if isinstance(module, Linear)}
    if name not in found:
        raise ValueError(
            f"per_call.lora.on: no matrix {name!r} in {type(layer).__name__}; there are {', '.join(found)}"
        )
    return found[name]
