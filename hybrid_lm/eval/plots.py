"""The report's figures as SVG text. matplotlib is imported here and nowhere else."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_lm.data.optional import MissingPackage
from hybrid_lm.eval.published import published
from hybrid_lm.eval.summary import Point, Summary, recall_axis, recall_points

# Okabe & Ito 2008: told apart with every common colour blindness; shapes and dashes tell them apart in grey.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 2)), ":")
STYLE: Any = {
    "figure.figsize": (5.6, 4.3),
    "figure.constrained_layout.use": True,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "lines.linewidth": 1.8,
    # Same data, same bytes.
    "svg.hashsalt": "hybrid_lm",
}
BANDS = 24
"""Places of a window are averaged in about so many bands of equal ratio."""


def draw(plot: Callable[[Any], None]) -> str:
    """An SVG document of one axes that `plot` draws on."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingPackage("the report's plots need matplotlib: pip install 'hybrid_lm[eval]'") from None
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        axes = figure.subplots()
        plot(axes)
        # Below the axes it hides nothing, whatever the data.
        if len(names := axes.get_legend_handles_labels()[1]):
            figure.legend(
                loc="outside lower center", ncols=2 if max(map(len, names)) < 32 else 1, handlelength=3
            )
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": "hybrid_lm"})
    return out.getvalue()


def style(index: int, marker: bool = False) -> dict[str, Any]:
    """Colour and dash (and shape) of the index-th run, the same in every figure."""
    look = {"color": COLORS[index % len(COLORS)], "linestyle": DASHES[index % len(DASHES)]}
    return look | ({"marker": MARKERS[index % len(MARKERS)], "markersize": 6} if marker else {})


