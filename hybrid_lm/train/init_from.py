"""Training from an imported model: which of its weights are taken over, which layers start afresh, and which
are frozen. Everything is checked on shapes before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hybrid_lm.config.dump import architecture
from hybrid_lm.config.imported import Imported, imported, run_folder
from hybrid_lm.config.load import load_config
from hybrid_lm.config.pattern import expand
from hybrid_lm.config.places import replaced, spots, within
from hybrid_lm.config.report import show
from hybrid_lm.config.schema import InitFromConfig, ModelConfig, RunConfig, TokenizerConfig
from hybrid_lm.data import Tokenizer, make_tokenizer
from hybrid_lm.layers.block import Shared
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.registry import locate
from hybrid_lm.train.checkpoint import load_run

ORIGIN = "hf"
"""In a run's folder: what it keeps of the checkpoint that it came from (`hf.origin`)."""

SAMPLE = (
    "Two tokenizers that say the same of this, are the same: def f(x):\n\treturn 3.14 * x  # größer, 漢字 🙂"
)


class Plan(NamedTuple):
    """What becomes of the parameters."""

    wanted: InitFromConfig
    base: Imported
    copied: frozenset[str]
    """Names of those that are taken over."""
    notes: tuple[str, ...]
    """Lines for people: what starts afresh, and what is not as it was imported."""


def of_run(folder: Path) -> tuple[ModelConfig, dict[str, Any] | None]:
    """The architecture of a run, and its tokenizer as `data.tokenizer` says it (None: it has none).

    Raises ConfigError, a ValueError, for a damaged config.yaml.
    """
    model, kept = load_config(folder / "config.yaml").model, folder / "tokenizer"
    if not (kept / "hybrid_lm.json").is_file():
        return model, None
    kind = json.loads((kept / "hybrid_lm.json").read_text(encoding="utf-8"))["kind"]
    return model, {"kind": "bytes"} if kind == "bytes" else {"kind": "huggingface", "path": str(kept)}


def make_plan(config: RunConfig) -> tuple[RunConfig, Plan | None]:
    """Compares the run's model with the one that it starts from; no plan without `init_from`.

    Returns the configuration with the imported vocabulary, if it names none.

    Raises ValueError for a place that is not there, and for a layer that is neither the imported one nor
    named in `init_from.replace`, with the shapes.
    """
    wanted = config.init_from
    if wanted is None:
        return config, None
    base, model = imported(wanted.path), config.model
    if model.vocab_size is None:
        model = model.model_copy(update={"vocab_size": base.model.vocab_size})
        config = config.model_copy(update={"model": model})
    fresh = check_replaced(base.model, model, wanted.replace)
    copied = check_shapes(base.model, model, fresh)
    lost = [name for name in frozen(model, wanted.freeze) if name.startswith(fresh)]
    if lost:
        raise ValueError(
            f"init_from.freeze: {at(lost[0], model)} starts afresh, and frozen it would stay as it starts"
        )
    notes = [f"{len(copied)} parameters of {wanted.path} are taken over"]
    notes += [f"{place}: {item or 'the same'}, from its start" for place, item in wanted.replace.items()]
    notes += differences(base.model, model, fresh)
    return config, Plan(wanted, base, copied, tuple(f"init_from: {note}" for note in notes))


