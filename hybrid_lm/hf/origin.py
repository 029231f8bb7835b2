"""What an imported run keeps of the checkpoint that it came from, and gives to its exports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hybrid_lm.config.schema import RunConfig, TextData
from hybrid_lm.files import replace_text
from hybrid_lm.hf.importing import local_folder
from hybrid_lm.hf.options import ConversionError

FOLDER = "hf"
"""In the run's folder: config.json and generation_config.json as they came, and what the import measured."""
CONFIG, GENERATION, RECORD = "config.json", "generation_config.json", "hybrid_lm_import.json"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Origin(NamedTuple):
    """Where an imported run came from."""

    dtype: str | None
    """Of its weights: bfloat16, ..."""
    ids: dict[str, Any]
    """The ids of the specials that its configuration named."""
    generation: str | None
    """Its generation_config.json."""


def origin(run: Any) -> Origin | None:
    """What an imported run (or the run in a folder) keeps of its origin; None for any other run."""
    path = run if isinstance(run, Path) else getattr(run, "path", None)
    folder = None if path is None else Path(path) / FOLDER
    if folder is None or not (folder / CONFIG).is_file():
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    dtype = config.get("dtype") or config.get("torch_dtype")
    ids = {key: config[key] for key in IDS if key in config}
    generation = folder / GENERATION
    return Origin(dtype, ids, generation.read_text(encoding="utf-8") if generation.is_file() else None)


def keep_origin(place: str, run_dir: Path, checks: Sequence[dict[str, Any]]) -> None:
    """Copies into a run's folder what `origin` reads there, with what the import measured."""
    source, folder = local_folder(place), run_dir / FOLDER
    folder.mkdir()
    for name in (CONFIG, GENERATION):
        if (source / name).is_file():
            replace_text(folder / name, (source / name).read_text(encoding="utf-8"))
    replace_text(folder / RECORD, json.dumps({"from": place, "checks": list(checks)}, indent=1) + "\n")


def check_tokenizer(place: str, config: RunConfig) -> None:
    """Raises ConversionError if the run is to use the checkpoint's tokenizer and it has none."""
    data = config.data
    if not isinstance(data, TextData) or data.tokenizer.path != place:
        return
    folder = local_folder(place)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ConversionError(
            f"{place}: no tokenizer; a run needs one for its data: say data.tokenizer.path=FOLDER, or "
            "data.tokenizer='{kind: bytes}'"
        )
