"""What the configuration files of a checkpoint say, without its weights."""

from __future__ import annotations

from typing import Any

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.data.optional import need
from hybrid_lm.hf.importing import described, local_folder, reading
from hybrid_lm.hf.origin import TOKENIZERS


def of_checkpoint(place: str) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The architecture in a folder or under a hub name, and its tokenizer as `data.tokenizer` says it (None:
    it has none).

    Raises ConversionError for what does not load and for architectures that are not read, and MissingPackage
    without transformers; both are ValueErrors.
    """
    need("transformers", "reading a Hugging Face model")
    from transformers import AutoConfig

    from hybrid_lm.hf.wrapper import from_json_safe

    folder = local_folder(place)
    with reading(place):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    has_one = any((folder / name).is_file() for name in TOKENIZERS)
    tokenizer = {"kind": "huggingface", "path": place} if has_one else None
    if config.model_type == "hybrid_lm":
        return ModelConfig.model_validate(from_json_safe(config.architecture)), tokenizer
    family, fields = described(config, place)
    return family.read(fields), tokenizer
