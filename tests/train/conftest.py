"""A tiny text, tiny runs, and silence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from hybrid_lm.config.load import parse_config
from hybrid_lm.config.schema import RunConfig

LAYERS = {
    "m": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8},
    "a": {"type": "attention", "n_heads": 2},
    "f": {"type": "mlp", "d_ff": 32},
}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of six documents of about 1.5 kB."""
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(6):
        lines = [f"document {i} line {j}: {j * j} is the square of {j}\n" for j in range(40)]
        (folder / f"{i}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def make_config(text: Path) -> Callable[..., RunConfig]:
    """A configuration of 10 steps on the tiny text, changed by overrides: `make_config("train.steps=3")`."""

    def make(*overrides: str, pattern: str = "m f") -> RunConfig:
        layers = {name: LAYERS[name] for name in LAYERS if name in pattern}
        data = {
            "model": {"d_model": 16, "pattern": pattern, "layers": layers},
            "data": {"kind": "text", "path": str(text), "seq_len": 16},
            "train": {"steps": 10, "batch_size": 2, "log_every_steps": 1, "eval_batches": 2, "device": "cpu"},
        }
        return parse_config(data, "test", overrides)

    return make


@pytest.fixture
def make_probe() -> Callable[..., RunConfig]:
    """A configuration of 4 steps on MQAR, changed by overrides."""

    def make(*overrides: str) -> RunConfig:
        data = {
            "model": {"d_model": 16, "pattern": "a", "layers": {"a": LAYERS["a"]}},
            "data": {
                "kind": "probe",
                "probe": "mqar",
                "preset": "ci",
                "params": {"vocab_size": 64},
                "train_params": {"n_pairs": [1, 2, 4]},
                "test_params": {"n_pairs": [2, 4], "seq_len": [16, 32]},
                "n_test": 5,
            },
            "train": {"steps": 4, "batch_size": 4, "log_every_steps": 2, "device": "cpu"},
        }
        return parse_config(data, "test", overrides)

    return make


@pytest.fixture
def quiet() -> Console:
    return Console(quiet=True)
