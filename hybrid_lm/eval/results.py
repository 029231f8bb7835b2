"""What evaluation leaves in a run's folder: `results.json`, one section per sort of result."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hybrid_lm.files import finite, replace_text

FILE = "results.json"


def read_results(run_dir: str | Path) -> dict[str, Any]:
    """The sections of a run's results, empty if it has none yet. ValueError names a damaged file."""
    path = Path(run_dir) / FILE
    if not path.exists():
        return {}
    return _object(path, path.read_text(encoding="utf-8"))


def write_results(run_dir: str | Path, **sections: Any) -> Path:
    """Puts sections into a run's results, beside the others; the file is replaced whole or not at all."""
    path = Path(run_dir) / FILE
    replace_text(path, json.dumps(finite({**read_results(run_dir), **sections}), indent=1) + "\n")
    return path


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes a JSONL file, one line per row, in the place of the old one."""
    replace_text(Path(path), "".join(json.dumps(finite(row)) + "\n" for row in rows))


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file, none if there is no file."""
    path = Path(path)
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [_object(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]


def _object(where: str | Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: damaged: {error}; delete it and evaluate again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where}: not a JSON object; delete it and evaluate again")
    return value
