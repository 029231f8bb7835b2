"""What is timed is right, in turn, and told with what it was compared with."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_lm.bench import cases, measure
from hybrid_lm.bench.cases import CASES, gradients
from hybrid_lm.bench.measure import LIMIT, Candidate, add_ratios, choose, compare, relative_errors
from hybrid_lm.bench.ops import bench_ops
from hybrid_lm.bench.peers import listing_1

LENGTH = 8


class BadBackward(torch.autograd.Function):
    """The identity whose gradient is off by a part in a thousand."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.001


WRONG = {
    "y": lambda y: y * 1.001,
    "d_y": lambda y: BadBackward.apply(y),
    "nan": lambda y: y * math.nan,
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_candidate_is_told_and_not_timed(how, monkeypatch):
    case = CASES["gated_rms_norm"]
    wrong = Candidate("wrong", lambda: lambda v: WRONG[how](case.ours(v, "torch")))
    changed = cases.Case(case.name, case.op, case.make, case.ours, (wrong,))
    monkeypatch.setitem(CASES, case.name, changed)
    found = bench_ops(ops=[case.name], lengths=[LENGTH], repeat=1, memory=False)["cases"][0]["candidates"]
    assert found["torch"]["status"] == "ok"
    assert "fwd_bwd_ms" in found["torch"]
    assert found["wrong"]["status"] == "wrong"
    assert "fwd_bwd_ms" not in found["wrong"]
    assert not found["wrong"]["worst_error"] <= LIMIT
    assert "differs from float64" in found["wrong"]["note"]
    # Where only the gradient is wrong, that is what is named.
    assert found["wrong"]["worst_of"].startswith("d_" if how == "d_y" else ("y", "d_"))


@pytest.mark.parametrize("name", sorted(CASES))
def test_every_candidate_computes_the_same(name):
    found = bench_ops(ops=[name], lengths=[LENGTH], repeat=1, compiled=False, memory=False)
    (case,) = found["cases"]
    for candidate, row in case["candidates"].items():
        assert row["status"] in ("ok", "absent"), (candidate, row)
        if row["status"] == "ok":
            assert {"y"} | {f"d_{key}" for key in case["shapes"]} == set(row["errors"])
            # Sums of at most 2**9 rounded terms (n 128 and 8 tokens for y; 16 rows and 24 heads for d_B).
            assert row["worst_error"] <= 2**9 * torch.finfo(torch.float32).eps, candidate


def test_the_minimal_method_fills_up_a_chunk_and_shares_groups():
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(2, 11, 4, 3),
        "dt": torch.randn(2, 11, 4),
        "A": -torch.rand(4),
        "B": torch.randn(2, 11, 2, 5),
        "C": torch.randn(2, 11, 2, 5),
        "D": torch.randn(4),
        "dt_bias": torch.randn(4),
    }
    inputs = {key: v.double().requires_grad_() for key, v in inputs.items()}
    dy = torch.randn(2, 11, 4, 3, dtype=torch.float64)
    found = gradients(lambda v: listing_1(v, chunk=4), inputs, dy)
    errors = relative_errors(found, gradients(lambda v: CASES["ssd"].ours(v, "reference"), inputs, dy))
    # Sums of at most 2**7 rounded terms: 11 tokens, 12 rows of heads.
    assert max(errors.values()) <= 2**7 * torch.finfo(torch.float64).eps


def test_candidates_take_turns_after_a_warm_up():
    calls: list[str] = []

    def run(name):
        calls.append(name)
        return {"time_ms": [float(len(calls))]}

    slow = Candidate("slow", lambda: "slow", rounds=1)
    candidates = [Candidate("a", lambda: "a", ours=True), Candidate("b", lambda: "b"), slow]
    rows = compare(candidates, check=lambda name: {"y": 0.0}, run=run, repeat=2)
    assert calls == ["a", "b", "a", "b", "slow", "a", "b"]
    assert rows["a"]["time_ms"] == {"median": 4.5, "min": 3.0, "max": 6.0, "n": 2}
    assert rows["slow"]["time_ms"] == {"median": 5.0, "min": 5.0, "max": 5.0, "n": 1}
    assert add_ratios(rows, "time_ms") == "a"
    assert rows["b"]["ratio"] == {"time_ms": 5.5 / 4.5}
    assert rows["a"]["over"] == {"b": 5.5 / 4.5, "slow": 5.0 / 4.5}
    assert "over" not in rows["b"]


def test_a_peer_that_cannot_run_is_told_and_ours_is_an_error():
    def broken():
        raise RuntimeError("no compiler\nand a long story")

    rows = compare([Candidate("peer", broken)], check=dict, run=dict, repeat=1)
    assert rows["peer"]["status"] == "failed"
    assert rows["peer"]["note"] == "RuntimeError: no compiler"
    with pytest.raises(RuntimeError):
        compare([Candidate("torch", broken, ours=True)], check=dict, run=dict, repeat=1)


def test_an_absent_peer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    found = bench_ops(ops=["conv"], lengths=[LENGTH], repeat=1, compiled=False, memory=False)
    row = found["cases"][0]["candidates"]["transformers"]
    assert row["status"] == "absent"
    assert row["note"] == "needs transformers: pip install 'hybrid_lm[bench]'"
    assert found["cases"][0]["candidates"]["shifted_adds"]["status"] == "ok"


def test_the_quadratic_peer_is_left_out_of_long_sequences():
    slow = next(c for c in CASES["scan"].candidates() if c.name == "transformers")
    rows = compare([slow], check=dict, run=dict, repeat=1, length=1024)
    assert rows["transformers"]["status"] == "left out"
    assert rows["transformers"]["note"] == "too slow beyond 512 tokens"


def test_an_unknown_name_says_which_there_are():
    with pytest.raises(ValueError, match=r"listing_1"):
        bench_ops(ops=["ssd"], only=["listing1"])
    with pytest.raises(ValueError, match="narrow_scan"):
        bench_ops(ops=["scans"])
    with pytest.raises(ValueError, match="nothing to measure"):
        bench_ops(ops=["ssd"], only=["compile_listing_1"], compiled=False)
    assert choose("op", None, ["b", "a", "b"]) == ["b", "a"]


def test_backends_that_exist_are_found_by_themselves(monkeypatch):
    row = measure.report("cpu")[0]
    rows = [
        row._replace(op="ssd", backend="reference", chosen=False, why_not=None),
        row._replace(op="ssd", backend="torch", chosen=False, why_not=None),
        row._replace(op="ssd", backend="native", chosen=True, why_not=None),
        row._replace(op="ssd", backend="fla", chosen=False, why_not="CUDA only"),
    ]
    monkeypatch.setattr(measure, "report", lambda device: rows)
    assert measure.backends("ssd") == ["native", "torch"]
