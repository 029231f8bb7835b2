"""What the README says of speed is what the files of evals/results/cpu say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evals" / "results" / "cpu"

SCAN = "selective scan, forward + backward"
SHORT, LONGER = f"{SCAN}, 256 tokens", f"{SCAN}, 512 tokens"
SSD, CONV = "SSD, forward + backward", "convolution + silu, both ways"
STEP, BF16 = "training step, Mamba-1", "training step, bf16 autocast"
MAMBA, MAMBA2 = "decoding a token, Mamba-1", "decoding a token, Mamba-2"
TRAIN = "training step, batch 4"
CLAIMS = [
    (SCAN, "transformers, `use_mambapy`", "ops", "scan", 1024, "native", "transformers_mambapy"),
    (SCAN, "transformers, compiled", "ops", "scan", 1024, "native", "compile_transformers"),
    (SHORT, "transformers, default", "quadratic", "scan", 256, "native", "transformers"),
    (LONGER, "transformers, default", "quadratic", "scan", 512, "native", "transformers"),
    (SSD, "transformers, chunk 64", "ops", "ssd", 1024, "native", "transformers_chunk64"),
    (SSD, "transformers, default", "ops", "ssd", 1024, "native", "transformers_chunk256"),
    (SSD, "listing 1, compiled", "ops", "ssd", 1024, "native", "compile_listing_1"),
    (CONV, "`F.conv1d`", "ops", "conv", 1024, "native", "transformers"),
    (STEP, "transformers, `use_mambapy`", "train", TRAIN, 512, "native", "transformers_mambapy"),
    (STEP, "Llama of equal size", "llama", TRAIN, 512, "native", "llama"),
    (BF16, "`use_mambapy`, fp32", "train", TRAIN, 512, "native_bf16", "transformers_mambapy"),
    (MAMBA, "transformers", "generate", "decode, mamba", 16, "native", "transformers"),
    (MAMBA2, "transformers", "generate", "decode, mamba2", 16, "native", "transformers"),
]  # fmt: skip


def case_of(file: str, op: str, tokens: int) -> dict[str, Any]:
    """The one measurement of a file that is meant."""
    document = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
    (found,) = (case for case in document["cases"] if (case["op"], case["tokens"]) == (op, tokens))
    return found


def rows() -> Iterator[str]:
    """The lines of the README's table."""
    for what, peer, file, op, tokens, ours, theirs in CLAIMS:
        times = case_of(file, op, tokens)["candidates"][ours]["over"][theirs]
        yield f"| {what} | {peer} | {times:,.{0 if times >= 10 else 1}f}x |"


@pytest.mark.parametrize("row", list(rows()))
def test_the_readme_quotes_the_measurement(row: str) -> None:
    assert row in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()


def test_nothing_is_quoted_of_a_candidate_that_was_not_checked() -> None:
    for what, _, file, op, tokens, ours, theirs in CLAIMS:
        candidates = case_of(file, op, tokens)["candidates"]
        assert candidates[ours]["status"] == candidates[theirs]["status"] == "ok", what
