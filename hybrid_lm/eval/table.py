"""The table of results: the same cells on the terminal and in the report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid_lm.eval.summary import Summary, recall_axis, recall_points

NONE = "-"
OWN = "hybrid_lm_"
"""Of our own tasks' names, left out where there is little room."""
FEW = 10
"""Questions below which a task's score is a matter of luck."""


def results_table(runs: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """Header and one line per run, of the columns for which any run has something.

    Recall is at the hardest setting, mean over seeds; of an lm-eval task its first metric is shown.
    """
    axis = recall_axis(row for run in runs for row in run.probe)
    hardest = max((row["setting"].get(axis, 0) for run in runs for row in run.probe), default=None)
    columns = [("run", [run.name for run in runs])]
    columns += [
        ("pattern", [str(_model(run, "pattern")) for run in runs]),
        ("parameters", [number(_model(run, "parameters")) for run in runs]),
        ("bits/byte", [NONE if run.text is None else f"{run.text['bits_per_byte']:.4f}" for run in runs]),
    ]
    if axis is not None and hardest is not None:
        columns.append((f"recall, {axis} {hardest:g}", [_recall(run, axis, hardest) for run in runs]))
    firsts = {task: metric for run in runs for (task, metric), _ in reversed([*harness_scores(run.harness)])}
    for task, metric in sorted(firsts.items()):
        scores = [_score(run, task, metric) for run in runs]
        name = f"{task.removeprefix(OWN)} {metric.replace('_', ' ')}"
        columns.append((name, scores))
    columns += [
        ("train tokens/s", [number(run.tokens_per_s) for run in runs]),
        ("state", [state(run.model) for run in runs]),
    ]
    kept = [(name, cells) for name, cells in columns if name == "run" or any(cell != NONE for cell in cells)]
    return [name for name, _ in kept], [
        list(line) for line in zip(*(cells for _, cells in kept), strict=True)
    ]


def state(model: Mapping[str, Any] | None) -> str:
    """Memory of one sequence: what is fixed and what each token adds."""
    if model is None:
        return NONE
    parts = [(model["state_bytes_fixed"], ""), (model["state_bytes_per_token"], "/token")]
    return " + ".join(size(n) + unit for n, unit in parts if n) or "none"


def layers_table(model: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and one line per residual layer of a model."""
    header = ["layer", "name", "type", "parameters", "state, fixed", "state, per token", "FLOPs/token"]
    lines = [
        [
            str(row["index"]),
            row["name"],
            row["type"],
            number(row["parameters"]),
            size(row["state_bytes_fixed"]),
            size(row["state_bytes_per_token"]),
            number(row["flops_per_token"]),
        ]
        for row in model["layers"]
    ]
    return header, lines


def harness_scores(harness: Mapping[str, Any] | None) -> Iterator[tuple[tuple[str, str], float]]:
    """The numbers of lm-eval: (task, metric) -> score; standard errors and names are left out."""
    for task, metrics in ((harness or {}).get("results") or {}).items():
        for name, value in metrics.items():
            metric, _, filtered = name.partition(",")
            if isinstance(value, int | float) and filtered and not metric.endswith("_stderr"):
                yield (task, metric if filtered == "none" else f"{metric} ({filtered})"), float(value)


def n_questions(harness: Mapping[str, Any] | None, task: str) -> int | None:
    """Questions or documents of a task that lm-eval asked; None where they were not kept."""
    samples = ((harness or {}).get("samples") or {}).get(task)
    # Each filter of a task has its own record of a question.
    return None if samples is None else len({sample["hash"] for sample in samples})


def notes(runs: Sequence[Summary]) -> list[str]:
    """What to know before one reads much into the table: tasks of a few questions."""
    told = []
    for run in runs:
        for task in (run.harness or {}).get("samples") or {}:
            n = n_questions(run.harness, task)
            if n is not None and n < FEW:
                told.append(f"{run.name}: {task} has {n} question{'s' * (n != 1)}: its score is mostly luck.")
    return told


def print_table(console: Console, title: str, header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on the terminal; words to the left, numbers to the right."""
    table = Table(title=title, title_justify="left")
    for name, cells in zip(header, zip(*lines, strict=True) if lines else [()] * len(header), strict=True):
        table.add_column(name, justify="right" if all(map(is_number, cells)) else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console.print(table, markup=False)


def is_number(cell: str) -> bool:
    """Whether a cell belongs to the right."""
    return cell == NONE or cell[:1].isdigit() or cell[:1] in "+-"


def number(x: float | None) -> str:
    """1,234,567 as 1.23 M; whole below ten thousand."""
    if x is None:
        return NONE
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= 10_000 and abs(x) >= scale:
            return f"{x / scale:.3g} {unit}"
    return f"{x:,.0f}"


def size(n: float | None) -> str:
    """Bytes with a unit of 1024."""
    if n is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024 or unit == "GiB":
            break
        n /= 1024
    return f"{n:.4g} {unit}"


def _model(run: Summary, key: str) -> Any:
    found = None if run.model is None else run.model.get(key)
    return NONE if found is None and key == "pattern" else found


def _score(run: Summary, task: str, metric: str) -> str:
    """A score of lm-eval and of how many questions it is: `0.3750 (n 8)`."""
    score, n = dict(harness_scores(run.harness)).get((task, metric)), n_questions(run.harness, task)
    return NONE if score is None else f"{score:.4f}" + (f" (n {n})" if n else "")


def _recall(run: Summary, axis: str, x: float) -> str:
    points = [point for point in recall_points(run.probe, axis) if point.x == x]
    if not points:
        return NONE
    (point,) = points
    return f"{point.accuracy:.3f} [{point.low:.2f}, {point.high:.2f}]"
