"""Rules between the fields of a Hugging Face configuration and our options, each to be read both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hybrid_lm.layers.rotary import SCALING_KEYS
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


class Rule:
    """Some of their fields, and what they say about our options."""

    theirs: tuple[str, ...] = ()

    def read(self, fields: Fields, ours: Options) -> None:
        """Their fields -> our options. Raises ConversionError naming a field with a value we do not have."""
        raise NotImplementedError

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        """Our options -> their fields. Raises ConversionError naming an option that they do not have."""
        raise NotImplementedError


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


class Same(Rule):
    """A field that is an option, or several options, by another name.

    `default`: what the field stands for where it is absent or null.
    """

    def __init__(self, theirs: str, *ours: str, default: Callable[[Fields], Any] | None = None):
        self.theirs, self.ours, self.default = (theirs,), ours, default

    def read(self, fields: Fields, ours: Options) -> None:
        value = fields.get(self.theirs[0])
        if value is None and self.default is not None:
            value = self.default(fields)
        for path in self.ours:
            ours[path] = tuple(value) if isinstance(value, list) else value

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        value = ours[self.ours[0]]
        fields[self.theirs[0]] = list(value) if isinstance(value, tuple) else value


class Choice(Rule):
    """A field whose values have other names here. The first of several names for one value is written."""

    def __init__(self, theirs: str, ours: str, values: Mapping[Any, Any]):
        self.theirs, self.ours, self.values = (theirs,), ours, values

    def read(self, fields: Fields, ours: Options) -> None:
        value = fields.get(self.theirs[0])
        if value not in self.values:
            raise ConversionError(f"{self.theirs[0]} = {value!r}: only {listed(self.values)}")
        ours[self.ours] = self.values[value]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        value = ours[self.ours]
        for name, meaning in self.values.items():
            if meaning == value:
                fields[self.theirs[0]] = name
                return
        raise ConversionError(f"{self.ours} is {shown(value)}, it has {listed(self.values.values())}")


class Must(Rule):
    """A field that is supported with some of its values only, which mean the same; the first is written."""

    def __init__(self, theirs: str, *values: Any):
        self.theirs, self.values = (theirs,), values

    def read(self, fields: Fields, ours: Options) -> None:
        value = fields.get(self.theirs[0], self.values[0])
        if value not in self.values:
            raise ConversionError(f"{self.theirs[0]} = {value!r}: only {listed(self.values)}")

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields[self.theirs[0]] = self.values[0]


class Derived(Rule):
    """An option that follows from their fields and has none of its own."""

    def __init__(self, ours: str, value: Callable[[Fields], Any]):
        self.ours, self.value = ours, value

    def read(self, fields: Fields, ours: Options) -> None:
        ours[self.ours] = self.value(fields)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        pass


class Whole(Rule):
    """A field that is only written: a ratio of our sizes, which must come out whole."""

    def __init__(self, theirs: str, value: Callable[[Options], float]):
        self.theirs, self.value = (theirs,), value

    def read(self, fields: Fields, ours: Options) -> None:
        pass

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        value = self.value(ours)
        if value != int(value):
            raise ConversionError(f"{self.theirs[0]} would be {value:g}, it has whole numbers")
        fields[self.theirs[0]] = int(value)


class Rope(Rule):
    """`rope_parameters` and `max_position_embeddings`, for rotary positions of all attention layers alike.

    dynamic and longrope are the same here up to the original length. Beyond it transformers reads a prompt by
    its whole length, and decodes by each token's place; ours does the second in both (see `ops.rope`).

    partial: whether the class rotates only `partial_rotary_factor` of each head; the others ignore it.
    interleaved: whether it rotates neighbouring pairs.
    sparse: whether layers may be without, which another rule tells.
    """

    theirs = ("rope_parameters", "max_position_embeddings")
    rules = ("linear", "dynamic", "yarn", "llama3", "longrope")

    def __init__(self, *, partial: bool = False, interleaved: bool = False, sparse: bool = False):
        self.partial, self.interleaved, self.sparse = partial, interleaved, sparse

    def read(self, fields: Fields, ours: Options) -> None:
        ours["attention.rope"] = self.said(fields["rope_parameters"], fields, ours)

    def said(self, parameters: Fields | None, fields: Fields, ours: Options) -> dict[str, Any]:
        """Our option for their parameters."""
        given = dict(parameters or {})
        kind, theta = given.pop("rope_type", "default"), given.pop("rope_theta", 10000.0)
        given.pop("type", None)
        if kind not in ("default", *self.rules):
            raise ConversionError(
                f"rope_parameters.rope_type = {kind!r}: only {listed(['default', *self.rules])}"
            )
        fraction = given.pop("partial_rotary_factor", None)
        if fraction not in (None, 1.0) and not self.partial:
            raise ConversionError(f"rope_parameters.partial_rotary_factor = {fraction}: the class ignores it")
        known = {key for keys in SCALING_KEYS.get(kind, ()) for key in keys}
        for key, value in given.items():
            if key not in known and value is not None:
                raise ConversionError(f"rope_parameters.{key} = {value!r} means nothing to {kind}")
        fraction = 1.0 if fraction is None else fraction
        if self.partial:
            # The class rounds the rotated width down, and we round to the nearest.
            width = ours["attention.head_dim"]
            down = int(width * fraction)
            fraction = fraction if round(width * fraction) == down else down / width
        scaling = None if kind == "default" else {"rope_type": kind, **given}
        return {
            "theta": theta,
            "fraction": fraction,
            "interleaved": self.interleaved,
            "scaling": scaling,
            "max_positions": fields["max_position_embeddings"],
        }

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        ropes = [layer["attention.rope"] for _, layer in ours.each("attention")]
        there = [rope for rope in ropes if rope is not None]
        if there:
            self.write_length(there[0], fields)
            fields["rope_parameters"] = self.worded(there[0])
        elif ropes and not self.sparse:
            raise ConversionError("attention.rope is null, it always has rotary positions")

    def worded(self, rope: Mapping[str, Any]) -> dict[str, Any]:
        """Their parameters for our option."""
        scaling = without_nulls(rope["scaling"] or {"rope_type": "default"})
        if scaling["rope_type"] not in ("default", *self.rules):
            raise ConversionError(f"attention.rope.scaling is {scaling['rope_type']}")
        # Lists, as they come out of a file.
        given = {key: list(x) if isinstance(x, tuple) else x for key, x in scaling.items()}
        fraction = {"partial_rotary_factor": rope["fraction"]} if self.partial else {}
        return {**given, "rope_theta": rope["theta"], **fraction}

    def write_length(self, rope: Mapping[str, Any], fields: dict[str, Any]) -> None:
        """The length that positions are made for, where it is known."""
        if rope["max_positions"] is not None:
            fields["max_position_embeddings"] = rope["max_positions"]


class RopeByType(Rope):
    """`rope_parameters` with an entry for each of the `layer_types`; layers without a window, and those with
    one."""

    def read(self, fields: Fields, ours: Options) -> None:
        for i, layer in ours.each("attention"):
            parameters = fields["rope_parameters"][fields["layer_types"][i]]
            layer["attention.rope"] = self.said(parameters, fields, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        fields["rope_parameters"] = {}
        for _, layer in ours.each("attention"):
            kind, rope = WINDOWED[layer["attention.window"] is not None], layer["attention.rope"]
            if rope is None:
                raise ConversionError("attention.rope is null, it always has rotary positions")
            self.write_length(rope, fields)
            fields["rope_parameters"].setdefault(kind, self.worded(rope))


WINDOWED = {False: "full_attention", True: "sliding_attention"}
"""Their names for attention without and with a window."""


class WindowsByLayer(Rule):
    """`layer_types` with one `sliding_window` for the layers that have one.

    switched: whether the class has `use_sliding_window` too.
    """

    theirs = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")

    def __init__(self, *, switched: bool = True):
        self.switched = switched
        self.theirs = self.theirs if switched else self.theirs[:2]

    def read(self, fields: Fields, ours: Options) -> None:
        window, kinds = fields.get("sliding_window"), fields["layer_types"]
        if len(kinds) != len(ours.layers):
            raise ConversionError(f"layer_types has {len(kinds)} entries for {len(ours.layers)} layers")
        for i, layer in ours.each("attention"):
            if kinds[i] not in ("full_attention", "sliding_attention"):
                raise ConversionError(f"layer_types: {kinds[i]!r}: only full_attention, sliding_attention")
            layer["attention.window"] = window if kinds[i] == "sliding_attention" else None

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        windows = [layer["attention.window"] for _, layer in ours.each("attention")]
        there = {window for window in windows if window is not None}
        if len(there) > 1:
            raise ConversionError(f"attention.window is {listed(sorted(there))}, it has one for all layers")
        if self.switched:
            fields |= {"use_sliding_window": bool(there), "sliding_window": None, "max_window_layers": 0}
        # The classes without a switch want a number whether a layer has it or not: their default.
        if there:
            fields["sliding_window"] = there.pop()
        fields["layer_types"] = [WINDOWED[window is not None] for window in windows]


class Either(Same):
    """A field for an option of several types of layer, some of which a model may have none of."""

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        for path in self.ours:
            with suppress(Absent):
                fields[self.theirs[0]] = ours[path]
                return
        raise Absent(self.ours[0])


class EitherChoice(Choice):
    """A choice for an option of several types of layer, some of which a model may have none of."""

    def __init__(self, theirs: str, ours: Sequence[str], values: Mapping[Any, Any]):
        super().__init__(theirs, ours[0], values)
        self.each = [Choice(theirs, path, values) for path in ours]

    def read(self, fields: Fields, ours: Options) -> None:
        for choice in self.each:
            choice.read(fields, ours)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        for choice in self.each:
            with suppress(Absent):
                return choice.write(ours, fields)
        raise Absent(self.ours)


class Inverse(Rule):
    """A divisor there, a factor here."""

    def __init__(self, theirs: str, ours: str):
        self.theirs, self.ours = (theirs,), ours

    def read(self, fields: Fields, ours: Options) -> None:
        ours[self.ours] = 1.0 / fields[self.theirs[0]]

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        factor = ours[self.ours]
        if not factor:
            raise ConversionError(f"{self.ours} is 0, it divides by {self.theirs[0]}")
        # Several divisors may have one inverse.
        fields[self.theirs[0]] = shortest(1.0 / factor, lambda x: 1.0 / x == factor)


class Agrees(Rule):
    """A field that only old configurations have: it says again what others say, or is refused."""

    def __init__(self, theirs: str, value: Callable[[Fields], Any]):
        self.theirs, self.value = (theirs,), value

    def read(self, fields: Fields, ours: Options) -> None:
        given, meant = fields.get(self.theirs[0]), self.value(fields)
        if given not in (None, meant):
            raise ConversionError(f"{self.theirs[0]} = {given!r}: the class has {meant!r}")

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        pass


class Unused(Rule):
    """Fields of a type of layer that a model has none of: the class wants values that it could be made
    with."""

    def __init__(self, kind: str, **values: Any):
        self.kind, self.values = kind, values

    def read(self, fields: Fields, ours: Options) -> None:
        pass

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        if not any(ours.each(self.kind)):
            fields |= self.values


class ScaleOf(Rule):
    """The factor on attention's scores, which is a power of their field; `kind` is the field's type."""

    def __init__(self, theirs: str, power: float, kind: type = float):
        self.theirs, self.power, self.kind = (theirs,), power, kind

    def read(self, fields: Fields, ours: Options) -> None:
        ours["attention.scale"] = float(fields[self.theirs[0]] ** self.power)

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        scale = ours["attention.scale"]
        scale = ours["attention.head_dim"] ** -0.5 if scale is None else scale
        value = shortest(scale ** (1 / self.power), lambda x: x**self.power == scale)
        fields[self.theirs[0]] = self.kind(value) if self.kind(value) == value else value


def shortest(value: float, agrees: Callable[[float], bool]) -> float:
    """The number next to `value` that a person would write: with as few digits as agree."""
    short = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in short if agrees(x)), value)


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are set."""
    return {key: part for key, part in value.items() if part is not None}


def shown(value: Any) -> str:
    """A value as a configuration writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def listed(values: Iterable[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(shown(value) for value in values)
