"""Paired statistics against values worked out by hand or by counting all cases, and refusals."""

import csv
import io
import itertools
import json
import math

import numpy as np
import pytest

from hybrid_lm.eval.compare import (
    bootstrap,
    compare,
    holm,
    mcnemar,
    swap_test,
    to_csv,
    to_json,
    to_markdown,
)


def text(nll, n_bytes=100, prefix="d"):
    documents = [[f"{prefix}{i}", x, n_bytes, n_bytes] for i, x in enumerate(nll)]
    return {"text": {"documents": documents}}


def probe(correct, scored=4, data_hash="h"):
    row = {
        "probe": "mqar",
        "setting": {"n_pairs": 4},
        "data_hash": data_hash,
        "n_sequences": len(correct),
        "correct": correct,
        "scored": [scored] * len(correct),
    }
    return {"probe": [row]}


def harness(answers, task="cloze"):
    samples = [{"hash": f"q{i}", "metrics": {"acc": x}} for i, x in enumerate(answers)]
    return {"harness": {"samples": {task: samples}}}


def test_mcnemar_is_the_binomial_test():
    assert mcnemar(0, 0) == 1.0
    # Two-sided, 1 of 10: 2 (C(10,0) + C(10,1)) / 2^10 = 22 / 1024.
    assert mcnemar(1, 9) == mcnemar(9, 1) == 22 / 1024
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(0, 1000) == 2.0**-999


def test_holm_on_a_worked_example():
    # Sorted .01 .02 .03 .5 times 4 3 2 1, then never smaller than the one before.
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_swaps_approach_the_exact_randomisation_test():
    difference = np.array([0.3, -0.1, 0.4, 0.2, 0.5, -0.05, 0.1, 0.6])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    exact = (np.abs(signs @ difference) >= difference.sum() - 1e-12).mean()
    # Four standard deviations of a share of 20,000 draws.
    bound = 4 * math.sqrt(exact * (1 - exact) / 20_000)
    assert abs(swap_test(difference, resamples=20_000) - exact) < bound
    assert swap_test(np.zeros(5), resamples=100) == 1.0
    assert swap_test(difference, resamples=500, seed=3) == swap_test(difference, resamples=500, seed=3)


def test_bootstrap_approaches_the_normal_interval():
    rng = np.random.default_rng(0)
    difference, n = rng.normal(0.2, 1.0, 400), 400
    low, high = bootstrap(difference, np.ones(n))
    mean, error = difference.mean(), 1.96 * difference.std() / math.sqrt(n)
    # A percentile of 10,000 draws is off by about 1.5 % of the width; 5 % is over three of those.
    assert low == pytest.approx(mean - error, abs=0.1 * error)
    assert high == pytest.approx(mean + error, abs=0.1 * error)


def test_long_documents_count_by_their_bytes():
    a = {"text": {"documents": [["x", 10.0, 5, 10], ["y", 900.0, 5, 1000]]}}
    b = {"text": {"documents": [["y", 600.0, 5, 1000], ["x", 20.0, 5, 10]]}}
    (row,) = compare({"a": a, "b": b})
    assert row.baseline_score == pytest.approx(910 / 1010 / math.log(2))
    assert row.difference == pytest.approx(-290 / 1010 / math.log(2))
    # Resampling draws x twice, y twice, or both.
    interval = bootstrap(np.array([10.0, -300.0]), np.array([10.0, 1000.0]), resamples=100)
    assert interval == pytest.approx((-0.3, 1.0))


def test_a_small_steady_gain_that_unpaired_errors_hide_is_found():
    rng = np.random.default_rng(0)
    hard = rng.normal(150, 40, 60)
    rows = compare({"base": text(hard), "new": text(hard - rng.normal(1.0, 0.5, 60))}, resamples=2000)
    assert rows[0].better == "new"
    assert rows[0].high < 0
    # The scores' own spread, 40 nats of 60 documents, is far larger than the gain of one nat.
    assert 40 / math.sqrt(60) > 5
    assert compare({"base": text(hard), "new": text(hard)}, resamples=200)[0].better == "-"


def test_binary_questions_use_mcnemar_and_partial_scores_do_not():
    a, b = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    (row,) = compare({"a": harness(a), "b": harness(b)}, resamples=100)
    assert (row.test, row.p, row.better) == ("McNemar", 22 / 1024, "b")
    (row,) = compare({"a": probe([0, 1, 2, 3, 0, 0]), "b": probe([4] * 6)}, resamples=100)
    assert row.test == "label swaps"
    assert (row.baseline_score, row.other_score) == (6 / 24, 1.0)


def test_all_rows_are_corrected_together():
    a = {**text([9.0] * 12), **harness([0] * 12)}
    b = {**text([8.0] * 12), **harness([1] * 12)}
    rows = compare({"a": a, "b": b, "c": a}, resamples=200)
    assert [row.other for row in rows] == ["b", "b", "c", "c"]
    assert [row.p_holm for row in rows] == pytest.approx(holm([row.p for row in rows]))
    assert compare({"a": a, "b": b}, baseline="b", resamples=100)[0].other == "a"


@pytest.mark.parametrize("runs", [(text([9.0] * 5), text([3.0] * 5)), (harness([0] * 5), harness([1] * 5))])
def test_five_documents_that_all_agree_give_a_difference_and_no_verdict(runs):
    (row,) = compare(dict(zip("ab", runs, strict=True)))
    assert row.difference != 0
    assert (row.low, row.high, row.p, row.p_holm, row.better) == (None, None, None, None, "-")
    assert "| - | - | - | 5 | too few to tell | - |" in to_markdown([row])
    # One more could be told: 2 / 2^6 = 0.031, here by all signs in place of some.
    assert swap_test(np.ones(6), resamples=20_000) < 0.05


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at least two runs"):
        compare({"a": text([1.0])})
    with pytest.raises(ValueError, match="baseline 'z' is none of the runs: a, b"):
        compare({"a": text([1.0]), "b": text([1.0])}, baseline="z")
    with pytest.raises(ValueError, match=r"no task in common.*a: held-out text bits per byte; b: mqar"):
        compare({"a": text([1.0]), "b": probe([1])})
    with pytest.raises(ValueError, match="not tested on the same data: 4 of 2 and 2"):
        compare({"a": text([1.0, 2.0]), "b": text([1.0, 2.0], prefix="other")})
    with pytest.raises(ValueError, match="weigh the same documents differently"):
        compare({"a": text([1.0, 2.0]), "b": text([1.0, 2.0], n_bytes=7)})
    with pytest.raises(ValueError, match="mqar n_pairs=4: a and b were not tested on the same data"):
        compare({"a": probe([1, 2]), "b": probe([1, 2], data_hash="g")})


def test_three_forms_of_one_table():
    rows = compare({"a": text([9.0, 8.0] * 3), "b|c": text([8.0, 8.5] * 3)}, resamples=100)
    assert json.loads(to_json(rows))[0]["difference"] == rows[0].difference
    (line,) = csv.DictReader(io.StringIO(to_csv(rows)))
    assert float(line["low"]) == rows[0].low
    header, rule, body = to_markdown(rows).splitlines()
    assert header.count("|") == rule.count("|") == body.replace("\\|", "").count("|") == 12
