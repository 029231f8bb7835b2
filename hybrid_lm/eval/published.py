"""The data folder `evals/`: lm-eval task templates, and numbers that others have published."""

from __future__ import annotations

import csv
from pathlib import Path


def evals_dir() -> Path:
    """`evals/`: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "evals"
    return inside if inside.is_dir() else package.parent / "evals"


def published(name: str) -> list[dict[str, str]]:
    """The rows of `evals/published/<name>.csv`; its source stands in the comments at its top."""
    lines = (evals_dir() / "published" / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))
