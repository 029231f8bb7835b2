"""Rows between their weight keys and our parameter names, with reshuffles that can be undone exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Transform(NamedTuple):
    """A reshuffle of elements: `write(read(x)) == x` and `read(write(y)) == y`, bit for bit."""

    name: str
    read: Callable[[Tensor, Sequence[torch.Size], int], list[Tensor]]
    """(their tensor, our shapes, heads) -> our tensors."""
    write: Callable[[Sequence[Tensor], int], Tensor]
    """(our tensors, heads) -> their tensor."""


SAME = Transform("same", lambda x, shapes, heads: [x], lambda ours, heads: ours[0])
TRANSPOSED = Transform("transposed", lambda x, shapes, heads: [x.T], lambda ours, heads: ours[0].T)
"""`Conv1D` of transformers keeps (in out)."""
DEPTHWISE = Transform(
    "depthwise", lambda x, shapes, heads: [x.squeeze(1)], lambda ours, heads: ours[0].unsqueeze(1)
)
"""`nn.Conv1d` with as many groups as channels keeps (d 1 w)."""


def _split(x: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    return list(x.split([shape[0] for shape in shapes], 0))


FUSED = Transform(
    "fused", lambda x, shapes, heads: _split(x, shapes), lambda ours, heads: torch.cat(list(ours))
)
"""Several matrices, or their biases, one after the other."""
FUSED_TRANSPOSED = Transform(
    "fused_transposed",
    lambda x, shapes, heads: _split(x.T, shapes),
    lambda ours, heads: torch.cat(list(ours)).T,
)
"""The same as a `Conv1D`."""


def _by_head(x: Tensor, shapes: Sequence[torch.Size], heads: int) -> list[Tensor]:
    parts = x.unflatten(0, (heads, len(shapes), -1)).unbind(1)
    return [part.flatten(0, 1) for part in parts]


def _heads_together(ours: Sequence[Tensor], heads: int) -> Tensor:
    return torch.stack([x.unflatten(0, (heads, -1)) for x in ours], 1).flatten(0, 2)


BY_HEAD = Transform("by_head", _by_head, _heads_together)
"""Query, key and value of one head, then those of the next (GPT-NeoX)."""


class Row(NamedTuple):
    """One tensor of theirs and what it is here.

    `#` in `theirs` is the layer's number. An entry of `ours` is a name of the model's, or `type:name` for a
    name inside the residual layer of that type.
    """

    theirs: str
    ours: tuple[str, ...]
    how: Transform = SAME


def row(theirs: str, *ours: str, how: Transform = SAME) -> Row:
    """A row of a table."""
    return Row(theirs, ours, how)


def linear(theirs: str, ours: str) -> list[Row]:
    """A matrix and its bias, if there is one."""
    return [row(f"{theirs}.{part}", f"{ours}.{part}") for part in ("weight", "bias")]


def unrolled(rows: Iterable[Row], block: Sequence[str], n_layers: int, names: Iterable[str]) -> list[Row]:
    """The rows of a whole model that has our parameters `names`: numbers for `#`, full names for `type:name`.

    Rows whose parameters the model does not have (a bias) are left out. Every name is in exactly one row and
    every key of theirs too: both are asserted, for a table that does not hold this is a mistake of ours.
    """
    wanted, found = set(names), []
    for entry in rows:
        per_layer = "#" in entry.theirs
        for i in range(n_layers if per_layer else 1):
            ours = tuple(full_name(name, block, i) for name in entry.ours)
            if wanted.issuperset(ours):
                found.append(Row(entry.theirs.replace("#", str(i)), ours, entry.how))
    covered = [name for entry in found for name in entry.ours]
    assert sorted(covered) == sorted(wanted), f"the table misses or repeats {set(covered) ^ wanted}"
    assert len({entry.theirs for entry in found}) == len(found), "two rows with one key of theirs"
    return found


def full_name(name: str, block: Sequence[str], i: int) -> str:
    """The parameter that `type:name` means in their layer `i`."""
    kind, colon, rest = name.partition(":")
    return f"layers.{i * len(block) + block.index(kind)}.{rest}" if colon else name
