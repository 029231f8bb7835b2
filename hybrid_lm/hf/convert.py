"""To Hugging Face and back: a `transformers` object, and a folder that loads without this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import hybrid_lm
from hybrid_lm.config.dump import architecture_hash
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.data.optional import need
from hybrid_lm.files import new_folder, replace_text
from hybrid_lm.hf.bundle import CONFIGURATION, MODELING, bundle
from hybrid_lm.hf.card import model_card
from hybrid_lm.hf.importing import Folder, described, family_of, local_folder, published, read_model, reading
from hybrid_lm.hf.native import Target, choose, native_config, native_model
from hybrid_lm.hf.native import save as save_native
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.origin import GENERATION, origin
from hybrid_lm.hf.verify import disk_and_rust, verify, verify_object
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops import select
from hybrid_lm.registry import table

if TYPE_CHECKING:
    from hybrid_lm.data.tokenizer import Tokenizer
    from hybrid_lm.hf.wrapper import HybridLMForCausalLM

RECORD = "hybrid_lm_export.json"
"""What an export says of itself; a folder that has it may be replaced by another export."""


def explicit(config: ModelConfig) -> dict[str, Any]:
    """A `model` section as plain data with every default written out, those of the layers included."""
    data = config.model_dump()
    for name, recipe in config.layers.items():
        options = table("layer")[recipe.type].Options.model_validate(dict(recipe.options))
        data["layers"][name] |= options.model_dump()
    return data


def to_hf(
    model: HybridLM,
    tokenizer: Tokenizer | None = None,
    *,
    format: str = "auto",
    max_length: int | None = None,
) -> Any:
    """`model` as an object of `transformers`.

    Args:
        tokenizer: gives the ids of end-of-text and padding.
        format: `native:NAME`, a class of transformers with a copy of the weights in the types in which it
            loads them (in a bfloat16 model A_log too, which `export` writes in float32); `remote`, a
            HybridLMForCausalLM around the model itself; `auto`: native if the architecture fits a class.
        max_length: longest sequence in tokens to advertise (`max_position_embeddings`); by default what
            learned positions allow, or nothing.

    Raises:
        ValueError: if the tokenizer has more entries than the model, if the architecture is not the class
            that was asked for, and without transformers (MissingPackage).
    """
    need("transformers", "the Hugging Face form of a model")
    target = choose(model.config, format)
    ids = token_ids(model, tokenizer)
    if target.family is None:
        return wrapped(model, ids, max_length)
    with no_progress():
        return native_model(target.family, target_config(target, model, ids, max_length), model)


def token_ids(model: HybridLM, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The ids of the specials, none without a tokenizer. Raises ConversionError if it does not fit."""
    if tokenizer is None:
        return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    vocab_size = model.config.vocab_size or 0
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the model {vocab_size}"
        )
    eot = tokenizer.eot_id
    return {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": tokenizer.pad_id}


def wrapped(model: HybridLM, ids: dict[str, Any], max_length: int | None) -> HybridLMForCausalLM:
    """The model behind the interface of transformers; the weights are the same, not copies."""
    from hybrid_lm.hf.wrapper import HybridLMConfig, HybridLMForCausalLM

    fields = {key: value for key, value in ids.items() if value is not None}
    if longest := max_length or model.config.embedding.max_positions:
        fields["max_position_embeddings"] = longest
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = HybridLMConfig(architecture=explicit(model.config), dtype=dtype, **fields)
    return HybridLMForCausalLM(config, model=model).train(model.training)


def target_config(target: Target, model: HybridLM, ids: dict[str, Any], max_length: int | None) -> Any:
    """The configuration of a native class."""
    assert target.family is not None
    more = dict(ids)
    if max_length is not None and "max_position_embeddings" in target.family.known:
        more["max_position_embeddings"] = max_length
    return native_config(target.family, target.fields, model, **more)


def from_hf(
    path_or_model: Any,
    *,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    check: bool = True,
    told: Callable[[dict[str, Any]], None] = lambda measured: None,
) -> HybridLM:
    """The model of a checkpoint (a folder or hub name) or of a `transformers` object: of a family that is
    read here (`hf.families`), or an export of ours.

    Args:
        dtype: of the weights read from a folder; `auto`: as they were written.
        trust_remote_code: let transformers run code that the folder brings. Nothing that is read here needs
            it; without it, a folder of another architecture is refused before its code is touched.
        check: compare logits and a greedy continuation with what transformers makes of it, in float32.
        told: called with what the comparison measured.

    Raises:
        ValueError: for a folder that does not load, for other architectures, with those that are read, for
            a field or weight that is unknown or unsupported, naming it, if the comparison fails, and without
            transformers (MissingPackage).
    """
    need("transformers", "reading a Hugging Face model")
    from transformers import AutoConfig

    from hybrid_lm.hf.wrapper import HybridLMForCausalLM

    if isinstance(path_or_model, HybridLMForCausalLM):
        return path_or_model.model
    if not isinstance(path_or_model, str | Path):
        return from_object(path_or_model, check)
    place = str(path_or_model)
    with reading(place), no_progress():
        config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code)
        if config.model_type == "hybrid_lm":
            return own_export(place, dtype)
        family, fields = described(config, place)
        folder = local_folder(place)
        wanted = wanted_dtype(dtype, config.dtype)
        model = read_model(family, fields, Folder(folder), dtype=wanted)
    if check:
        told(verify(folder, model, native=family.tolerance, cached=not family.cached_differs(fields)))
    return model