def check_replaced(
    base: ModelConfig, model: ModelConfig, replace: Mapping[str, str | None]
) -> tuple[str, ...]:
    """How the names of the parameters that start afresh begin.

    Raises ValueError unless `model` has the layers of `base`, but for the replaced ones.
    """
    try:
        wanted, prefixes = replaced(base, replace)
    except ValueError as error:
        raise ValueError(f"init_from.replace: {error}") from None
    ours = expand(model.pattern, list(model.layers), model.depth)
    theirs = expand(base.pattern, list(base.layers), base.depth)
    if len(ours) != len(theirs):
        raise ValueError(f"init_from: model.pattern has {len(ours)} layers, the imported one {len(theirs)}")
    new = {spot for word, item in replace.items() if item is not None for spot in spots(word, theirs)}
    for i, (item, old) in enumerate(zip(ours, theirs, strict=True)):
        if any(spot.layer == i for spot in new) and item != wanted[i]:
            raise ValueError(
                f"init_from.replace: layer {i} is to be {wanted[i]}, model.pattern has {item} there"
            )
        kinds = [
            [m.layers[name].type for name in names.split("+")] for m, names in ((model, item), (base, old))
        ]
        if not any(spot.layer == i for spot in new) and kinds[0] != kinds[1]:
            here, there = ("+".join(kind) for kind in kinds)
            raise ValueError(
                f"init_from: layer {i} is {item} ({here}), the imported one {old} ({there}); say so in "
                "init_from.replace, and it starts afresh"
            )
    return tuple(prefixes)


def check_shapes(base: ModelConfig, model: ModelConfig, fresh: tuple[str, ...]) -> frozenset[str]:
    """Names of the parameters that are taken over: all but the fresh ones.

    Raises ValueError naming the first that the other model does not have like this.
    """
    theirs, ours = (build_model(m, weights=False) for m in (base, model))
    there, here = ({e.name: tuple(e.parameter.shape) for e in entries(m)} for m in (theirs, ours))
    for i, (old, new) in enumerate(zip(theirs.layers, ours.layers, strict=True)):
        one, other = uses(theirs, old), uses(ours, new)
        if one != other and not any(start.startswith(f"layers.{i}.") for start in fresh):
            raise ValueError(
                f"init_from: layer {i} would use other shared weights ({' '.join(other)}) than the imported "
                f"one ({' '.join(one)})"
            )
    # Weights that layers shared which are all replaced.
    gone = tuple(f"shared.{name}." for name in theirs.shared if name not in ours.shared)
    for name in [*here, *(name for name in there if name not in here and not name.startswith(gone))]:
        if not name.startswith(fresh) and here.get(name) != there.get(name):
            raise ValueError(
                f"init_from: {at(name, model)}: {here.get(name, 'absent')} here, "
                f"{there.get(name, 'absent')} in the imported model; weights that are taken over keep their "
                "shapes, others are named in init_from.replace"
            )
    return frozenset(name for name in here if not name.startswith(fresh))


def uses(model: HybridLM, layer: torch.nn.Module) -> list[str]:
    """The shared weights that a layer reads: `s.1` for the second copy of s."""
    cores = [part for part in model.shared.named_modules(prefix="shared") if part[0].count(".") == 2]
    names = {id(core): name.removeprefix("shared.") for name, core in cores}
    return [names[id(part.core)] for part in layer.modules() if isinstance(part, Shared)]


def at(name: str, model: ModelConfig) -> str:
    """A parameter for people: `layer 3 (a), layer.q_proj.weight`."""
    first, _, rest = name.partition(".")
    if first != "layers":
        return name
    number, _, rest = rest.partition(".")
    item = expand(model.pattern, list(model.layers), model.depth)[int(number)]
    return f"layer {number} ({item}), {rest}"


def differences(base: ModelConfig, model: ModelConfig, fresh: tuple[str, ...]) -> list[str]:
    """Options of what is taken over that are not the imported ones."""
    there, here = dict(flat(architecture(base))), dict(flat(architecture(model)))
    found: dict[str, list[str]] = {}
    for path, value in here.items():
        old, parts = there.get(path), path.split(".")
        if value == old or path.startswith(skipped(fresh)):
            continue
        layer = parts[0] == "layers"
        what = ".".join(parts[3:] if layer else parts)
        told = f"{what.removeprefix('options.')} = {show(value)}, imported {show(old)}"
        found.setdefault(told, []).append(parts[1] if layer else "")
    return [f"layers {' '.join(at)}: {told}" if at[0] else told for told, at in found.items()]


