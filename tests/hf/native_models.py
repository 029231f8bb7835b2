"""Tiny native models for these tests: for each family, configurations that together set every field off its
default (`configs/`), and weights that are all off their start."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

TABLES = {
    path.stem: runpy.run_path(str(path)) for path in sorted((Path(__file__).parent / "configs").glob("*.py"))
}
CONFIGS: dict[str, list[dict[str, Any]]] = {name: table["CONFIGS"] for name, table in TABLES.items()}
REWORDED: dict[str, tuple[str, ...]] = {name: table.get("REWORDED", ()) for name, table in TABLES.items()}
"""Fields that go out in other words than they came in."""


@torch.no_grad()
def native(name: str, options: dict[str, Any], seed: int = 0) -> Any:
    """A model of a family with every parameter moved: norms of one and biases of zero hide mistakes."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **options)).eval()
    # What is saved and no parameter: the correction of a router's scores.
    saved = [buffer for name, buffer in model.named_buffers() if name in model.state_dict()]
    for x in (*model.parameters(), *(buffer for buffer in saved if buffer.is_floating_point())):
        flat = x.dim() < 2 or 1 in x.shape
        scale = 0.1 if flat else 0.25 * float(x.std())
        x.add_(torch.randn_like(x), alpha=scale)
    return model