def wanted_dtype(dtype: str | torch.dtype, written: Any) -> torch.dtype | None:
    """The type to read weights in; None: as they are."""
    dtype = written if dtype == "auto" else dtype
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def own_export(place: str, dtype: str | torch.dtype) -> HybridLM:
    """The model in an export of ours."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval().model


def from_object(theirs: Any, check: bool) -> HybridLM:
    """The model that an object of transformers is; its weights are copied."""
    config = getattr(theirs, "config", None)
    kind = getattr(config, "model_type", None)
    if kind == "hybrid_lm":
        # Loaded by remote code: the same weights in another copy of our classes.
        weight = theirs.model.embed.weight
        made = build_model(
            ModelConfig.model_validate(from_plain(theirs.config.architecture)),
            device=weight.device,
            dtype=weight.dtype,
        )
        made.load_state_dict(theirs.model.state_dict())
        return made
    family = family_of(kind, type(theirs).__name__)
    fields = theirs.config.to_dict()
    model = read_model(family, fields, published(theirs))
    if check:
        verify_object(theirs, model, native=family.tolerance, cached=not family.cached_differs(fields))
    return model


def from_plain(architecture: dict[str, Any]) -> dict[str, Any]:
    """The `model` section that a config's `architecture` stands for."""
    from hybrid_lm.hf.wrapper import from_json_safe

    return from_json_safe(architecture)


