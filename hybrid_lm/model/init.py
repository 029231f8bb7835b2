"""One table: what the class of a parameter means. It is applied after every construction path, and printed by
`show`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Module, Spec


class Policy(NamedTuple):
    """What a parameter class means, unless its layer starts it itself."""

    start: str
    """How it starts."""
    decay: bool
    """Whether weight decay applies."""
    float32: bool
    """Whether it stays in float32 in a model of a narrower type."""
    lr: float
    """Factor on the learning rate."""


POLICY = {
    "matrix": Policy("init.matrix", True, False, 1.0),
    "output": Policy("init.matrix / sqrt(layers)", True, False, 1.0),
    "embedding": Policy("normal, init.std", False, False, 1.0),
    "norm": Policy("by its layer", False, False, 1.0),
    "conv": Policy("by its layer", False, False, 1.0),
    "dynamics": Policy("by its layer", False, True, 1.0),
    "bias": Policy("zero", False, False, 1.0),
}


class Entry(NamedTuple):
    """A parameter, its full name and its class."""

    name: str
    parameter: nn.Parameter
    spec: Spec


def entries(model: nn.Module) -> Iterator[Entry]:
    """Every parameter once, in the order of the modules; a parameter without a class is an error of ours."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            full = f"{path}.{name}" if path else name
            assert isinstance(module, Module), f"{full} has no parameter class"
            assert name in module.specs, f"{full} has no parameter class"
            yield Entry(full, parameter, module.specs[name])


def _start(x: Tensor, kind: str, init: InitConfig, n_layers: int, rng: torch.Generator) -> None:
    if kind == "bias":
        x.zero_()
    elif kind == "embedding":
        x.normal_(0.0, init.std, generator=rng)
    else:
        assert kind in ("matrix", "output"), f"class {kind} is started by its layer"
        if init.matrix == "fan_in":
            bound = x.shape[-1] ** -0.5
            x.uniform_(-bound, bound, generator=rng)
        else:
            x.normal_(0.0, init.std, generator=rng)
        if kind == "output" and init.scale_residual:
            x.div_(math.sqrt(n_layers))


def own_seed(seed: int, name: str) -> int:
    """A seed for one parameter. 32 bits: the CPU's generator ignores higher ones."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


@torch.no_grad()
def initialise(model: nn.Module, init: InitConfig, *, n_layers: int, seed: int = 0) -> None:
    """Gives every parameter its starting values, in place.

    Each draws from a generator of its own, seeded by the run's seed and its name and run on the CPU in
    float32: the values do not depend on the device, the dtype, or the order in which the model was built.
    """
    for name, parameter, spec in entries(model):
        rng = torch.Generator().manual_seed(own_seed(seed, name))
        x = torch.empty(parameter.shape, dtype=torch.float32)
        if spec.init is not None:
            spec.init(x, rng)
        else:
            _start(x, spec.kind, init, n_layers, rng)
        parameter.copy_(x)
