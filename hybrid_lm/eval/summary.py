"""What the folders of a run say, gathered for tables and plots. Reads files only, no model."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_lm.eval.results import read_results, read_rows
from hybrid_lm.train.log import read_metrics

Folders = Mapping[str, Sequence[str | Path]]
"""Name of a run -> its folders: the one of its text model, those of its recall probes, one per seed."""


@dataclass(frozen=True)
class Summary:
    """One line of the results: a pattern, measured on text, on recall, or on both."""

    name: str
    model: dict[str, Any] | None = None
    """`pattern`, `parameters`, `state_bytes_fixed`, `state_bytes_per_token`, `layers`, ...: see
    `eval.run`."""
    text: dict[str, Any] | None = None
    probe: list[dict[str, Any]] = field(default_factory=list)
    """Rows of all seeds."""
    harness: dict[str, Any] | None = None
    sample: dict[str, Any] | None = None
    train: list[dict[str, Any]] = field(default_factory=list)
    """Records of the text model's training: step, loss, tokens, tokens_per_s."""
    validations: list[dict[str, Any]] = field(default_factory=list)
    """Records of its validations: step, bits_per_byte."""

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the training's records: the first ones are warm-up."""
        speeds = [record["tokens_per_s"] for record in self.train if record.get("tokens_per_s")]
        return statistics.median(speeds) if speeds else None

    @property
    def results(self) -> dict[str, Any]:
        """What `compare` wants."""
        first_seed = {row["data_hash"]: row for row in reversed(self.probe)}
        return {"text": self.text, "probe": list(first_seed.values())[::-1], "harness": self.harness}

    @property
    def mixers(self) -> set[str]:
        """Types of the layers that remember: one is a Transformer or a pure SSM, two and more a hybrid."""
        layers = (self.model or {}).get("layers", ())
        remember = (row for row in layers if row["state_bytes_fixed"] or row["state_bytes_per_token"])
        return {kind for row in remember for kind in row["type"].split("+")}


def read_runs(folders: Folders | Iterable[str | Path]) -> list[Summary]:
    """Gathers runs; a plain list of folders gives each its folder's name.

    Raises:
        ValueError: for a folder that does not exist or holds neither results nor metrics, and for two runs of
            one name.
    """
    if isinstance(folders, Mapping):
        return [read_run(str(name), paths) for name, paths in folders.items()]
    paths = [Path(folder) for folder in folders]
    named = {path.resolve().name: path for path in paths}
    if len(named) != len(paths):
        raise ValueError("two of the runs have folders of the same name; rename one")
    return [read_run(name, [path]) for name, path in named.items()]


def read_run(name: str, folders: Sequence[str | Path]) -> Summary:
    """One run out of one or several folders. Of what two folders both have, the first one's counts."""
    parts: dict[str, Any] = {}
    probe: list[dict[str, Any]] = []
    for folder in map(Path, folders):
        results, rows, records = (
            read_results(folder),
            read_rows(folder / "results.jsonl"),
            read_metrics(folder),
        )
        if not (results or rows or records):
            what = "holds neither results nor metrics" if folder.is_dir() else "no such folder"
            raise ValueError(f"{folder}: {what}; give the folder of a run that was trained or evaluated")
        rows = rows or results.get("probe") or []
        probe += rows
        for key in ("text", "harness", "sample"):
            parts.setdefault(key, results.get(key))
            parts[key] = parts[key] or results.get(key)
        # The text model is the one that the name stands for; its probe twin may be of another size.
        if results.get("model") and ("model" not in parts or (not parts.get("of_text") and not rows)):
            parts["model"], parts["of_text"] = results["model"], not rows
        if not rows and "train" not in parts:
            parts["train"] = [record for record in records if record["kind"] == "train"]
            parts["validations"] = [record for record in records if record["kind"] == "eval"]
    parts.pop("of_text", None)
    return Summary(name, probe=probe, **parts)


class Point(NamedTuple):
    """Accuracy of one run at one setting of a probe, over its seeds."""

    x: float
    accuracy: float
    """Mean over seeds."""
    low: float
    high: float
    """Least and greatest seed; with one seed, its 95 % interval."""
    seeds: int
    state_bytes: float
    chance: float
    plateau: float


def recall_axis(rows: Iterable[Mapping[str, Any]]) -> str | None:
    """The parameter that recall is plotted over: the first that takes several numeric values."""
    values: dict[str, set[Any]] = defaultdict(set)
    for row in rows:
        for key, value in row["setting"].items():
            if isinstance(value, int | float):
                values[key].add(value)
    return next((key for key, seen in values.items() if len(seen) > 1), next(iter(values), None))


def recall_points(rows: Iterable[Mapping[str, Any]], axis: str) -> list[Point]:
    """One point per value of `axis`, in order."""
    groups: dict[float, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if axis in row["setting"]:
            groups[row["setting"][axis]].append(row)
    points = []
    for x, group in sorted(groups.items()):
        seen = [row["accuracy"] for row in group]
        low, high = (group[0]["low"], group[0]["high"]) if len(seen) == 1 else (min(seen), max(seen))
        state = statistics.fmean(row["state_bytes"] for row in group)
        mean = statistics.fmean(seen)
        points.append(Point(x, mean, low, high, len(seen), state, group[0]["chance"], group[0]["plateau"]))
    return points
