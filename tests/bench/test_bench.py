"""The benchmark's peers compute the same thing, and its measurements measure."""

import subprocess
import sys

import pytest
import torch

from hybrid_lm import bench


def test_peers_agree_with_ours() -> None:
    # the largest difference over the largest value, of sums of at most 2**8 rounded terms
    differences = bench._agreement("ssd", bench._inputs("ssd", 16))
    assert set(differences) == {"ours", "transformers_chunk64", "transformers_chunk256"}
    assert max(differences.values()) <= 2**8 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("case", ["ssd", "scan"])
def test_time_is_measured(case: str) -> None:
    forward, both = bench._forward_backward(bench.CASES[case][1]["ours"], bench._inputs(case, 48))
    assert 0 < forward < both


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_measured_in_a_fresh_process() -> None:
    command = [sys.executable, "-m", "hybrid_lm.bench", "ssd", "--memory-of", "ours", "--length", "256"]
    grown = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    # the output and the gradient of x alone take this much
    assert grown * 1024**2 >= 2 * bench._inputs("ssd", 256)["x"].nbytes


def test_a_missing_peer_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install mambapy"):
        bench._mambapy_scan(bench._inputs("scan", 2))
