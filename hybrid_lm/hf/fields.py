"""Rules between the fields of a Hugging Face configuration and our options, each to be read both ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from hybrid_lm.hf.options import Absent, ConversionError, Fields, Options, listed, shown


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


def shortest(value: float, agrees: Callable[[float], bool]) -> float:
    """The number next to `value` that a person would write: with as few digits as agree."""
    short = (float(f"{value:.{digits}g}") for digits in range(1, 17))
    return next((x for x in short if agrees(x)), value)
