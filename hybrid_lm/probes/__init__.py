"""The probes. Adding one is a file here, a line in this table, and a test in `tests/probes/`."""

from __future__ import annotations

from typing import Any

from hybrid_lm.probes.base import Probe
from hybrid_lm.registry import Registry

PROBES = Registry("probe", {"mqar": "hybrid_lm.probes.mqar:MQAR"})


def names() -> tuple[str, ...]:
    """The known probes."""
    return tuple(PROBES)


def get(name: str, preset: str = "small", **params: Any) -> Probe:
    """A probe: `get("mqar", n_pairs=8)`. `params` replace the preset's values.

    Raises ValueError for an unknown probe, preset or parameter, and for values that the probe cannot have.
    """
    return PROBES[name].build(preset, **params)
