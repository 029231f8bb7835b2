"""Rules between the fields of a Hugging Face configuration and our options, each to be read both ways."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from hybrid_lm.layers.rotary import SCALING_KEYS
from hybrid_lm.registry import table

Fields = Mapping[str, Any]
"""A Hugging Face configuration as plain data."""


class ConversionError(ValueError):
    """A model or a folder that cannot be converted; nothing was left behind."""


@dataclass
class Options:
    """An architecture as flat options, `block.eps` of the model and `attention.n_heads` of its layers.

    Reading a layer's option takes the first layer's; setting it sets every layer's. What a table cannot say
    of single layers is found when it is run both ways and the results are compared (see `family.Family`).
    """

    model: dict[str, Any]
    """Path -> value of what the model has once."""
    layers: list[dict[str, Any]]
    """For each of *their* layers, path -> value; the path begins with the type of ours that it belongs to."""

    def __getitem__(self, path: str) -> Any:
        return (self.layers[0] if of_layer(path) else self.model)[path]

    def __setitem__(self, path: str, value: Any) -> None:
        for place in self.layers if of_layer(path) else [self.model]:
            place[path] = value


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

    partial: whether the class rotates only `partial_rotary_factor` of each head; the others ignore it.
    """

    theirs = ("rope_parameters", "max_position_embeddings")
    # dynamic and longrope: transformers reads a long prompt otherwise than it decodes one (see `ops.rope`).
    rules = ("linear", "yarn", "llama3")

    def __init__(self, partial: bool = False):
        self.partial = partial

    def read(self, fields: Fields, ours: Options) -> None:
        given = dict(fields["rope_parameters"] or {})
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
        ours["attention.rope"] = {
            "theta": theta,
            "fraction": fraction,
            "interleaved": False,
            "scaling": scaling,
            "max_positions": fields["max_position_embeddings"],
        }

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        rope = ours["attention.rope"]
        if rope is None:
            raise ConversionError("attention.rope is null, it always has rotary positions")
        scaling = without_nulls(rope["scaling"] or {"rope_type": "default"})
        if scaling["rope_type"] not in ("default", *self.rules):
            raise ConversionError(f"attention.rope.scaling is {scaling['rope_type']}")
        fields["rope_parameters"] = {**scaling, "rope_theta": rope["theta"]}
        if self.partial:
            fields["rope_parameters"]["partial_rotary_factor"] = rope["fraction"]
        if rope["max_positions"] is not None:
            fields["max_position_embeddings"] = rope["max_positions"]


class WindowsByLayer(Rule):
    """`layer_types` with one `sliding_window` for the layers that have one."""

    theirs = ("layer_types", "sliding_window", "use_sliding_window", "max_window_layers")

    def read(self, fields: Fields, ours: Options) -> None:
        window, kinds = fields.get("sliding_window"), fields["layer_types"]
        if len(kinds) != len(ours.layers):
            raise ConversionError(f"layer_types has {len(kinds)} entries for {len(ours.layers)} layers")
        for kind, layer in zip(kinds, ours.layers, strict=True):
            if kind not in ("full_attention", "sliding_attention"):
                raise ConversionError(f"layer_types: {kind!r}: only full_attention, sliding_attention")
            layer["attention.window"] = window if kind == "sliding_attention" else None

    def write(self, ours: Options, fields: dict[str, Any]) -> None:
        windows = [layer["attention.window"] for layer in ours.layers]
        there = {window for window in windows if window is not None}
        if len(there) > 1:
            raise ConversionError(f"attention.window is {listed(sorted(there))}, it has one for all layers")
        fields["use_sliding_window"] = bool(there)
        fields["sliding_window"] = next(iter(there), None)
        fields["max_window_layers"] = 0
        fields["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]


def without_nulls(value: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are set."""
    return {key: part for key, part in value.items() if part is not None}


def shown(value: Any) -> str:
    """A value as a configuration writes it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def listed(values: Iterable[Any]) -> str:
    """Values with commas between them."""
    return ", ".join(shown(value) for value in values)
