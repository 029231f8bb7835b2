"""Checkpoints: safetensors and JSON, committed by one rename, verified by SHA-256 before use. No pickle.

    RUN/config.yaml  manifest.json  metrics.jsonl  tokenizer/
    RUN/checkpoints/step-00000100/model.safetensors      every parameter under its name
                                  optimizer.safetensors  <parameter>.<moment> state.json             step,
                                  counters, and what the run must still be to go on manifest.json
                                  size and SHA-256 of the other three

There are no random-number states in it: every step seeds the generators from (seed, step), see `train.loop`.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hybrid_lm.config.load import architecture_hash, load_config
from hybrid_lm.config.schema import RunConfig
from hybrid_lm.data import Tokenizer, load_tokenizer
from hybrid_lm.files import DiskError, check_space, discard, disk, new_folder, sha256_of
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.model.tensors import TensorFile

FORMAT = 1
FILES = ("model.safetensors", "optimizer.safetensors", "state.json")
REMEDY = "make room, or lower train.keep"
STEP = re.compile(r"step-([0-9]{8,12})")


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or of another model."""


class Checkpoint(NamedTuple):
    """What one step folder holds."""

    step: int
    model: Mapping[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    path: Path


class Run(NamedTuple):
    """A trained model and what belongs to it."""

    config: RunConfig
    model: HybridLM
    tokenizer: Tokenizer | None
    step: int
    path: Path
    """The run's folder."""


def save(
    run_dir: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Commits one checkpoint, then deletes all but the newest `keep`.

    Under its own name it is whole or not there: see `new_folder`.

    Raises DiskError if it could not be written; what was there before is untouched.
    """
    folder = run_dir / "checkpoints"
    final = folder / step_name(step)
    cannot = f"cannot write the checkpoint {final}"
    size = sum(x.numel() * x.element_size() for part in (model, optimizer) for x in part.values())
    with disk(cannot):
        folder.mkdir(parents=True, exist_ok=True)
    check_space(folder, int(1.1 * size) + 1_000_000, "a checkpoint", REMEDY)
    with new_folder(final, cannot) as new, disk(cannot):
        _write(new, step, model, optimizer, state)
    for old in step_folders(run_dir)[:-keep]:
        discard(old)
    return final


def _write(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> None:
    try:
        save_file(dict(model), folder / "model.safetensors")
        save_file(dict(optimizer), folder / "optimizer.safetensors")
    except SafetensorError as error:
        raise DiskError(f"cannot write {folder}: {error}") from error
    (folder / "state.json").write_text(json.dumps({"format": FORMAT, "step": step, **state}, indent=1))
    files = {}
    for name in FILES:
        # safetensors makes files that only their owner can read, whatever the umask says.
        shutil.copymode(folder / "state.json", folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
    (folder / "manifest.json").write_text(
        json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1)
    )


def verify(folder: Path) -> None:
    """Raises CheckpointError naming the first file that is missing or not what was written."""
    try:
        files = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
        recorded = {name: (files[name]["bytes"], files[name]["sha256"]) for name in FILES}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/manifest.json: missing or damaged ({error})") from None
    for name, (size, sha256) in recorded.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing")
        if path.stat().st_size != size:
            raise CheckpointError(f"{path}: {path.stat().st_size} bytes, {size} were written")
        if sha256_of(path) != sha256:
            raise CheckpointError(
                f"{path}: its SHA-256 is not that of what was written: the file has changed"
            )


def newest(run_dir: Path) -> Path | None:
    """The newest undamaged step folder, or None if there never was one; a warning names each damaged one
    passed over.

    Raises CheckpointError if all are damaged.
    """
    found, faults = step_folders(run_dir), []
    for folder in reversed(found):
        try:
            verify(folder)
        except CheckpointError as error:
            faults.append(str(error))
            continue
        if faults:
            warnings.warn(f"damaged checkpoint: {'; '.join(faults)}; using {folder}", stacklevel=2)
        return folder
    if faults:
        raise CheckpointError(f"{run_dir}: no undamaged checkpoint: {'; '.join(faults)}")
    return None


def read(folder: Path, *, optimizer: bool = True) -> Checkpoint:
    """The content of a verified step folder, on the CPU; without the optimizer's moments, the weights are
    views of the file, read when they are used."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder}: format {state['format']}, this version reads format {FORMAT}")
        moments = _tensors(folder / "optimizer.safetensors") if optimizer else {}
        path = folder / "model.safetensors"
        weights = _tensors(path) if optimizer else TensorFile(path)
        return Checkpoint(state["step"], weights, moments, state, folder)
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{folder}: damaged: {error}") from error


def _tensors(path: Path) -> dict[str, Tensor]:
    # load_file maps the file into memory; copies, because what happens to it must not happen to the run.
    return {name: x.clone() for name, x in load_file(path).items()}


def step_folders(run_dir: Path) -> list[Path]:
    """The committed checkpoints of a run, oldest first, damaged ones included."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.iterdir() if STEP.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def sweep(run_dir: Path, step: int) -> None:
    """Clears what a killed run left half-done, and renames damaged checkpoints after `step` to
    `damaged-step-*`.

    Left under their names they would count as newer than what the run writes now, which `keep` would then
    delete.
    """
    folder = run_dir / "checkpoints"
    for path in [*folder.glob(".new-step-*"), *folder.glob(".trash-*")]:
        shutil.rmtree(path, ignore_errors=True)
    for path in step_folders(run_dir):
        if int(path.name.removeprefix("step-")) > step:
            aside = folder / f"damaged-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            with disk(f"cannot rename {path}"):
                path.rename(aside)


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter once, by its name."""
    return {entry.name: entry.parameter.detach().contiguous() for entry in entries(model)}


@torch.no_grad()
def load_weights(model: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Copies stored parameters into a model.

    Raises CheckpointError if the names or shapes are not exactly the model's.
    """
    own = {entry.name: entry.parameter for entry in entries(model)}
    shapes = {name: tuple(x.shape) for name, x in own.items()}
    stored = {name: tuple(x.shape) for name, x in tensors.items()}
    if shapes != stored:
        wrong = sorted(name for name in shapes.keys() | stored.keys() if shapes.get(name) != stored.get(name))
        name = wrong[0]
        raise CheckpointError(
            f"{where}: the weights are those of another architecture: {len(wrong)} parameters differ, first "
            f"{name}: {stored.get(name, 'absent')} in the file, {shapes.get(name, 'absent')} in the model"
        )
    for name, parameter in own.items():
        parameter.copy_(tensors[name])


def locate(run_dir: str | Path, step: int | None = None) -> tuple[Path, Path]:
    """(run folder, step folder) of a run or of one of its step folders; the newest undamaged one if no step
    is named.

    A step that is named is that step or an error, never another one.

    Raises CheckpointError saying what is missing.
    """
    path = Path(run_dir)
    if STEP.fullmatch(path.name) and path.parent.name == "checkpoints" and step is None:
        path, step = path.parent.parent, int(path.name.removeprefix("step-"))
    if not (path / "config.yaml").is_file():
        what = "no such folder" if not path.exists() else "not a run's folder: it has no config.yaml"
        raise CheckpointError(f"{path}: {what}; `hybrid-lm train` makes one")
    if step is None:
        folder = newest(path)
        if folder is None:
            raise CheckpointError(
                f"{path}: no checkpoint yet; `hybrid-lm train --resume` goes on from the beginning"
            )
        return path, folder
    folder = path / "checkpoints" / step_name(step)
    if not folder.is_dir():
        have = ", ".join(str(int(other.name.removeprefix("step-"))) for other in step_folders(path)) or "none"
        raise CheckpointError(f"{path}: no checkpoint of step {step}; there are: {have}")
    verify(folder)
    return path, folder


def load_run(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | Mapping[str, str] = "auto",
) -> Run:
    """A run's configuration, model, tokenizer and step.

    Args:
        run_dir: the run's folder, or one of its `checkpoints/step-*`.
        step: which checkpoint; None: the newest undamaged one, with a warning if that is not the newest.
        dtype: of the parameters (dynamics stay float32); None: float32, as they are stored.
        backend: of all ops or of each, as in `build_model`.

    Raises CheckpointError (a ValueError) for no run, no checkpoint, a damaged one, or one of another
    architecture.
    """
    path, folder = locate(run_dir, step)
    config = load_config(path / "config.yaml")
    checkpoint = read(folder, optimizer=False)
    check_architecture(config, checkpoint)
    # Without starting values: memory is the weights', once.
    model = build_model(config, device=device, backend=backend, weights=False)
    model = model.to(dtype or torch.float32).to_empty(device=device)
    load_weights(model, checkpoint.model, folder)
    tokenizer = load_tokenizer(path / "tokenizer") if (path / "tokenizer").is_dir() else None
    return Run(config, model, tokenizer, checkpoint.step, path)


def load_checkpoint(
    run_dir: str | Path,
    *,
    step: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    backend: str | Mapping[str, str] = "auto",
) -> HybridLM:
    """The model of `load_run`."""
    return load_run(run_dir, step=step, device=device, dtype=dtype, backend=backend).model


def check_architecture(config: RunConfig, checkpoint: Checkpoint) -> None:
    """CheckpointError if the checkpoint was written by another architecture."""
    stored, ours = checkpoint.state["identity"]["architecture"], architecture_hash(config)
    if stored != ours:
        raise CheckpointError(
            f"{checkpoint.path}: written by another architecture ({stored[:12]}, config.yaml says "
            f"{ours[:12]}); `model` in config.yaml must be the one it was trained with"
        )
