"""Out to a class of transformers: which one an architecture fits, and its folder in shards."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.importing import INDEX, SINGLE
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.weights import Placed
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.model.tensors import write
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
    yield from written(family.unrolled(model.config, list(own)), own)


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

    In memory at a time: what one row of the family's table reshuffles.
    """
    own = {entry.name: entry.parameter.detach() for entry in entries(model)}
    # Wide types first, as a file wants them.
    rows = sorted(family.unrolled(model.config, list(own)), key=lambda row: -own[row.ours[0]].element_size())
    shapes = dict(written(rows, {name: x.to("meta") for name, x in own.items()}))
    shards, source, places = cut(shapes, bytes_of(max_shard_size)), written(rows, own), {}
    for i, part in enumerate(shards):
        name = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write(folder / name, part, itertools.islice(source, len(part)))
        places |= dict.fromkeys(part, name)
    if len(shards) > 1:
        total = sum(x.nbytes for x in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def written(rows: Iterable[Placed], own: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Their keys and tensors of our parameters, one row after another."""
    for row in rows:
        yield from zip(row.theirs, row.how.write([own[name] for name in row.ours], row.options), strict=True)


def cut(shapes: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors of each file."""
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for key, x in shapes.items():
        if shards[-1] and filled + x.nbytes > limit:
            shards.append({})
            filled = 0
        shards[-1][key] = x
        filled += x.nbytes
    return shards


def bytes_of(text: str) -> int:
    """`5GB` in bytes, as transformers counts."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in UNITS or not number.isdigit():
        raise ConversionError(f"max_shard_size {text!r}: say 500MB or 5GB")
    return int(number) * UNITS[unit]
