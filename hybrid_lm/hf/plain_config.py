"""What our configuration classes use of pydantic, for a process that does not have it: part of an export.

The values were validated before they were written, so nothing is checked here. Sections become objects by the
types of their fields, what is not given has its default, and that is all.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, NamedTuple, Self, Union, get_args, get_origin, get_type_hints


def Field(**_bounds: Any) -> None:
    """Bounds and choices, which were checked before."""


def ConfigDict(**_settings: Any) -> None:
    """How strict validation is."""


class FieldInfo(NamedTuple):
    """A field: its type, and the marks in its `Annotated`."""

    annotation: Any
    metadata: tuple[Any, ...]


@functools.cache
def fields_of(cls: type) -> dict[str, FieldInfo]:
    """The annotated fields of a class and its bases."""
    hints = get_type_hints(cls, include_extras=True)
    own = {name: hint for name, hint in hints.items() if get_origin(hint) is not ClassVar}
    return {name: FieldInfo(hint, getattr(hint, "__metadata__", ())) for name, hint in own.items()}


class Fields:
    """`model_fields` of a class."""

    def __get__(self, _: Any, owner: type) -> dict[str, FieldInfo]:
        return fields_of(owner)


def read(annotation: Any, value: Any) -> Any:
    """`value` as the type says: mappings as sections, lists as tuples where the type is one."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return read(args[0], value)
    if origin in (Union, types.UnionType):
        readings = [read(choice, value) for choice in args]
        return next((reading for reading in readings if reading is not value), value)
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel) and isinstance(value, Mapping):
        return annotation(**value)
    if origin is dict and isinstance(value, Mapping):
        return {key: read(args[1], item) for key, item in value.items()}
    return tuple(value) if origin is tuple and isinstance(value, list) else value


class BaseModel:
    """A section: an object with the fields that its class annotates."""

    model_fields: ClassVar[Fields] = Fields()

    def __init__(self, **values: Any):
        for name, field in fields_of(type(self)).items():
            default = getattr(type(self), name, None)
            setattr(self, name, read(field.annotation, values.pop(name, default)))
        self.model_extra = values

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.model_dump().items())})"

    @classmethod
    def model_validate(cls, values: Mapping[str, Any]) -> Self:
        """The section that `values` describe."""
        return cls(**values)

    def model_dump(self, *, exclude_none: bool = False) -> dict[str, Any]:
        """The fields and their values."""
        found = {name: getattr(self, name) for name in fields_of(type(self))} | self.model_extra
        return {name: value for name, value in found.items() if not (exclude_none and value is None)}

    def model_copy(self, *, update: Mapping[str, Any]) -> Self:
        """A copy with some fields changed."""
        return type(self)(**{**self.model_dump(), **update})
