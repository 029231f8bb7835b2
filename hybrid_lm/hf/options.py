"""An architecture as flat options: what the tables compare with a Hugging Face configuration."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_lm.registry import table

Fields = Mapping[str, Any]
"""A Hugging Face configuration as plain data."""


class ConversionError(ValueError):
    """A model or a folder that cannot be converted; nothing was left behind."""


Item = tuple[str, ...]
"""The types of a residual layer of ours: one, or several beside each other, in alphabetical order."""


Block = tuple[Item, ...]
"""The residual layers of ours that one layer of theirs is."""


class Absent(KeyError):
    """An option of a type of layer of which there is none."""


@dataclass
class Options:
    """An architecture as flat options, `block.eps` of the model and `attention.n_heads` of its layers.

    Reading a layer's option takes the first one's that has such a layer (Absent if none has); setting it
    sets all of them. What a table cannot say of single layers is found when it is run both ways and the
    results are compared (see `family.Family`).
    """

    model: dict[str, Any]
    """Path -> value of what the model has once."""
    layers: list[dict[str, Any]]
    """For each of *their* layers, path -> value; the path begins with the type of ours that it belongs to."""
    blocks: list[Block]
    """What each of their layers is here."""
    orders: dict[int, Item] = dataclasses.field(default_factory=dict)
    """Residual layer of ours -> its parallel types in the order that its pattern has them."""

    def __getitem__(self, path: str) -> Any:
        kind = path.partition(".")[0]
        if not of_layer(path):
            return self.model[path]
        for _, layer in self.each(kind):
            return layer[path]
        raise Absent(path)

    def __setitem__(self, path: str, value: Any) -> None:
        kind = path.partition(".")[0]
        for place in [layer for _, layer in self.each(kind)] if of_layer(path) else [self.model]:
            place[path] = value

    def each(self, kind: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """The number and the options of each of their layers that has a layer of ours of this type."""
        for i, block in enumerate(self.blocks):
            if any(kind in item for item in block):
                yield i, self.layers[i]

    def place(self, i: int, kind: str) -> tuple[int, int | None] | None:
        """Where in our layers the one of this type of their layer `i` is: its index, and if it is parallel
        to others, which of them; None if there is none."""
        if i >= len(self.blocks):
            return None
        for offset, item in enumerate(self.blocks[i]):
            if kind in item:
                at = sum(len(block) for block in self.blocks[:i]) + offset
                return at, self.orders.get(at, item).index(kind) if len(item) > 1 else None
        return None


def of_layer(path: str) -> bool:
    """Whether an option belongs to a type of layer, not to the model."""
    return path.partition(".")[0] in table("layer")


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are set."""
    return {key: part for key, part in value.items() if part is not None}


def shown(value: Any) -> str:
    """A value as a configuration writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def listed(values: Iterable[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(shown(value) for value in values)
