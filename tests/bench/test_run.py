"""`hybrid-lm bench` from end to end at a few tokens."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from hybrid_lm.bench import generate, memory, train
from hybrid_lm.bench.cases import CASES
from hybrid_lm.bench.models import ours
from hybrid_lm.cli import main


def bench(out, *words) -> dict:
    assert main(["bench", *words, "--repeat", "2", "--out", str(out)]) == 0
    return json.loads(out.read_text(encoding="utf-8"))


def times(row, key) -> None:
    assert row["status"] == "ok"
    assert 0 < row[key]["min"] <= row[key]["median"] <= row[key]["max"]


def test_ops(tmp_path, capsys):
    words = ("ops", "--op", "scan", "--op", "attention", "--length", "8,16", "--no-compile", "--no-memory")
    found = bench(tmp_path / "new" / "ops.json", *words, "--only", "torch,transformers_mambapy,sdpa")
    assert found["clock"] == "process CPU time"
    assert found["machine"]["threads"] == 1
    assert found["machine"]["versions"]["torch"]
    assert [(case["op"], case["tokens"]) for case in found["cases"]] == [
        ("scan", 8),
        ("scan", 16),
        ("attention", 8),
        ("attention", 16),
    ]
    scan = found["cases"][0]
    assert scan["shapes"]["x"] == [2, 8, 1536]
    assert set(scan["yardsticks"]) == {"matmul_gflop_s", "copy_gb_s"}
    ours = scan["candidates"][scan["base"]]
    for key in ("fwd_ms", "fwd_bwd_ms"):
        times(ours, key)
    assert ours["ratio"] == {"fwd_ms": 1.0, "fwd_bwd_ms": 1.0}
    assert ours["fwd_share_of_matmul"] > 0
    printed = capsys.readouterr().out
    assert "scan, 16 tokens: 1 thread, process CPU time, medians of 2" in printed
    assert "% of a matrix product's rate" in printed
    figure = (tmp_path / "new" / "ops-scan-time.svg").read_text(encoding="utf-8")
    for line in ("ours, torch", "transformers_mambapy", "attention: ours, torch", "attention: sdpa"):
        assert f"<!-- {line} -->" in figure
    assert str(tmp_path / "new" / "ops-scan-time.svg") in printed
    assert not (tmp_path / "new" / "ops-scan-memory.svg").exists()


def test_ours_being_wrong_is_a_failure(monkeypatch, capsys):
    right = CASES["conv"].ours
    case = dataclasses.replace(CASES["conv"], ours=lambda v, backend: off_in_float32(right(v, backend)))
    monkeypatch.setitem(CASES, "conv", case)
    words = [
        "bench",
        "ops",
        "--op",
        "conv",
        "--length",
        "8",
        "--only",
        "torch",
        "--no-memory",
        "--repeat",
        "1",
    ]
    assert main(words) == 1
    assert "torch: wrong: " in capsys.readouterr().out


def off_in_float32(y):
    return y if y.dtype.itemsize == 8 else 1.01 * y


@pytest.mark.compile
def test_a_compiled_peer_is_checked_and_timed(tmp_path):
    found = bench(
        tmp_path / "ops.json",
        "--op",
        "conv",
        "--length",
        "8",
        "--only",
        "compile_shifted_adds",
        "--no-memory",
    )
    times(found["cases"][0]["candidates"]["compile_shifted_adds"], "fwd_bwd_ms")
    assert found["cases"][0]["base"] is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_fresh_process():
    grown, note = memory.peak_mb("gated_rms_norm", "torch", 512, 1)
    assert note is None
    # The output and three gradients are there at the same time, the weight's a vector.
    assert grown is not None
    assert grown * 1024**2 >= 3 * CASES["gated_rms_norm"].inputs(512)["y"].nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_dies_costs_only_its_memory(monkeypatch):
    monkeypatch.setattr(sys, "executable", "false")
    assert memory.peak_mb("conv", "torch", 8, 1) == (None, "memory: the process ended with 1")


@pytest.fixture
def small(monkeypatch):
    """Two layers in the place of twelve."""
    monkeypatch.setattr(train, "N_LAYERS", 2)
    monkeypatch.setattr(train, "LLAMA_LAYERS", 1)
    sizes = {"d_model": train.D_MODEL, "vocab_size": train.VOCAB, "options": {"d_state": 16}}
    monkeypatch.setattr(train, "CONFIG", ours("mamba", n_layers=2, **sizes))


@pytest.mark.usefixtures("small")
def test_train(tmp_path, capsys):
    found = bench(tmp_path / "train.json", "train", "--length", "8")
    (case,) = found["cases"]
    rows = case["candidates"]
    assert {"torch", "torch_bf16", "llama", "llama_bf16", "transformers_mambapy"} <= set(rows)
    for row in rows.values():
        if row["status"] != "absent":
            times(row, "step_s")
            assert set(row["errors"]) == {"logits", "d_embedding"}
            assert row["tokens_per_s"] == pytest.approx(4 * 8 / row["step_s"]["median"])
    sizes = case["parameters"].values()
    assert max(sizes) <= 1.02 * min(sizes)
    assert "parameters: HybridLM" in capsys.readouterr().out


def test_generate(tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "N_LAYERS", 1)
    sizes = {"d_model": generate.D_MODEL, "n_layers": 1, "vocab_size": generate.VOCAB}
    small = {kind: ours(kind, options=options, **sizes) for kind, options in generate.OPTIONS.items()}
    monkeypatch.setattr(generate, "CONFIGS", small)
    found = bench(tmp_path / "generate.json", "generate", "--length", "3")
    assert [case["op"] for case in found["cases"]] == ["decode, mamba", "decode, mamba2"]
    for case in found["cases"]:
        assert {"torch", "transformers"} <= set(case["candidates"])
        for row in case["candidates"].values():
            if row["status"] != "absent":
                times(row, "token_layer_ms")
                # Two rounds of three tokens, the first of each round aside.
                assert row["token_layer_ms"]["n"] == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--op", "scan"], "--op is for bench ops"),
        (["ops", "--out", "table.txt"], "must end in .json"),
        (["ops", "--op", "skan"], "did you mean 'scan'"),
        (["generate", "--only", "mambapy"], "transformers"),
    ],
)
def test_a_mistake_is_one_clear_message(words, message, capsys):
    assert main(["bench", *words]) == 2
    error = capsys.readouterr().err
    assert message in error.replace("Did", "did")
    assert len(error.splitlines()) == 1


def test_threads_above_one_are_timed_by_the_wall_beside_one(tmp_path, capsys):
    found = bench(
        tmp_path / "ops.json",
        "--op",
        "conv",
        "--length",
        "8",
        "--only",
        "torch",
        "--threads",
        "2",
        "--no-memory",
    )
    assert found["clock"] == "wall time"
    row = found["cases"][0]["candidates"]["torch"]
    assert row["threads_speedup"] == row["one_thread_ms"]["median"] / row["fwd_bwd_ms"]["median"]
    assert {"matmul_speedup", "copy_speedup"} <= set(found["cases"][0]["yardsticks"])
    assert "x as fast as on one thread (a matrix product" in capsys.readouterr().out