def train_loss(runs: Sequence[Summary]) -> str | None:
    """Training loss over steps, smoothed over a fortieth of the run."""

    def plot(ax: Any) -> None:
        for i, run in enumerate(runs):
            points = [(r["step"], r["loss"]) for r in run.train if r.get("loss") is not None]
            if points:
                steps, loss = np.array(points).T
                # A line of one point is not seen.
                look = style(i, marker=len(points) == 1)
                ax.plot(steps, smooth(loss, len(loss) // 40), label=run.name, **look)
        label(ax, "Training loss", "optimizer steps", "nats per token")

    return draw(plot) if any(run.train for run in runs) else None


def bits_per_byte(runs: Sequence[Summary], baselines: Mapping[str, float]) -> str | None:
    """Held-out bits per byte over training tokens, with the compressors' levels."""

    def plot(ax: Any) -> None:
        for i, run in enumerate(runs):
            seen = [
                (r["step"], r["bits_per_byte"]) for r in run.validations if r.get("bits_per_byte") is not None
            ]
            tokens = [(r["step"], r["tokens"]) for r in run.train if r.get("tokens") is not None]
            if seen and tokens:
                x = np.interp([r[0] for r in seen], [r[0] for r in tokens], [r[1] for r in tokens])
                ax.plot(x, [bits for _, bits in seen], label=run.name, **style(i, marker=True))
        for (name, level), dash in zip(baselines.items(), ((0, (1, 1)), (0, (1, 3))), strict=False):
            ax.axhline(level, color="#666666", linestyle=dash, linewidth=1.4, label=f"{name}: {level:.2f}")
        ax.xaxis.set_major_formatter(lambda x, _: short(x))
        label(ax, "Held-out text", "training tokens", "bits per byte")

    return draw(plot) if any("bits_per_byte" in r for run in runs for r in run.validations) else None


def loss_by_position(runs: Sequence[Summary]) -> str | None:
    """Held-out loss against the tokens of context, in bands of equal ratio."""

    def plot(ax: Any) -> None:
        for i, run in enumerate(runs):
            x, y = banded((run.text or {}).get("by_position") or [])
            if x:
                ax.plot(x, y, label=run.name, **style(i, marker=True))
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        label(ax, "Does more context help?", "tokens of context", "bits per token")

    return draw(plot) if any((run.text or {}).get("by_position") for run in runs) else None


def recall(runs: Sequence[Summary]) -> str | None:
    """Accuracy over the probe's varied parameter, with the levels of chance and of not recalling."""
    axis = recall_axis(row for run in runs for row in run.probe)
    if axis is None:
        return None

    def plot(ax: Any) -> None:
        floors: dict[float, Point] = {}
        for i, run in enumerate(runs):
            points = recall_points(run.probe, axis)
            floors |= {point.x: point for point in points}
            if points:
                x, y = [point.x for point in points], [point.accuracy for point in points]
                errors = [[p.accuracy - p.low for p in points], [p.high - p.accuracy for p in points]]
                ax.errorbar(x, y, errors, label=run.name, capsize=3, **style(i, marker=True))
        xs = sorted(floors)
        grey = {"color": "#666666", "linewidth": 1.4}
        ax.plot(
            xs, [floors[x].plateau for x in xs], linestyle=(0, (1, 1)), label="no recall (plateau)", **grey
        )
        ax.plot(xs, [floors[x].chance for x in xs], linestyle=(0, (1, 3)), label="chance", **grey)
        ax.set_xscale("log", base=2)
        ax.set_xticks(xs, [f"{x:g}" for x in xs])
        ax.minorticks_off()
        ax.set_ylim(-0.03, 1.05)
        label(ax, f"Recall: {runs_probe(runs)}", AXES.get(axis, axis), "accuracy")

    return draw(plot)


def recall_memory(runs: Sequence[Summary]) -> str | None:
    """Accuracy at the hardest setting over measured state bytes; grey: published, of larger settings."""
    axis = recall_axis(row for run in runs for row in run.probe)
    hardest = max((row["setting"].get(axis, 0) for run in runs for row in run.probe), default=None)
    if axis is None or hardest is None:
        return None

    def plot(ax: Any) -> None:
        for i, run in enumerate(runs):
            for point in recall_points(run.probe, axis):
                if point.x == hardest:
                    error = [[point.accuracy - point.low], [point.high - point.accuracy]]
                    look = style(i, marker=True) | {"linestyle": "none", "markersize": 9}
                    ax.errorbar(
                        [point.state_bytes], [point.accuracy], error, label=run.name, capsize=3, **look
                    )
        theirs = published("zoology_recall_memory")
        x, y = zip(*((float(row["state_bytes"]), float(row["accuracy"])) for row in theirs), strict=True)
        note = "published, other settings"
        ax.plot(x, y, ".", color="#aaaaaa", markersize=7, zorder=0, label=note)
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda x, _: short(x, 1024))
        ax.set_ylim(-0.03, 1.05)
        label(ax, f"Recall for memory, {axis} {hardest:g}", "state per sequence, bytes (k: 1024)", "accuracy")

    return draw(plot)


AXES = {"n_pairs": "pairs to remember", "seq_len": "tokens in the sequence"}
"""Parameters of probes in words."""


def runs_probe(runs: Sequence[Summary]) -> str:
    """Names of the probes that the runs were tested on."""
    return ", ".join(sorted({row["probe"].upper() for run in runs for row in run.probe}))


def label(ax: Any, title: str, x: str, y: str) -> None:
    """Title and axis names."""
    ax.set_title(title, loc="left")
    ax.set_xlabel(x)
    ax.set_ylabel(y)


def smooth(x: np.ndarray, half: int) -> np.ndarray:
    """Mean of each value (n) and the `half` before and after it, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    index = np.arange(len(x))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(x))
    return (total[high] - total[low]) / (high - low)


def banded(nats: Sequence[float | None]) -> tuple[list[float], list[float]]:
    """Tokens of context and mean bits per token in bands of equal ratio; the first places stay single."""
    edges = np.unique(np.geomspace(1, len(nats) + 1, BANDS + 1).round().astype(int)) if nats else np.array([])
    x, y = [], []
    for low, high in itertools.pairwise(edges.tolist()):
        seen = [(i, value) for i, value in enumerate(nats[low - 1 : high - 1], low) if value is not None]
        if seen:
            x.append(math.sqrt(seen[0][0] * seen[-1][0]))
            y.append(sum(value for _, value in seen) / len(seen) / math.log(2))
    return x, y


def short(x: float, base: int = 1000) -> str:
    """1,500,000 as 1.5M."""
    for unit, power in (("G", 3), ("M", 2), ("k", 1)):
        if abs(x) >= base**power:
            return f"{x / base**power:g}{unit}"
    return f"{x:g}"
