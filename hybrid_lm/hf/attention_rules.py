"""Rules for the fields about attention: rotary positions, windows, the factor on the scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid_lm.hf.fields import Rule, shortest
from hybrid_lm.hf.options import ConversionError, Fields, Options, listed, without_nulls
from hybrid_lm.layers.rotary import SCALING_KEYS


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
