"""The modules that layers are made of: matrices, norms, embeddings, each with its parameter classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_lm.config.schema import BlockConfig
from hybrid_lm.layers.base import Context, Init, Module
from hybrid_lm.ops import linear, rms_norm

ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda x: x,
}
"""Nonlinearities by the names that options have for them; relu2 is relu(x)^2 (Primer)."""


def ones(x: Tensor, _: object) -> None:
    """Starts a parameter at one."""
    nn.init.ones_(x)


def zeros(x: Tensor, _: object) -> None:
    """Starts a parameter at zero."""
    nn.init.zeros_(x)


def bare(module: Module) -> None:
    """What `Module` does first, without the constructors of torch's classes, which make and fill weights."""
    nn.Module.__init__(module)
    module.specs = {}


class Linear(Module, nn.Linear):
    """y = x W^T + b, W (d_out d_in). `kind="output"` for a matrix that writes to the residual stream.

    An `nn.Linear`, so that PEFT and other tools find it; what takes its place is called with `ctx` as well.
    """

    def __init__(
        self, d_in: int, d_out: int, *, bias: bool = False, kind: str = "matrix", init: Init | None = None
    ):
        bare(self)
        self.in_features, self.out_features = d_in, d_out
        self.add("weight", (d_out, d_in), kind, init)
        if bias:
            self.add("bias", (d_out,), "bias")
        else:
            self.register_parameter("bias", None)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """x (... d_in) -> (... d_out)."""
        return linear(x, self.weight, self.bias, backend=ctx.backends.get("linear"))


class RMSNorm(Module):
    """Root-mean-square norm over the last axis. Zhang & Sennrich 2019, arXiv:1910.07467.

    `weight=False`: no scale. `unit_offset`: scale by (1 + w), w from zero (Gemma).
    """

    def __init__(self, d: int, *, eps: float = 1e-5, weight: bool = True, unit_offset: bool = False):
        super().__init__()
        self.eps, self.unit_offset = eps, unit_offset
        if weight:
            self.add("weight", (d,), "norm", zeros if unit_offset else ones)
        else:
            self.register_parameter("weight", None)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (... d) -> (... d)."""
        backend = ctx.backends.get("rms_norm")
        return rms_norm(x, self.weight, eps=self.eps, unit_offset=self.unit_offset, backend=backend)


class LayerNorm(Module):
    """Layer norm over the last axis, scale and shift optional. Ba et al. 2016, arXiv:1607.06450."""

    def __init__(
        self, d: int, *, eps: float = 1e-5, weight: bool = True, bias: bool = False, unit_offset: bool = False
    ):
        super().__init__()
        self.d, self.eps, self.unit_offset = d, eps, unit_offset
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        if weight:
            self.add("weight", (d,), "norm", zeros if unit_offset else ones)
        if bias:
            self.add("bias", (d,), "bias")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        """x (... d) -> (... d)."""
        weight = self.weight
        if weight is not None:
            weight = (1 + weight if self.unit_offset else weight).to(x.dtype)
        return F.layer_norm(
            x, (self.d,), weight, None if self.bias is None else self.bias.to(x.dtype), self.eps
        )


def make_norm(d: int, block: BlockConfig) -> Module:
    """The norm that `block` describes, over width `d`."""
    if block.bias and block.norm != "layernorm":
        raise ValueError(f"model.block.bias: {block.norm} has no shift; set norm: layernorm, or bias: false")
    if block.norm == "layernorm":
        return LayerNorm(
            d, eps=block.eps, weight=block.weight, bias=block.bias, unit_offset=block.unit_offset
        )
    return RMSNorm(d, eps=block.eps, weight=block.weight, unit_offset=block.unit_offset)


class Embedding(Module, nn.Embedding):
    """Rows of a table (n d), looked up by index: an `nn.Embedding` that is started with the other weights."""

    def __init__(self, n: int, d: int):
        bare(self)
        self.num_embeddings, self.embedding_dim = n, d
        self.padding_idx = self.max_norm = None
        self.norm_type, self.scale_grad_by_freq, self.sparse = 2.0, False, False
        self.add("weight", (n, d), "embedding")
