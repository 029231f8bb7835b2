"""To Hugging Face and back: a `transformers` object, and a folder that loads without this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
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
from hybrid_lm.hf.verify import disk_and_rust, verify
from hybrid_lm.model.build import build_model
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops import select
from hybrid_lm.registry import table

if TYPE_CHECKING:
    from hybrid_lm.data.tokenizer import Tokenizer
    from hybrid_lm.hf.wrapper import HybridLMForCausalLM

RECORD = "hybrid_lm_export.json"
"""What an export says of itself; a folder that has it may be replaced by another export."""
SUPPORTED = ("hybrid_lm",)
"""The `model_type`s that `from_hf` reads."""


class ConversionError(ValueError):
    """A model or a folder that cannot be converted; nothing was left behind."""


def explicit(config: ModelConfig) -> dict[str, Any]:
    """A `model` section as plain data with every default written out, those of the layers included."""
    data = config.model_dump()
    for name, recipe in config.layers.items():
        options = table("layer")[recipe.type].Options.model_validate(dict(recipe.options))
        data["layers"][name] |= options.model_dump()
    return data


def to_hf(
    model: HybridLM, tokenizer: Tokenizer | None = None, *, max_length: int | None = None
) -> HybridLMForCausalLM:
    """`model` behind the interface of `transformers`; the weights are the same, not copies.

    Args:
        tokenizer: gives the ids of end-of-text and padding.
        max_length: longest sequence in tokens to advertise (`max_position_embeddings`); by default what
            learned positions allow, or nothing.

    Raises:
        ValueError: if the tokenizer has more entries than the model, and without transformers
            (MissingPackage).
    """
    need("transformers", "the Hugging Face form of a model")
    from hybrid_lm.hf.wrapper import HybridLMConfig, HybridLMForCausalLM

    vocab_size = model.config.vocab_size or 0
    fields: dict[str, Any] = {}
    if tokenizer is not None:
        if tokenizer.vocab_size > vocab_size:
            raise ConversionError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, the model {vocab_size}"
            )
        eot = tokenizer.eot_id
        fields = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": tokenizer.pad_id}
    if longest := max_length or model.config.embedding.max_positions:
        fields["max_position_embeddings"] = longest
    dtype = str(model.embed.weight.dtype).removeprefix("torch.")
    config = HybridLMConfig(architecture=explicit(model.config), dtype=dtype, **fields)
    wrapped = HybridLMForCausalLM(config, model=model)
    return wrapped.train(model.training)


def from_hf(path_or_model: Any, *, dtype: str | torch.dtype = "auto") -> HybridLM:
    """The model inside an export (a folder or hub name) or a `transformers` object of one.

    Args:
        dtype: of the weights read from a folder; `auto`: as they were written.

    Raises:
        ValueError: for a folder that does not load and for other architectures, with those that are read;
            without transformers (MissingPackage).
    """
    need("transformers", "reading a Hugging Face model")
    from transformers import AutoConfig, AutoModelForCausalLM

    from hybrid_lm.hf.wrapper import HybridLMForCausalLM

    if isinstance(path_or_model, HybridLMForCausalLM):
        return path_or_model.model
    if not isinstance(path_or_model, str | Path):
        check_type(getattr(path_or_model, "config", None), type(path_or_model).__name__)
        # Loaded by remote code: the same weights in another copy of our classes.
        theirs = path_or_model.model
        config = ModelConfig.model_validate(from_plain(path_or_model.config.architecture))
        weight = theirs.embed.weight
        model = build_model(config, device=weight.device, dtype=weight.dtype)
        model.load_state_dict(theirs.state_dict())
        return model
    place = str(path_or_model)
    try:
        with no_progress():
            check_type(AutoConfig.from_pretrained(place, trust_remote_code=False), place)
            return AutoModelForCausalLM.from_pretrained(place, dtype=dtype).eval().model
    except ConversionError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConversionError(f"{place}: not a model folder or hub name that loads: {reason}") from error


def from_plain(architecture: dict[str, Any]) -> dict[str, Any]:
    """The `model` section that a config's `architecture` stands for."""
    from hybrid_lm.hf.wrapper import from_json_safe

    return from_json_safe(architecture)


def check_type(config: Any, what: str) -> None:
    """Raises ConversionError unless `config` is of an architecture that is read here."""
    found = getattr(config, "model_type", None)
    if found not in SUPPORTED:
        raise ConversionError(f"{what} has the model_type {found!r}; from_hf reads: {', '.join(SUPPORTED)}")


def export(
    run_or_model: Any,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    dtype: torch.dtype | None = None,
    max_length: int | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Writes a folder that `AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)` loads.

    It is loaded once, in a fresh process that has torch and transformers only, and compared with the model
    before it gets its name: `out` is whole and right, or as it was.

    Args:
        run_or_model: a model, or a run with `.model` and `.tokenizer`.
        tokenizer: saved too, so that text goes in and out; by default the run's.
        overwrite: replace an export that is there. Any other folder that is not empty is never replaced.
        dtype: of the written weights, except the dynamics, which stay float32; by default the model's.
        max_length: see `to_hf`; the tokenizer gets it too.
        max_shard_size: largest file of weights.

    Raises:
        ValueError: if `out` is taken, cannot be written (DiskError), or if what was written is not the model;
            without transformers (MissingPackage).
    """
    model = run_or_model if isinstance(run_or_model, HybridLM) else run_or_model.model
    tokenizer = tokenizer or getattr(run_or_model, "tokenizer", None)
    out = Path(out)
    check_free(out, overwrite)
    types = {recipe.type for recipe in model.config.layers.values()}
    files = bundle(types)
    model = as_exported(model, dtype)
    wrapped = to_hf(model, tokenizer, max_length=max_length)
    wrapped.config.auto_map = {
        "AutoConfig": f"{CONFIGURATION}.HybridLMConfig",
        "AutoModelForCausalLM": f"{MODELING}.HybridLMForCausalLM",
    }
    cannot = f"cannot write {out}"
    with new_folder(out, cannot) as folder:
        with no_progress(), disk_and_rust(cannot):
            wrapped.save_pretrained(folder, max_shard_size=max_shard_size)
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
            if tokenizer is not None:
                # Without a limit, a number that transformers takes for "none".
                tokenizer.to_hf(max_length or int(1e30)).save_pretrained(folder)
            (folder / "README.md").write_text(
                model_card(model, out.resolve().name, tokenizer), encoding="utf-8"
            )
        record = {
            "hybrid_lm": hybrid_lm.__version__,
            "architecture_sha256": architecture_hash(model.config),
            "dtype": wrapped.config.dtype
            if isinstance(wrapped.config.dtype, str)
            else str(wrapped.config.dtype),
            "check": verify(folder, model),
        }
        replace_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
    return out


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
