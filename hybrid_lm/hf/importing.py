"""In from Hugging Face: a folder of safetensors, one tensor at a time, or a model object of transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hybrid_lm.hf.families import FAMILIES
from hybrid_lm.hf.family import Family
from hybrid_lm.hf.options import ConversionError
from hybrid_lm.hf.weights import Placed
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.model.tensors import TensorFile

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class Folder(Mapping[str, Tensor]):
    """The tensors of a checkpoint folder, each read when it is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.files = shard_of_each(folder)
        self._open: TensorFile | None = None

    def __getitem__(self, key: str) -> Tensor:
        name = self.files[key]
        try:
            if self._open is None or self._open.path.name != name:
                self._open = TensorFile(self.folder / name)
            return self._open[key]
        except (OSError, SafetensorError, KeyError) as error:
            raise ConversionError(f"{self.folder / name}: cannot be read: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def shard_of_each(folder: Path) -> dict[str, str]:
    """Key -> name of the file that holds it.

    Raises ConversionError for a folder without safetensors, and for an index that names files elsewhere.
    """
    index, single = folder / INDEX, folder / SINGLE
    try:
        if index.is_file():
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for name in {str(name) for name in files.values()}:
                # Nothing but a name: the index of a download must not make us read other files.
                if Path(name).name != name or "\\" in name:
                    raise ConversionError(f"{index}: {name!r} is outside the folder; it is not read")
            return dict(files)
        if single.is_file():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
    except (OSError, SafetensorError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ConversionError(f"{folder}: the weights cannot be read: {error}") from error
    raise ConversionError(
        f"{folder}: neither {SINGLE} nor {INDEX}; other forms of weights (pickles) are not read"
    )


def family_of(model_type: Any, what: str) -> Family:
    """The family of a `model_type`. Raises ConversionError with those that there are."""
    if model_type not in FAMILIES:
        known = ", ".join(["hybrid_lm", *FAMILIES])
        raise ConversionError(f"{what} has the model_type {model_type!r}; from_hf reads: {known}")
    return FAMILIES[model_type]


def described(config: Any, what: str) -> tuple[Family, dict[str, Any]]:
    """The family of a configuration, and its fields; of one that sees images too (Qwen3.5), those of its
    language model. Raises ConversionError as `family_of`."""
    language = config.get_text_config()
    config = language if language.model_type in FAMILIES else config
    return family_of(config.model_type, what), config.to_dict()


@contextmanager
def reading(place: str) -> Iterator[None]:
    """Turns what transformers and our own checks say of a checkpoint that is none into one message."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except ConversionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A strict configuration names the field in its first line and the reason in the next.
        reason = " ".join(lines[:2] if isinstance(error, StrictDataclassError) else lines[:1])
        what = (
            "not a model folder or hub name that loads" if isinstance(error, OSError) else "it cannot be read"
        )
        raise ConversionError(f"{place}: {what}: {reason or type(error).__name__}") from error


def local_folder(place: str) -> Path:
    """A folder, or the local copy of a hub name, fetched if need be: safetensors and JSON only."""
    path = Path(place)
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt"]
    with suppress(OSError, ValueError):
        return Path(snapshot_download(place, allow_patterns=wanted, local_files_only=True))
    try:
        return Path(snapshot_download(place, allow_patterns=wanted))
    except (OSError, ValueError, HFValidationError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConversionError(f"{place}: not a model folder or hub name that loads: {reason}") from error


def read_model(
    family: Family,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
) -> HybridLM:
    """The model that fields and tensors of a family are. One tensor is read at a time.

    dtype: of the parameters, except the dynamics, which stay float32; None: the embedding's in `tensors`.

    Raises ConversionError for fields and keys that are missing or unknown, naming the first.
    """
    config = family.read(fields)
    model = build_model(config, weights=False)
    kinds = {entry.name: entry.spec.kind for entry in entries(model)}
    shapes = {entry.name: entry.parameter.shape for entry in entries(model)}
    rows = family.unrolled(config, list(shapes))
    keys = keys_on_disk(family, rows, tensors, tied=config.embedding.tied)
    if dtype is None:
        dtype = tensors[keys[rows[0].theirs[0]]].dtype
    if config.embedding.tied:
        check_tied(family, rows, tensors, keys)
    for entry in rows:
        stored = [tensors[keys[key]] for key in entry.theirs]
        for key, x in zip(entry.theirs, stored, strict=True):
            if x.dtype not in FLOATS:
                raise ConversionError(f"{key} is {x.dtype}: quantised weights are not read")
        wanted = [shapes[name] for name in entry.ours]
        try:
            parts = entry.how.read(stored, wanted, entry.options)
        except (RuntimeError, IndexError) as error:
            there = tuple(stored[0].shape)
            raise ConversionError(f"{entry.theirs[0]}: {entry.how.name} of {there}: {error}") from error
        for name, part, shape in zip(entry.ours, parts, wanted, strict=True):
            if part.shape != shape:
                raise ConversionError(
                    f"{entry.theirs[0]} is {tuple(part.shape)}, its configuration says {tuple(shape)}"
                )
            place(model, name, part, torch.float32 if kinds[name] == "dynamics" else dtype)
    return model.eval()


def check_tied(
    family: Family, rows: Sequence[Placed], tensors: Mapping[str, Tensor], keys: Mapping[str, str]
) -> None:
    """Raises ConversionError for a checkpoint that says its matrices are one and has two."""
    embedding = next(entry.theirs[0] for entry in rows if entry.ours == ("embed.weight",))
    for head in {family.head, "lm_head.weight"} & set(tensors):
        if not torch.equal(tensors[head], tensors[keys[embedding]]):
            raise ConversionError(
                f"{head} is not {embedding}, but tie_word_embeddings is true; set it to false in config.json"
            )


def place(model: nn.Module, name: str, x: Tensor, dtype: torch.dtype) -> None:
    """Makes `x` the parameter called `name`, in memory of its own."""
    path, _, last = name.rpartition(".")
    own = x.to(dtype, copy=True, memory_format=torch.contiguous_format)
    parameters = model.get_submodule(path)._parameters
    before = parameters[last]
    assert before is not None
    parameters[last] = nn.Parameter(own, requires_grad=before.requires_grad)


def published(theirs: Any) -> dict[str, Tensor]:
    """The weights of a model object under the keys that its class has on disk, where experts are apart and a
    tensor with several names has one."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {key: x for key, x in theirs.state_dict().items() if key not in theirs.all_tied_weights_keys}
    return revert_weight_conversion(theirs, own)


def keys_on_disk(
    family: Family, rows: Sequence[Placed], tensors: Mapping[str, Tensor], *, tied: bool
) -> dict[str, str]:
    """The row's key -> the key under which `tensors` has it.

    Raises ConversionError for the first key that is missing or that nothing here takes.
    """
    wanted = {key for entry in rows for key in entry.theirs}
    found = {}
    for key in tensors:
        full = key if key in wanted or key.startswith(family.prefix) else family.prefix + key
        for there, here in family.spelled.items():
            full = full if full in wanted else full.replace(there, here)
        if full in wanted:
            found[full] = key
        elif (
            not key.endswith(family.buffers)
            and not key.startswith(family.unread)
            and not (tied and key in (family.head, "lm_head.weight"))
        ):
            raise ConversionError(f"{family.name}: nothing here takes the weight {key}")
    for key in sorted(wanted - found.keys()):
        raise ConversionError(f"{family.name}: the weight {key} is missing")
    return found
