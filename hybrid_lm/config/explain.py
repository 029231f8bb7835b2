"""pydantic's complaints in our words: the path as it stands in the file, and what would be accepted there."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from hybrid_lm.registry import nearest

Path = tuple[str | int, ...]

WORDS = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "none_required": "must be null",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "missing": "missing",
}


class Finding(NamedTuple):
    """What is wrong at a path of the data, and lines that show it."""

    path: Path
    reason: str
    picture: str = ""


class _Fault(NamedTuple):
    path: Path
    labels: Path  # the union branches that pydantic puts into its locations
    reason: str
    of_type: bool  # the value as a whole has the wrong type


def explain(
    root: type[BaseModel], data: Any, error: ValidationError, more: Mapping[str, Any] = {}
) -> list[Finding]:
    """Each complaint of `root.model_validate(data)`, by its path in `data`; `more`: keys known beside the
    root's."""
    faults = [_fault(root, data, detail, more) for detail in error.errors(include_url=False)]
    findings: dict[Path, list[str]] = {}
    for fault in faults:
        if not _beside_the_point(fault, faults):
            reasons = findings.setdefault(fault.path, [])
            if fault.reason not in reasons:
                reasons.append(fault.reason)
    return [
        Finding(path, " or ".join(reasons).replace(" or must be ", " or "))
        for path, reasons in findings.items()
    ]


def _fault(root: type[BaseModel], data: Any, detail: Mapping[str, Any], more: Iterable[str]) -> _Fault:
    kind, loc, context = detail["type"], detail["loc"], detail.get("ctx", {})
    path, labels = _split(data, loc, kind in ("missing", "extra_forbidden"))
    reason = WORDS.get(kind) or detail["msg"].replace("Input should be", "must be").replace(
        "Value error, ", ""
    )
    if kind == "extra_forbidden":
        known = [*known_keys(root, data, loc[:-1]), *(more if len(path) == 1 else ())]
        reason = f"unknown key; known: {', '.join(sorted(known))}{_hint(str(path[-1]), known)}"
    elif kind == "literal_error":
        reason = (
            f"must be {context['expected']}{_hint(detail['input'], context['expected'].split(chr(39))[1::2])}"
        )
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        path = (*path, context["discriminator"].strip("'"))
        tags = context.get("expected_tags") or ", ".join(repr(tag) for tag in _tags(root, path))
        reason = f"must be one of {tags}{_hint(context.get('tag'), _quoted(tags))}"
        reason = f"missing; {reason}" if kind == "union_tag_not_found" else reason
    elif kind in ("int_type", "float_type", "bool_type"):
        reason += _instead(kind, detail["input"])
    return _Fault(path, labels, reason, kind.endswith("_type"))


def _split(data: Any, loc: Path, names_last: bool) -> tuple[Path, Path]:
    """A location as the path in the data and the rest: names of union branches."""
    path: list[str | int] = []
    labels: list[str | int] = []
    for i, element in enumerate(loc):
        inside = _has(data, element)
        if inside or (names_last and i == len(loc) - 1):
            path.append(element)
            data = data[element] if inside else None
        else:
            labels.append(element)
    return tuple(path), tuple(labels)


def _has(data: Any, element: str | int) -> bool:
    if isinstance(data, Mapping):
        return element in data
    return isinstance(data, list | tuple) and isinstance(element, int) and element < len(data)


def _beside_the_point(fault: _Fault, faults: list[_Fault]) -> bool:
    """A union says that the value is of none of its types; but one branch took it and tells what is wrong
    inside."""
    if not (fault.labels and fault.of_type):
        return False
    inner = [other for other in faults if other.path[: len(fault.path)] == fault.path and other.labels]
    return any(
        other.labels != fault.labels and not (other.of_type and other.path == fault.path) for other in inner
    )


def _quoted(text: str) -> list[str]:
    return text.split("'")[1::2]


def _hint(name: Any, known: Any) -> str:
    close = nearest(name, known) if isinstance(name, str) else None
    return f". Did you mean {close!r}?" if close else ""


def _instead(kind: str, given: Any) -> str:
    """What the writer probably meant, for a value that would have been taken as something else by other
    readers."""
    if kind == "bool_type":
        meant = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(str(given).lower())
        return f"; write {meant}" if meant else ""
    if kind == "int_type" and isinstance(given, float) and given.is_integer():
        return f"; write {int(given)}"
    plain = given.replace("_", "").replace(",", "") if isinstance(given, str) else ""
    return f"; write {plain}" if plain.isdecimal() and plain.isascii() else ""


def known_keys(root: type[BaseModel], data: Any, loc: Path) -> list[str]:
    """The keys that may stand at a location."""
    kinds: list[Any] = [root]
    for element in loc:
        if _has(data, element):
            kinds = [inner for kind in kinds for inner in _inside(kind, element)]
            data = data[element]
        else:
            kinds = [kind for kind in kinds if _labelled(kind, element)] or kinds
    return [name for kind in kinds if _is_model(kind) for name in kind.model_fields]


def _tags(root: type[BaseModel], path: Path) -> list[str]:
    kinds: list[Any] = [root]
    for element in path:
        kinds = [inner for kind in kinds for inner in _inside(kind, element)]
    return [tag for kind in kinds for tag in get_args(kind)]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _inside(kind: Any, element: str | int) -> Iterator[Any]:
    """The types that a value of type `kind` may have at one of its keys."""
    if _is_model(kind):
        if element in kind.model_fields:
            yield from _branches(kind.model_fields[element].annotation)
    elif get_origin(kind) is dict:
        yield from _branches(get_args(kind)[1])
    elif get_origin(kind) in (list, tuple):
        for inner in get_args(kind):
            yield from _branches(inner)


def _branches(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _branches(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for inner in get_args(annotation):
            yield from _branches(inner)
    else:
        yield annotation


def _labelled(kind: Any, label: str | int) -> bool:
    """Whether pydantic calls this branch of a union so: by the class, or by the tag in one of its fields."""
    if not _is_model(kind):
        return False
    fields = kind.model_fields.values()
    tags = [get_args(field.annotation) for field in fields if get_origin(field.annotation) is Literal]
    return kind.__name__ == label or any(label in tag for tag in tags)
