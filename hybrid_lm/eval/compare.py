"""Is one run better than another? Paired tests on the same documents and questions, corrected for how many
were asked.

Unpaired errors, as two separate scores would have them, hide differences that the same data shows plainly:
most of a score's variance is the documents', not the model's.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from hybrid_lm.files import finite

RESAMPLES = 10_000
MIN_PAIRS = 6
"""Fewer cannot show anything: five that all agree have a two-sided p of 2 / 2^5, which is not below 0.05."""
TOO_FEW = "too few to tell"
TEXT = "held-out text"
"""The task of bits per byte."""
DRAWS = 1 << 22
"""Random numbers held at a time."""


class Outcomes(NamedTuple):
    """What one run made of one task: its score is factor * sum(values) / sum(weights)."""

    hashes: Sequence[str]
    """Names of the documents or questions (n)."""
    values: np.ndarray
    """(n) float64."""
    weights: np.ndarray
    """(n) float64: bytes, scored tokens, or ones."""
    factor: float
    lower_is_better: bool

    @property
    def score(self) -> float:
        return self.factor * float(self.values.sum() / self.weights.sum())

    @property
    def binary(self) -> bool:
        """Whether each question is answered right or wrong, all counting the same."""
        return bool(np.isin(self.values, (0.0, 1.0)).all() and (self.weights == 1.0).all())


@dataclass(frozen=True)
class Row:
    """One task: `other` against `baseline`."""

    task: str
    metric: str
    baseline: str
    other: str
    baseline_score: float
    other_score: float
    difference: float
    """other - baseline, in the metric's unit."""
    low: float | None
    """95 % interval of the difference by paired bootstrap; None below six documents."""
    high: float | None
    p: float | None
    """Two-sided: exact McNemar where each question is right or wrong, else random swaps of the two runs;
    None below six documents."""
    p_holm: float | None
    """p corrected for the number of rows by Holm 1979."""
    n: int
    """Documents, questions or sequences."""
    test: str
    better: str
    """The run with the better score if p_holm < 0.05, else `-`."""


def compare(
    runs: Mapping[str, Mapping[str, Any]],
    *,
    baseline: str | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """Compares every run with the baseline on every task that both have.

    Args:
        runs: name -> what `results.json` says.
        baseline: a name among them; by default the first.
        resamples: of the bootstrap and of the label swaps.
        seed: of both; the same results give the same rows.

    Raises:
        ValueError: for fewer than two runs, an unknown baseline, no task in common, and results on different
            documents.
    """
    if len(runs) < 2:
        raise ValueError(f"compare needs at least two runs, not {len(runs)}")
    baseline = next(iter(runs)) if baseline is None else baseline
    if baseline not in runs:
        raise ValueError(f"baseline {baseline!r} is none of the runs: {', '.join(runs)}")
    tasks = {name: dict(outcomes(results)) for name, results in runs.items()}
    rows = []
    for other in runs:
        for key, theirs in tasks[other].items():
            if other != baseline and key in tasks[baseline]:
                rows.append(_row(key, (baseline, tasks[baseline][key]), (other, theirs), resamples, seed))
    if not rows:
        found = "; ".join(
            f"{name}: {', '.join(' '.join(key) for key in t) or 'no results'}" for name, t in tasks.items()
        )
        raise ValueError(f"the runs have no task in common ({found}); evaluate them on the same data first")
    return corrected(rows)


def outcomes(results: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], Outcomes]]:
    """The paired material of a run's results: (task, metric) -> outcomes."""
    if text := results.get("text"):
        hashes, nll, _, n_bytes = zip(*text["documents"], strict=True)
        yield (TEXT, "bits per byte"), _outcomes(hashes, nll, n_bytes, 1 / math.log(2), True)
    for row in results.get("probe") or ():
        hashes = [f"{row['data_hash']}:{i}" for i in range(row["n_sequences"])]
        yield (
            (probe_task(row), "accuracy"),
            _outcomes(hashes, row["correct"], row["scored"]),
        )
    harness = results.get("harness") or {}
    for task, samples in (harness.get("samples") or {}).items():
        for metric in sorted(
            set.intersection(*(set(sample["metrics"]) for sample in samples)) if samples else ()
        ):
            values = [sample["metrics"][metric] for sample in samples]
            hashes = [sample["hash"] for sample in samples]
            lower = metric in LOWER_IS_BETTER
            if metric == "bits_per_byte":
                nll, n_bytes = zip(*((-loglikelihood, size) for loglikelihood, size in values), strict=True)
                yield (task, metric), _outcomes(hashes, nll, n_bytes, 1 / math.log(2), True)
            elif all(isinstance(value, int | float) for value in values):
                yield (task, metric), _outcomes(hashes, values, np.ones(len(values)), 1.0, lower)


def probe_task(row: Mapping[str, Any]) -> str:
    """The name of a probe's setting as a task."""
    return " ".join([row["probe"], *(f"{key}={value}" for key, value in row["setting"].items())])


LOWER_IS_BETTER = frozenset({"bits_per_byte", "perplexity", "brier_score", "ter", "wer"})
"""Metrics of lm-eval in which less is more."""


def _outcomes(
    hashes: Sequence[str], values: Any, weights: Any, factor: float = 1.0, lower_is_better: bool = False
) -> Outcomes:
    return Outcomes(hashes, np.asarray(values, float), np.asarray(weights, float), factor, lower_is_better)


