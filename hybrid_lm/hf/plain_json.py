"""An architecture as JSON, which has no infinities and no tuples."""

from __future__ import annotations

from typing import Any

INFINITIES = {".inf": float("inf"), "-.inf": float("-inf")}


def json_safe(value: Any) -> Any:
    """`value` with infinities spelled as YAML does (`.inf`), since JSON cannot, and tuples as lists."""
    if isinstance(value, dict):
        return {key: json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return next(
        (word for word, number in INFINITIES.items() if isinstance(value, float) and value == number), value
    )


def from_json_safe(value: Any) -> Any:
    """The inverse of `json_safe`."""
    if isinstance(value, dict):
        return {key: from_json_safe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json_safe(item) for item in value]
    return INFINITIES.get(value, value) if isinstance(value, str) else value