def export(
    run_or_model: Any,
    out: str | Path,
    *,
    format: str = "auto",
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained(out)` loads; remote code needs
    `trust_remote_code=True`.

    It is loaded once, in a fresh process that has torch and transformers only, and compared with the model
    before it gets its name: `out` is whole and right, or as it was.

    Args:
        run_or_model: a model, or a run with `.model` and `.tokenizer`.
        format: `native:NAME` for a class of transformers, `remote` for our own code beside the weights;
            `auto`: native if the architecture fits a class.
        tokenizer: saved too, so that text goes in and out; by default the run's.
        overwrite: replace an export that is there. Any other folder that is not empty is never replaced.
        dtype: of the written weights, except the dynamics, which stay float32; by default the model's.
        max_length: see `to_hf`; the tokenizer gets it too.
        max_shard_size: largest file of weights.

    Raises:
        ValueError: if `out` is taken, cannot be written (DiskError), if the architecture is not the class
            that was asked for, or if what was written is not the model; without transformers
            (MissingPackage).
    """
    need("transformers", "the Hugging Face form of a model")
    model = run_or_model if isinstance(run_or_model, HybridLM) else run_or_model.model
    tokenizer = tokenizer or getattr(run_or_model, "tokenizer", None)
    out = Path(out)
    check_free(out, overwrite)
    target = choose(model.config, format)
    model = as_exported(model, dtype)
    came = origin(run_or_model)
    ids = token_ids(model, tokenizer) | (came.ids if came else {})
    cannot = f"cannot write {out}"
    with new_folder(out, cannot) as folder:
        with no_progress(), disk_and_rust(cannot):
            write = write_remote if target.family is None else write_native
            config = write(target, model, ids, max_length, max_shard_size, folder)
            if tokenizer is not None:
                # Without a limit, a number that transformers takes for "none".
                longest = max_length or getattr(config, "max_position_embeddings", None) or int(1e30)
                tokenizer.to_hf(longest).save_pretrained(folder)
            if came and came.generation is not None:
                replace_text(folder / GENERATION, came.generation)
            name = target.family.class_name if target.family else None
            card = model_card(model, out.resolve().name, tokenizer, name)
            (folder / "README.md").write_text(card, encoding="utf-8")
        how: dict[str, Any] = {}
        if target.family is not None:
            cached = not target.family.cached_differs(config.to_dict())
            how = {"native": target.family.tolerance, "cached": cached}
        record = {
            "hybrid_lm": hybrid_lm.__version__,
            "format": f"native:{target.family.name}" if target.family else "remote",
            "reasons": target.reasons,
            "architecture_sha256": architecture_hash(model.config),
            "dtype": str(config.dtype).removeprefix("torch."),
            "check": verify(folder, model, **how),
        }
        replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return out


def write_native(
    target: Target,
    model: HybridLM,
    ids: dict[str, Any],
    max_length: int | None,
    max_shard_size: str,
    folder: Path,
) -> Any:
    """Configuration and weights of a native class; returns the configuration."""
    from transformers import GenerationConfig

    assert target.family is not None
    config = target_config(target, model, ids, max_length)
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    save_native(target.family, model, folder, max_shard_size)
    return config


def write_remote(
    target: Target,
    model: HybridLM,
    ids: dict[str, Any],
    max_length: int | None,
    max_shard_size: str,
    folder: Path,
) -> Any:
    """Configuration, weights and our code; returns the configuration."""
    files = bundle({recipe.type for recipe in model.config.layers.values()})
    made = wrapped(model, ids, max_length)
    made.config.auto_map = {
        "AutoConfig": f"{CONFIGURATION}.HybridLMConfig",
        "AutoModelForCausalLM": f"{MODELING}.HybridLMForCausalLM",
    }
    made.save_pretrained(folder, max_shard_size=max_shard_size)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return made.config


def read_record(folder: Path) -> dict[str, Any]:
    """What an export says of itself."""
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def as_exported(model: HybridLM, dtype: torch.dtype | None) -> HybridLM:
    """The model on the CPU, in evaluation mode and of the given type: itself if it is that, else a copy."""
    weight = next(model.parameters())
    there, wanted = weight.device.type, dtype or weight.dtype
    if not model.training and there == "cpu" and wanted == weight.dtype:
        return model
    moved = copy.deepcopy(model).to("cpu", wanted).eval()
    if there != "cpu":
        moved.backends = select("auto", "cpu")
    return moved


@contextmanager
def no_progress() -> Iterator[None]:
    """Without the bars that transformers draws for each file."""
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def check_free(out: Path, overwrite: bool) -> None:
    """Raises ConversionError if `out` cannot become the export's folder."""
    if out.exists() and not out.is_dir():
        raise ConversionError(f"{out} is a file; choose a folder that does not exist yet")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (out / RECORD).is_file():
        raise ConversionError(f"{out} is not empty and no export; choose another folder")
    if not overwrite:
        raise ConversionError(f"{out}: an export is already there; choose another folder, or say overwrite")
