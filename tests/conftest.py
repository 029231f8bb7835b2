"""What all tests share: one thread, a fixed seed, and no network."""

from __future__ import annotations

import os

# Before any import of a hub library: a test that would download fails at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def hybrid_config():
    """A small model with every way of putting layers together: repeated, parallel, shared, injected."""
    from hybrid_lm.config.schema import ModelConfig

    layers = {
        "m": {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8},
        "n": {"type": "mamba", "d_state": 4},
        "a": {"type": "attention", "n_heads": 4, "n_kv_heads": 2, "rope": {}},
        "w": {"type": "attention", "n_heads": 4, "window": 6, "rope": {}},
        "f": {"type": "mlp", "d_ff": 48},
        "c": {"type": "short_conv"},
        "sa": {"type": "attention", "n_heads": 4, "head_dim": 16, "share": {"copies": 2}},
        "sf": {
            "type": "mlp",
            "d_ff": 40,
            "share": {"copies": 2},
            "per_call": {"lora": {"rank": 2, "on": ["gate_proj", "up_proj"]}, "out_proj": True},
        },
        "z": {"type": "inject", "block": "sa sf", "into": "m"},
    }
    return ModelConfig.model_validate(
        {"d_model": 32, "vocab_size": 61, "pattern": "m f a+n f w c z n z z", "layers": layers}
    )
