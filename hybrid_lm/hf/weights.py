"""Rows between their weight keys and our parameter names, with reshuffles that can be undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrid_lm.hf.options import Options

Values = Mapping[str, Any]
"""Options of the layer that a tensor belongs to, and those of the model: `attention.n_heads`, `d_model`."""


class Transform(NamedTuple):
    """A reshuffle of elements: `write(read(x)) == x` and `read(write(y)) == y`, bit for bit."""

    name: str
    read: Callable[[Sequence[Tensor], Sequence[torch.Size], Values], list[Tensor]]
    """(their tensors, our shapes, options) -> our tensors."""
    write: Callable[[Sequence[Tensor], Values], list[Tensor]]
    """(our tensors, options) -> their tensors."""


SAME = Transform("same", lambda theirs, shapes, o: list(theirs), lambda ours, o: list(ours))


def each(name: str, read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor]) -> Transform:
    """A reshuffle of one tensor."""
    return Transform(name, lambda xs, shapes, o: [read(x) for x in xs], lambda xs, o: [write(x) for x in xs])


TRANSPOSED = each("transposed", lambda x: x.mT, lambda x: x.mT)
"""`Conv1D` of transformers keeps (in out), and some experts (n in out)."""
DEPTHWISE = each("depthwise", lambda x: x.squeeze(1), lambda x: x.unsqueeze(1))
"""`nn.Conv1d` with as many groups as channels keeps (d 1 w)."""


def _split(x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    return list(x.split([shape[0] for shape in shapes], 0))


FUSED = Transform(
    "fused", lambda theirs, shapes, o: _split(theirs[0], shapes), lambda ours, o: [torch.cat(list(ours))]
)
"""Several matrices, or their biases, one after the other."""
FUSED_TRANSPOSED = Transform(
    "fused_transposed",
    lambda theirs, shapes, o: _split(theirs[0].T, shapes),
    lambda ours, o: [torch.cat(list(ours)).T],
)
"""The same as a `Conv1D`."""


def _by_head(theirs: Sequence[Tensor], shapes: Sequence[torch.Size], o: Values) -> list[Tensor]:
    parts = theirs[0].unflatten(0, (o["attention.n_heads"], len(shapes), -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


def _heads_together(ours: Sequence[Tensor], o: Values) -> list[Tensor]:
    heads = o["attention.n_heads"]
    return [torch.stack([x.unflatten(0, (heads, -1)) for x in ours], 1).flatten(0, 2)]


BY_HEAD = Transform("by_head", _by_head, _heads_together)
"""Query, key and value of one head, then those of the next (GPT-NeoX)."""

STACKED = Transform(
    "stacked", lambda theirs, shapes, o: [torch.stack(list(theirs))], lambda ours, o: [*ours[0]]
)
"""A tensor for each expert or head, here one with them in front."""


def _gate_up_stacked(theirs: Sequence[Tensor], shapes: Sequence[torch.Size], o: Values) -> list[Tensor]:
    n = len(theirs) // 2
    return [torch.stack([torch.cat(pair) for pair in zip(theirs[:n], theirs[n:], strict=True)])]


def _gate_up_apart(ours: Sequence[Tensor], o: Values) -> list[Tensor]:
    gate, up = ours[0].chunk(2, 1)
    return [*gate, *up]


GATE_UP_STACKED = Transform("gate_up_stacked", _gate_up_stacked, _gate_up_apart)
"""The gates of all experts, then all their ups; here (n_experts 2f d), the gate's rows before the up's."""


class Row(NamedTuple):
    """Tensors of theirs and what they are here.

    `#` in a key of theirs is the layer's number; `@` an expert's or a head's: such a key stands for one after
    another. An entry of `ours` is a name of the model's, or `type:name` for a name inside the residual layer
    of that type: `attention:pre_norm.weight`, `attention:layer.q_proj.weight`.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    how: Transform = SAME
    count: str = "moe.n_experts"
    """The option that says for how many keys `@` stands."""


class Placed(NamedTuple):
    """A row in a model: full keys, full names, and the options where it stands."""

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    how: Transform
    options: Values


def row(theirs: str | Sequence[str], *ours: str, how: Transform = SAME, count: str = "moe.n_experts") -> Row:
    """A row of a table."""
    return Row((theirs,) if isinstance(theirs, str) else tuple(theirs), ours, how, count)


def linear(theirs: str, ours: str) -> list[Row]:
    """A matrix and its bias, if there is one."""
    return [row(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def fused(theirs: str, *ours: str, how: Transform = FUSED) -> list[Row]:
    """Matrices, and their biases if there are any, that are one there."""
    return [
        row(f"{theirs}.{part}", *(f"{name}.{part}" for name in ours), how=how) for part in ("weight", "bias")
    ]


def unrolled(rows: Iterable[Row], options: Options, names: Iterable[str]) -> list[Placed]:
    """The rows of a whole model that has our parameters `names`: numbers for `#` and `@`, full names for
    `type:name`.

    Rows whose parameters the model does not have (a bias) are left out. Every name is in exactly one row and
    every key of theirs too: both are asserted, for a table that does not hold this is a mistake of ours.
    """
    wanted, found = set(names), []
    for entry in rows:
        per_layer = any("#" in key for key in entry.theirs)
        for i in range(len(options.layers) if per_layer else 1):
            values = {**options.model, **(options.layers[i] if options.layers else {})}
            ours = tuple(full_name(name, options, i, wanted) for name in entry.ours)
            if wanted.issuperset(ours):
                keys = tuple(
                    key for pattern in entry.theirs for key in numbered(pattern, i, values, entry.count)
                )
                found.append(Placed(keys, ours, entry.how, values))
    covered = [name for entry in found for name in entry.ours]
    assert sorted(covered) == sorted(wanted), f"the table misses or repeats {set(covered) ^ wanted}"
    keys = [key for entry in found for key in entry.theirs]
    assert len(set(keys)) == len(keys), "two rows with one key of theirs"
    return found


def numbered(pattern: str, layer: int, values: Values, count: str) -> Iterator[str]:
    """The keys that a pattern stands for in their layer `layer`."""
    key = pattern.replace("#", str(layer))
    for i in range(values[count] if "@" in key else 1):
        yield key.replace("@", str(i))


def full_name(name: str, options: Options, i: int, names: set[str]) -> str:
    """The parameter that `type:name` means in their layer `i`; one that is not in `names` if it has none."""
    kind, colon, rest = name.partition(":")
    if not colon:
        return name
    if (place := options.place(i, kind)) is None:
        return f"no {kind} in layer {i}"
    at, branch = place
    if branch is None:
        return f"layers.{at}.{rest}"
    # A parallel layer: parts of the branch with norms of its own, or the branch itself, or the norm of all,
    # which goes by the name of the first type.
    inside = f"layers.{at}.layer.layers.{branch}."
    tries = [inside + rest, inside + rest.removeprefix("layer.")]
    if any(kind == item[0] for item in options.blocks[i]):
        tries.append(f"layers.{at}.{rest}")
    return next((full for full in tries if full in names), tries[0])
