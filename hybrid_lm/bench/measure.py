"""Check, interleave, time: the core that all three benchmarks share."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from hybrid_lm.ops.backend import report
from hybrid_lm.registry import unknown

LIMIT = 1e-4
"""Largest error of float32, over the largest value, of a candidate that computes the same thing. A mistake in
the mathematics is orders above it; rounding is below 1e-5 in every case here."""

Row = dict[str, Any]
"""What is known of one candidate: `ours`, `status` (ok, wrong, failed, absent, left out), `note`, `errors`,
`worst_error`, `worst_of`, and a `spread` of each time."""

Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Candidate:
    """One way to do the work of a case, ours or a peer's."""

    name: str
    load: Callable[[], Any]
    """Imports and builds it; the result is what `check` and `run` of `compare` are given."""
    ours: bool = False
    packages: tuple[str, ...] = ()
    """What must be installed."""
    compiled: bool = False
    """Goes through torch.compile, which takes seconds to minutes before anything is timed."""
    max_length: int | None = None
    """Tokens beyond which it is left out, for its time."""
    rounds: int | None = None
    """Timed rounds at most, without a warm-up, for a candidate of seconds a round."""
    limit: float = LIMIT

    def missing(self) -> str | None:
        """How to get what is not installed."""
        absent = [name for name in self.packages if find_spec(name) is None]
        return f"needs {' and '.join(absent)}: pip install 'hybrid_lm[bench]'" if absent else None


def backends(op: str) -> list[str]:
    """Our backends of an op that run on this machine, the one that `auto` takes first; no reference."""
    able = [row for row in report("cpu") if row.op == op and row.why_not is None]
    kept = [row for row in able if row.backend != "reference" or row.chosen]
    return [row.backend for row in sorted(kept, key=lambda row: not row.chosen)]


def choose(what: str, wanted: Sequence[str] | None, known: Iterable[str]) -> list[str]:
    """`wanted`, or all of `known` where it is None. Raises ValueError for a name that is not known."""
    names = list(dict.fromkeys(known))
    for name in wanted or ():
        if name not in names:
            raise ValueError(unknown(what, name, names))
    return names if wanted is None else [name for name in names if name in wanted]


def clock_of(threads: int) -> tuple[str, Callable[[], float]]:
    """The name of the clock and the clock, in seconds.

    One thread: the process's CPU time, which other work on the machine disturbs least. More: wall time, for
    the sum over threads would not show what they win.
    """
    return ("process CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)


def compare(
    candidates: Sequence[Candidate],
    *,
    check: Callable[[Any], Mapping[str, float]],
    run: Callable[[Any], Times],
    repeat: int,
    length: int = 0,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Row]:
    """Checks every candidate, then times the right ones in turn.

    check   errors over the largest value, by quantity, of a loaded candidate
    run     the times of one round, by quantity
    repeat  timed rounds, after one that warms up
    length  tokens, for candidates that have a limit
    """
    rows: dict[str, Row] = {}
    ready: dict[str, Any] = {}
    for candidate in candidates:
        row = rows[candidate.name] = {"ours": candidate.ours, "status": "ok"}
        if (reason := candidate.missing()) is not None:
            row |= {"status": "absent", "note": reason}
        elif candidate.max_length is not None and length > candidate.max_length:
            row |= {"status": "left out", "note": f"too slow beyond {candidate.max_length} tokens"}
        else:
            tell(f"checking {candidate.name}")
            loaded = attempt(candidate, row, check)
            if row["status"] == "ok":
                ready[candidate.name] = loaded
    found = interleaved([c for c in candidates if c.name in ready], ready, run, repeat, tell)
    for name, times in found.items():
        rows[name] |= {key: spread(values) for key, values in times.items()}
    return rows


def attempt(candidate: Candidate, row: Row, check: Callable[[Any], Mapping[str, float]]) -> Any:
    """Loads and checks a candidate and writes the outcome into `row`."""
    try:
        with warnings.catch_warnings():
            if not candidate.ours:
                # What a peer warns of is not news of this measurement.
                warnings.simplefilter("ignore")
            loaded = candidate.load()
            errors = dict(check(loaded))
    except Exception as error:
        # A peer of another version, or a torch.compile without a compiler: the others can still be measured.
        if candidate.ours:
            raise
        lines = str(error).strip().splitlines() or [""]
        row |= {"status": "failed", "note": f"{type(error).__name__}: {lines[0]}"}
        return None
    worst = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
    row |= {"errors": errors, "worst_error": errors[worst], "worst_of": worst}
    # Not `error > limit`: NaN is wrong too.
    if not errors[worst] <= candidate.limit:
        note = f"{worst} differs from float64 by {errors[worst]:.1e} of its largest value: not timed"
        row |= {"status": "wrong", "note": note}
    return loaded


def interleaved(
    candidates: Sequence[Candidate],
    ready: Mapping[str, Any],
    run: Callable[[Any], Times],
    repeat: int,
    tell: Callable[[str], None],
) -> dict[str, dict[str, list[float]]]:
    """Every time of every round, by candidate and quantity; the round -1 warms up."""
    found: dict[str, dict[str, list[float]]] = {candidate.name: {} for candidate in candidates}
    for i in range(-1, repeat):
        tell(f"round {i + 1} of {repeat}" if i >= 0 else "warming up")
        for candidate in candidates:
            if candidate.rounds is not None and not 0 <= i < candidate.rounds:
                continue
            times = run(ready[candidate.name])
            for key, values in times.items() if i >= 0 else ():
                found[candidate.name].setdefault(key, []).extend(values)
    return found


def relative_errors(found: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, float]:
    """Largest error of each quantity over its largest true value."""
    assert set(found) == set(truth)
    return {
        key: float((found[key].double() - true).abs().max() / true.abs().max()) for key, true in truth.items()
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, extremes and number of measurements."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def add_ratios(rows: Mapping[str, Row], main: str) -> str | None:
    """Gives every timed row its `ratio` to the first of ours (quantity by quantity: above 1 is slower or
    larger), and each of ours how many times faster it is than every peer (`over`, of the quantity `main`).

    Returns the name of the first of ours, None if none was timed.
    """
    timed = {name: row for name, row in rows.items() if main in row}
    base = next((name for name, row in timed.items() if row["ours"]), None)
    if base is None:
        return None
    for row in timed.values():
        row["ratio"] = {
            key: typical(row[key]) / typical(rows[base][key])
            for key in rows[base]
            if key.rpartition("_")[2] in UNITS and row.get(key) and rows[base][key]
        }
        if row["ours"]:
            peers = {name: typical(peer[main]) for name, peer in timed.items() if not peer["ours"]}
            row["over"] = {name: time / typical(row[main]) for name, time in peers.items()}
    return base


UNITS = ("ms", "s", "mb")
"""How the name of a measured quantity ends."""


def typical(value: Any) -> float:
    """The median of a spread, or a single number."""
    return value["median"] if isinstance(value, Mapping) else value
