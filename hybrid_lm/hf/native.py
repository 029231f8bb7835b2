"""Out to a class of transformers: which one an architecture fits, and its folder in shards."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.fields import ConversionError
from hybrid_lm.hf.importing import INDEX, SINGLE
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.registry import unknown

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


OTHER_LAYERS = re.compile(r"not \w+: (layer \d+ (is|shares)|\d+ layers are) ")
"""How `family.describe` says that the layers are not those of a family."""


class Target(NamedTuple):
    """What an export becomes."""

    family: Family | None
    """None: remote code."""
    fields: dict[str, Any]
    """Of the family's configuration."""
    reasons: dict[str, str]
    """Family -> why it is not that."""


def choose(config: ModelConfig, format: str = "auto") -> Target:
    """The form that `format` asks for: auto (a native class if the architecture fits one, else remote code),
    native:NAME, or remote.

    Raises ConversionError for a native class that the architecture is not, with the first difference.
    """
    if format == "remote":
        return Target(None, {}, {})
    if format.startswith("native:"):
        name = format.partition(":")[2]
        if name not in FAMILIES:
            raise ConversionError(unknown("family", name, FAMILIES))
        return Target(FAMILIES[name], FAMILIES[name].write(config), {})
    if format != "auto":
        raise ConversionError(
            f"format {format!r}: say auto, remote, or native:NAME with {', '.join(FAMILIES)}"
        )
    reasons = {}
    for name in FAMILIES:
        try:
            return Target(FAMILIES[name], FAMILIES[name].write(config), reasons)
        except ConversionError as error:
            reasons[name] = str(error)
    return Target(None, {}, reasons)


def nearest_first(reasons: Mapping[str, str]) -> list[str]:
    """Why an architecture is none of the classes: those whose layers it has, the fewest differences first,
    and the others in one line."""
    other = [name for name, reason in reasons.items() if OTHER_LAYERS.match(reason)]
    near = sorted(
        (reason for name, reason in reasons.items() if name not in other), key=lambda r: r.count("; ")
    )
    return [*near, *([f"other layers than {', '.join(other)}"] if other else [])]


def tensors_of(family: Family, model: HybridLM) -> Iterator[tuple[str, Tensor]]:
    """Their keys and tensors, one after another; tensors that are only renamed are the model's own."""
    own = {entry.name: entry.parameter.detach() for entry in entries(model)}
    for entry in family.unrolled(model.config, list(own)):
        written = entry.how.write([own[name] for name in entry.ours], entry.options)
        yield from zip(entry.theirs, written, strict=True)


def native_config(family: Family, fields: dict[str, Any], model: HybridLM, **more: Any) -> Any:
    """The configuration object: the architecture's fields, and what else is given (token ids, lengths)."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(family.name, **{"use_cache": True, **more, **fields})
    config.architectures = [family.class_name]
    config.dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    return config


def native_model(family: Family, config: Any, model: HybridLM) -> Any:
    """The model as an object of the family's class, with weights of its own."""
    import transformers

    kind = getattr(transformers, family.class_name)
    state = {key: x.clone() for key, x in tensors_of(family, model)}
    made, info = kind.from_pretrained(
        None, config=config, state_dict=state, dtype=model.embed.weight.dtype, output_loading_info=True
    )
    assert not info["missing_keys"], info
    assert not info["unexpected_keys"], info
    return made.train(model.training)


def save(family: Family, model: HybridLM, folder: Path, max_shard_size: str = "5GB") -> None:
    """Writes the weights as safetensors, in files of at most `max_shard_size` unless one tensor is larger.

    In memory at a time: one file's reshuffled tensors.
    """
    shards = cut(family, model, bytes_of(max_shard_size))
    source, total, places = tensors_of(family, model), 0, {}
    for i, count in enumerate(shards):
        part = {key: x.contiguous() for key, x in (next(source) for _ in range(count))}
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(part, folder / name, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read.
        (folder / name).chmod(0o644)
        places |= dict.fromkeys(part, name)
        total += sum(x.numel() * x.element_size() for x in part.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def cut(family: Family, model: HybridLM, limit: int) -> list[int]:
    """How many tensors each file holds."""
    sizes = {entry.name: entry.parameter.numel() * entry.parameter.element_size() for entry in entries(model)}
    counts, filled = [0], 0
    for entry in family.unrolled(model.config, list(sizes)):
        # What comes from one row is of equal size but for the halves of a fused tensor, which it bounds.
        size = sum(sizes[name] for name in entry.ours) // len(entry.theirs)
        for _ in entry.theirs:
            if counts[-1] and filled + size > limit:
                counts, filled = [*counts, 0], 0
            counts[-1] += 1
            filled += size
    return counts


def bytes_of(text: str) -> int:
    """`5GB` in bytes, as transformers counts."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.isdigit():
        raise ConversionError(f"max_shard_size {text!r}: say 500MB or 5GB")
    return int(number) * UNITS[unit]
