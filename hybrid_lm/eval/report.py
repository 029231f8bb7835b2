"""One HTML file that says what some runs have learned: no script, no link, nothing outside it.

A pure function of the files in the runs' folders.
"""

from __future__ import annotations

import base64
import html
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hybrid_lm.eval import compare, plots
from hybrid_lm.eval.summary import Folders, Summary, read_runs, recall_axis, recall_points
from hybrid_lm.eval.table import is_number, layers_table, notes, number, results_table
from hybrid_lm.files import replace_text

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
  max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { font-size: .85rem; color: #444; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: left; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; } th { border-bottom: 2px solid #888; }
.wrap th, .wrap td:not(.number) { white-space: normal; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; font-size: .85rem; white-space: pre-wrap;
  overflow-wrap: anywhere; } pre b { color: #0b5394; } summary { cursor: pointer; padding: .2rem 0; }
@media print { body { max-width: none; font-size: 11pt; } figure, tr, li { break-inside: avoid; }
  .scroll, pre { overflow: visible; } td, th { white-space: normal; } }
"""


def report(runs: Folders | Iterable[str | Path], out: str | Path, title: str = "hybrid_lm report") -> Path:
    """Writes the report of some runs to the file `out`, whole or not at all, and returns its path.

    Args:
        runs: the runs' folders, or name -> folders (a text model with its recall probes, one per seed).

    Raises:
        ValueError: for no runs, a folder without results, results that cannot be read, and without
            matplotlib.
        OSError: if the file cannot be written.
    """
    summaries = read_runs(runs)
    if not summaries:
        raise ValueError("report needs at least one run's folder")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, render(summaries, title))
    return path


def render(runs: Sequence[Summary], title: str) -> str:
    """The HTML text."""
    rows, refusals = comparisons(runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        section("In short", bullets([*findings(runs), *verdicts(runs, rows), *refusals, *notes(runs)])),
        section("Results", table(*results_table(runs)) + note(RESULTS_NOTE)),
        section("Figures", figures(runs)),
        section("Paired comparisons", compared(rows)),
        section("Layers", "".join(layers(run) for run in runs if run.model)),
        section("Samples", "".join(sample(run) for run in runs if run.sample)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(title)}</title><style>{CSS}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}</body></html>\n'


RESULTS_NOTE = (
    "Bits per byte are of held-out text, lower is better. Recall is the mean accuracy over seeds, in "
    "brackets the least and the greatest seed, or with one seed its 95 % interval with sequences as "
    "clusters. State is the memory of one sequence while generating, measured on the tensors: a fixed part, "
    "and a part for each token read."
)
COMPARED_NOTE = (
    "Each row is about two trained models (of a probe: its first seed) on the same documents or sequences, "
    "not about architectures: another seed of the same pattern may do better or worse. p (Holm) is "
    "corrected for the number of rows, the intervals are not."
)


def comparisons(runs: Sequence[Summary]) -> tuple[list[compare.Row], list[str]]:
    """All pairs of runs on what both were tested on, corrected together, and why a pair was left out."""
    results = {run.name: run.results for run in runs}
    tasks = {name: {key for key, _ in compare.outcomes(found)} for name, found in results.items()}
    rows, refusals = [], []
    for a, b in itertools.combinations(results, 2):
        if tasks[a] & tasks[b]:
            try:
                rows += compare.compare({a: results[a], b: results[b]})
            except ValueError as error:
                refusals.append(f"Not compared: {error}.")
    return compare.corrected(rows), refusals


def findings(runs: Sequence[Summary]) -> Iterator[str]:
    """Who is best at what, and against which floor."""
    scored = sorted((run.text["bits_per_byte"], run.name) for run in runs if run.text)
    if scored:
        listed = ", ".join(f"{name} {bits:.3f}" for bits, name in scored)
        floors = ", ".join(f"{name} {bits:.3f}" for name, bits in baselines(runs).items())
        yield f"Held-out bits per byte: {listed}" + (
            f"; compressors on the same bytes: {floors}." if floors else "."
        )
    axis = recall_axis(row for run in runs for row in run.probe)
    if axis is not None:
        hardest = max(row["setting"].get(axis, 0) for run in runs for row in run.probe)
        last = {run.name: [p for p in recall_points(run.probe, axis) if p.x == hardest] for run in runs}
        ranked = sorted(
            ((points[0], name) for name, points in last.items() if points), reverse=True, key=_accuracy
        )
        if ranked:
            listed = ", ".join(f"{name} {point.accuracy:.3f}" for point, name in ranked)
            floor = ranked[0][0]
            yield recall_models(runs)
            yield (
                f"Recall at {axis} {hardest:g}: {listed}; a model that does not recall reaches "
                f"{floor.plateau:.3f}, chance is {floor.chance:.4f}."
            )


def recall_models(runs: Sequence[Summary]) -> str:
    """What was tested on recall: the probes' own models, which share only a name with the text models."""
    told = []
    for run in runs:
        models = sorted({(row["pattern"], row["parameters"]) for row in run.probe if "pattern" in row})
        seeds = len({row["seed"] for row in run.probe if "seed" in row})
        count = f"{seeds} seed{'s' if seeds != 1 else ''}"
        told += [f"{run.name} {pattern} ({number(n)} parameters, {count})" for pattern, n in models]
    return f"Models trained for recall: {'; '.join(told)}." if told else ""


def compared(rows: Sequence[compare.Row]) -> str:
    """The table of comparisons, nothing if there are none."""
    if not rows:
        return ""
    # Of eleven columns the last is the one that matters: it must not be beyond the edge.
    return table(compare.HEADER, [compare.cells(row) for row in rows], wrap=True) + note(COMPARED_NOTE)


def _accuracy(item: tuple[plots.Point, str]) -> float:
    return item[0].accuracy


def verdicts(runs: Sequence[Summary], rows: Sequence[compare.Row]) -> Iterator[str]:
    """Each hybrid against each run of one mixer, on text and on the hardest recall."""
    by_name = {run.name: run for run in runs}
    shown = headlines(runs)
    for row in rows:
        if row.task not in shown:
            continue
        for hybrid, other in ((row.baseline, row.other), (row.other, row.baseline)):
            if len(by_name[hybrid].mixers) > 1 and len(by_name[other].mixers) == 1:
                yield verdict(row, hybrid, other)


def headlines(runs: Sequence[Summary]) -> set[str]:
    """The tasks that a short account names: held-out text, and recall where it is hardest."""
    axis = recall_axis(row for run in runs for row in run.probe)
    probe = [row for run in runs for row in run.probe if axis in row["setting"]]
    hardest = max((row["setting"][axis] for row in probe), default=None)
    return {compare.TEXT} | {compare.probe_task(row) for row in probe if row["setting"][axis] == hardest}


def verdict(row: compare.Row, hybrid: str, other: str) -> str:
    """One sentence about one row."""
    if row.p is None:
        return (
            f"{hybrid}, a hybrid, against {other} in {row.task}, {row.metric}: {row.n} documents, "
            "questions or sequences are too few to tell."
        )
    what = (
        "better than"
        if row.better == hybrid
        else "worse than"
        if row.better == other
        else "not told apart from"
    )
    sign = 1 if row.other == hybrid else -1
    size = f"{sign * row.difference:+.4f}"
    if row.low is not None and row.high is not None:
        low, high = sorted((sign * row.low, sign * row.high))
        size += f", 95 % interval {low:+.4f} to {high:+.4f}"
    p = "" if row.p_holm is None else f", corrected p {row.p_holm:.2g}"
    return f"{hybrid}, a hybrid, is {what} {other} in {row.task}, {row.metric}: {size}{p}."


def baselines(runs: Sequence[Summary]) -> dict[str, float]:
    """The compressors' bits per byte, on the text of the first run that has one."""
    return next((run.text["baselines"] for run in runs if run.text and run.text.get("baselines")), {})


def figures(runs: Sequence[Summary]) -> str:
    """The plots for which there is something to plot."""
    drawn = [
        (plots.train_loss(runs), "Loss on the training text, smoothed over a fortieth of the run."),
        (
            plots.bits_per_byte(runs, baselines(runs)),
            "Bits per byte in validations during the run, on windows of held-out text; dotted: general "
            "compressors on the held-out documents.",
        ),
        (
            plots.recall(runs),
            "Share of right answers; bars: least and greatest seed, or the 95 % interval of a single one. "
            "Plateau: answering with any value of the context.",
        ),
        (
            plots.recall_memory(runs),
            "The same against the memory of one sequence. Grey: Zoology's published points, mean over harder "
            "settings, best of several learning rates: for orientation only.",
        ),
        (
            plots.loss_by_position(runs),
            "Held-out loss by the tokens of context that the model had in its window.",
        ),
    ]
    return f'<div class="figures">{"".join(figure(svg, text) for svg, text in drawn if svg)}</div>'


def figure(svg: str, caption: str) -> str:
    """A plot with its caption; the SVG is inside the file."""
    data = base64.b64encode(svg.encode()).decode()
    text = html.escape(caption)
    image = f'<img alt="{text}" src="data:image/svg+xml;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>\n"


def section(title: str, body: str) -> str:
    """A heading and what is under it, nothing if that is nothing."""
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def bullets(lines: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(line)}</li>\n" for line in lines if line)
    return f"<ul>{items}</ul>" if items else ""


def note(text: str) -> str:
    return f"<p><small>{html.escape(text)}</small></p>"


def table(header: Sequence[str], lines: Sequence[Sequence[str]], *, wrap: bool = False) -> str:
    """A table that scrolls sideways on a narrow screen; `wrap`: its words may take several lines."""

    def cell(text: str) -> str:
        kind = ' class="number"' if is_number(text) else ""
        return f"<td{kind}>{html.escape(text)}</td>"

    top = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(map(cell, line))}</tr>\n" for line in lines)
    kind = "scroll wrap" if wrap else "scroll"
    return f'<div class="{kind}"><table><thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n'


def layers(run: Summary) -> str:
    """The residual layers of a model; open, for paper shows no folded text."""
    assert run.model is not None
    title = html.escape(f"{run.name}: {run.model['pattern']}")
    return f"<details open><summary>{title}</summary>{table(*layers_table(run.model))}</details>\n"


def sample(run: Summary) -> str:
    """A prompt in bold and what the model made of it."""
    assert run.sample is not None
    prompt, text = html.escape(run.sample["prompt"]), html.escape(run.sample["text"])
    return f"<h3>{html.escape(run.name)}</h3><pre><b>{prompt}</b>{text}</pre>\n"
