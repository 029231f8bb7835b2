"""Which residual layers of ours one layer of theirs is, as the fields of a configuration say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hybrid_lm.hf.options import Block, ConversionError, Fields, listed


class Layout:
    """Which layers of ours each of their layers is, and how deep the model is."""

    blocks: tuple[Block, ...] = ()
    """All that one of their layers can be."""
    theirs: tuple[str, ...] = ()
    """Their fields that say it."""

    def read(self, fields: Fields) -> list[Block]:
        """What each of their layers is. Raises ConversionError naming a field with a value we do not have."""
        raise NotImplementedError

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        """Their fields for such layers. Raises ConversionError if they cannot say it."""
        raise NotImplementedError


def block(text: str) -> Block:
    """`"attention+mamba2 mlp"` as a block."""
    return tuple(tuple(sorted(item.split("+"))) for item in text.split())


class Uniform(Layout):
    """Every layer is the same."""

    def __init__(self, each: str, depth: str = "num_hidden_layers"):
        self.blocks, self.theirs = (block(each),), (depth,)

    def read(self, fields: Fields) -> list[Block]:
        return [self.blocks[0]] * fields[self.theirs[0]]

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        fields[self.theirs[0]] = len(blocks)


class Switch(Layout):
    """All layers are one block or all are another, as a field says."""

    def __init__(self, field: str, values: Mapping[Any, str], depth: str = "num_hidden_layers"):
        self.values = {value: block(text) for value, text in values.items()}
        self.blocks, self.theirs = tuple(self.values.values()), (depth, field)

    def read(self, fields: Fields) -> list[Block]:
        depth, name = self.theirs
        if fields[name] not in self.values:
            raise ConversionError(f"{name} = {fields[name]!r}: only {listed(self.values)}")
        return [self.values[fields[name]]] * fields[depth]

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        depth, name = self.theirs
        if any(other != blocks[0] for other in blocks):
            raise ConversionError(f"its blocks are of two sorts, {name} is for all of them")
        fields[depth] = len(blocks)
        fields[name] = next(value for value, what in self.values.items() if what == blocks[0])


class Listed(Layout):
    """A field that names each layer. The first of several names for one block is written.

    depth: the field with their number, if it is written too.
    """

    def __init__(self, field: str, values: Mapping[str, str], depth: str | None = "num_hidden_layers"):
        self.values = {name: block(text) for name, text in values.items()}
        self.blocks = tuple(dict.fromkeys(self.values.values()))
        self.depth, self.theirs = depth, (field, "num_hidden_layers" if depth is None else depth)

    def read(self, fields: Fields) -> list[Block]:
        name, names = self.theirs[0], list(fields[self.theirs[0]])
        for kind in names:
            if kind not in self.values:
                raise ConversionError(f"{name}: {kind!r}: only {listed(self.values)}")
        if self.depth is not None and len(names) != fields[self.depth]:
            raise ConversionError(f"{name} has {len(names)} entries for {fields[self.depth]} layers")
        return [self.values[kind] for kind in names]

    def write(self, blocks: Sequence[Block], fields: dict[str, Any]) -> None:
        kinds = {what: name for name, what in reversed(self.values.items())}
        fields[self.theirs[0]] = [kinds[what] for what in blocks]
        if self.depth is not None:
            fields[self.depth] = len(blocks)