def skipped(fresh: Sequence[str]) -> tuple[str, ...]:
    """The paths of `architecture` that belong to replaced places: `layers.<i>.` or `layers.<i>.<branch>.`."""
    return tuple(p.replace(".layer.layers.", ".") for p in fresh if p.startswith("layers."))


def flat(data: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Paths and values of nested data."""
    parts = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else None
    if parts is None:
        yield path, data
        return
    for key, value in parts:
        yield from flat(value, f"{path}.{key}" if path else str(key))


def frozen(model: ModelConfig, words: Sequence[str | int]) -> list[str]:
    """Names of the parameters at the frozen places.

    Raises ValueError for a word that is no place or has no parameters, and if nothing is left to train.
    """
    if not words:
        return []
    known = {entry.name: entry.parameter for entry in entries(build_model(model, weights=False))}
    found: dict[str, None] = {}
    for word in words:
        try:
            there = [name for name in known if name.startswith(tuple(within(model, [word])))]
        except ValueError as error:
            raise ValueError(f"init_from.freeze: {error}") from None
        if not there:
            tied = word == "lm_head" and model.embedding.tied
            why = "the output matrix is the embedding; freeze embed" if tied else "it has no parameters"
            raise ValueError(f"init_from.freeze: {word}: {why}")
        found |= dict.fromkeys(there)
    # A parameter without a gradient (a router's correction) would not be training.
    if not any(x.requires_grad for name, x in known.items() if name not in found):
        raise ValueError("init_from.freeze: everything is frozen, and nothing is left to train")
    return list(found)


def freeze(model: HybridLM, config: RunConfig) -> None:
    """Takes the frozen parameters out of training: no gradient, no moments. Raises ValueError as `frozen`
    does."""
    if config.init_from is not None:
        names = set(frozen(config.model, config.init_from.freeze))
        for entry in entries(model):
            if entry.name in names:
                entry.parameter.requires_grad_(False)


@torch.no_grad()
def take_over(plan: Plan, model: HybridLM, folder: Path, tell: Callable[[str], None]) -> None:
    """Reads the imported weights into `model`, and puts what belongs to them into the run's `folder`.

    Raises ValueError for weights that cannot be read or are not what transformers makes of them.
    """
    path, run = plan.wanted.path, run_folder(plan.wanted.path)
    if run is not None:
        base = load_run(path).model
        if (run / ORIGIN).is_dir():
            shutil.copytree(run / ORIGIN, folder / ORIGIN)
    else:
        checks: list[dict[str, Any]] = []
        # By their places: training and Hugging Face stand beside each other, and neither imports the other.
        base = locate("hybrid_lm.hf.convert:from_hf")(path, told=checks.append)
        locate("hybrid_lm.hf.origin:keep_origin")(path, folder, checks)
        for check in checks:
            tell(locate("hybrid_lm.hf.verify:show_check")(check))
    stored = {entry.name: entry.parameter for entry in entries(base)}
    for entry in entries(model):
        if entry.name in plan.copied:
            entry.parameter.copy_(stored[entry.name])
    for note in plan.notes:
        tell(note)


def other_tokenizer(plan: Plan, tokenizer: Tokenizer | None) -> str | None:
    """What to say if the data has another tokenizer than the imported model and its embedding is kept."""
    if plan.base.tokenizer is None or tokenizer is None or "embed.weight" not in plan.copied:
        return None
    try:
        theirs = make_tokenizer(TokenizerConfig.model_validate(plan.base.tokenizer))
    except ValueError:
        # One that cannot be used here (it has no end of text, say) is not compared.
        return None
    # By what they do: bytes that were exported come back as a BPE without merges.
    if (
        theirs.eot_id == tokenizer.eot_id
        and theirs.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    ):
        return None
    return (
        f"WARNING: the data is read with the tokenizer {tokenizer.name}, the imported model was trained with "
        f"{theirs.name}: its embedding means other tokens"
    )