def bootstrap(
    difference: np.ndarray, weights: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """95 % interval of sum(difference) / sum(weights), both (n): percentiles of resampled documents.

    Efron 1979, Ann. Statist. 7, p. 1.
    """
    rng, n = np.random.default_rng(seed), len(difference)
    ratios = [
        difference[draw].sum(1) / weights[draw].sum(1)
        for size in _chunks(resamples, n)
        for draw in [rng.integers(0, n, (size, n))]
    ]
    low, high = np.quantile(np.concatenate(ratios), [0.025, 0.975])
    return float(low), float(high)


def swap_test(difference: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of sum(difference) (n) if in each document the two runs could as well have changed places.

    A paired randomisation test (Fisher 1935); the observed labelling counts as one, so that p is never 0.
    """
    rng, n = np.random.default_rng(seed), len(difference)
    observed = abs(float(difference.sum()))
    # Sums in another order differ in their last bits: what ties must count as a tie.
    slack = 1e-12 * float(np.abs(difference).sum())
    extreme = sum(
        int((np.abs(rng.choice((-1.0, 1.0), (size, n)) @ difference) >= observed - slack).sum())
        for size in _chunks(resamples, n)
    )
    return (1 + extreme) / (1 + resamples)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p from the questions that only one of two runs gets right.

    McNemar 1947, Psychometrika 12, p. 153; in the binomial form.
    """
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the same order. Holm 1979, Scand. J. Statist. 6, p. 65."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = highest
    return corrected


def _chunks(resamples: int, n: int) -> Iterator[int]:
    size = max(1, DRAWS // n)
    for done in range(0, resamples, size):
        yield min(size, resamples - done)


def _row(
    key: tuple[str, str],
    baseline: tuple[str, Outcomes],
    other: tuple[str, Outcomes],
    resamples: int,
    seed: int,
) -> Row:
    (name_a, a), (name_b, b) = baseline, other
    a, b = _paired(key[0], name_a, a, name_b, b)
    difference, n = b.values - a.values, len(a.values)
    low = high = p = None
    test = TOO_FEW
    if n >= MIN_PAIRS:
        if a.binary and b.binary:
            p, test = mcnemar(int((difference < 0).sum()), int((difference > 0).sum())), "McNemar"
        else:
            p, test = swap_test(difference, resamples=resamples, seed=seed), "label swaps"
        low, high = (a.factor * x for x in bootstrap(difference, a.weights, resamples=resamples, seed=seed))
    delta = b.score - a.score
    better = name_b if (delta < 0) == a.lower_is_better else name_a
    return Row(*key, name_a, name_b, a.score, b.score, delta, low, high, p, None, n, test, better)


def _paired(task: str, name_a: str, a: Outcomes, name_b: str, b: Outcomes) -> tuple[Outcomes, Outcomes]:
    """Both in the order of the hashes. ValueError if they are not of the same documents."""
    if sorted(a.hashes) != sorted(b.hashes):
        missing = len(set(a.hashes) ^ set(b.hashes))
        raise ValueError(
            f"{task}: {name_a} and {name_b} were not tested on the same data: {missing} of "
            f"{len(a.hashes)} and {len(b.hashes)} documents are in one only; evaluate both with the same "
            "data, limit and seed"
        )
    a, b = _sorted(a), _sorted(b)
    if not np.array_equal(a.weights, b.weights):
        raise ValueError(
            f"{task}: {name_a} and {name_b} weigh the same documents differently; evaluate both again"
        )
    return a, b


def _sorted(x: Outcomes) -> Outcomes:
    order = np.argsort(np.asarray(x.hashes), kind="stable")
    return x._replace(hashes=[x.hashes[i] for i in order], values=x.values[order], weights=x.weights[order])


def corrected(rows: Sequence[Row]) -> list[Row]:
    """The rows with Holm's p, and no winner where it is not below 0.05."""
    tested = [row.p for row in rows if row.p is not None]
    corrected = iter(holm(tested))
    done = []
    for row in rows:
        p = None if row.p is None else next(corrected)
        better = row.better if p is not None and p < 0.05 else "-"
        done.append(Row(**{**asdict(row), "p_holm": p, "better": better}))
    return done


def to_json(rows: Sequence[Row]) -> str:
    """A JSON list of objects."""
    return json.dumps(finite([asdict(row) for row in rows]), indent=1) + "\n"


def to_csv(rows: Sequence[Row]) -> str:
    """A header and one line per row."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for people."""
    return markdown([HEADER, *(cells(row) for row in rows)])


HEADER = [
    "task",
    "metric",
    "baseline",
    "run",
    "difference",
    "95 % interval",
    "p",
    "p (Holm)",
    "n",
    "test",
    "better",
]


def cells(row: Row) -> list[str]:
    """One row as text, under `HEADER`."""
    interval = "-" if row.low is None or row.high is None else f"{row.low:+.4f} .. {row.high:+.4f}"
    p, p_holm = ("-" if x is None else f"{x:.2g}" for x in (row.p, row.p_holm))
    a, b = f"{row.baseline} {row.baseline_score:.4f}", f"{row.other} {row.other_score:.4f}"
    return [
        *(
            row.task,
            row.metric,
            a,
            b,
            f"{row.difference:+.4f}",
            interval,
            p,
            p_holm,
            str(row.n),
            row.test,
            row.better,
        )
    ]


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first line is its header."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    header, *body = (f"| {' | '.join(line)} |" for line in escaped)
    return "\n".join([header, f"|{' --- |' * len(lines[0])}", *body]) + "\n"
