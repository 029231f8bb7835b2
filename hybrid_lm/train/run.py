"""A run's folder: made in one move once everything has been checked, or opened to go on."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import hybrid_lm
from hybrid_lm.config.load import architecture_hash, dump_yaml, load_config
from hybrid_lm.config.schema import RunConfig, TextData
from hybrid_lm.data import TokenStore, is_store
from hybrid_lm.files import check_space, disk, new_folder, replace_text
from hybrid_lm.model.build import build_model, with_vocabulary
from hybrid_lm.model.init import entries
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.ops import backend as backends
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import init_from, optim
from hybrid_lm.train.checkpoint import REMEDY, Checkpoint, CheckpointError
from hybrid_lm.train.dry_run import dry_run
from hybrid_lm.train.source import Source, open_source

FORMAT = 1


@dataclass
class Setup:
    """A run that is ready for its next step."""

    config: RunConfig
    path: Path
    source: Source
    model: HybridLM
    device: torch.device
    identity: dict[str, Any]
    """What must not change between the parts of a run: see `identity`."""
    checkpoint: Checkpoint | None
    run_id: str
    """Random, for services that need a name that is nobody else's."""


def start(config: RunConfig, run_dir: Path, *, overwrite: bool, console: Console) -> Setup:
    """A new run. Its folder appears, and an old one of the same name goes, when nothing that can be checked
    is wrong.

    Raises ValueError (ConfigError, DiskError, ...) with one clear message; then no file has changed.
    """
    refuse_existing(run_dir, overwrite)
    device = check_settings(config)
    dry_run(config)
    config, plan = init_from.make_plan(config)
    cannot = f"cannot write the run's folder {run_dir}"
    with new_folder(run_dir, cannot) as new:
        source = read_data(config, new, console)
        setup = assemble(config, run_dir, source, device)
        check_space(new, space(setup), "the run", REMEDY)
        if plan is not None:
            begin(setup, plan, new, console)
        replace_text(new / "config.yaml", dump_yaml(setup.config))
        replace_text(new / "manifest.json", json.dumps(manifest(setup), indent=1) + "\n")
        if source.tokenizer is not None:
            with disk(cannot):
                source.tokenizer.save(new / "tokenizer")
    tell(console, describe(setup))
    # The files have moved.
    setup.source = open_source(setup.config, run_dir, prepared=True)
    return setup


def begin(setup: Setup, plan: init_from.Plan, folder: Path, console: Console) -> None:
    """Takes over the imported weights; they are the run's checkpoint of step 0, so that it can go on when
    what it was imported from is gone."""
    if warning := init_from.other_tokenizer(plan, setup.source.tokenizer):
        tell(console, warning)
    init_from.take_over(plan, setup.model, folder, lambda text: tell(console, text))
    form = optim.implementation(setup.device)
    # Counters as they are before the first step.
    state = {"identity": setup.identity, "optimizer": form, "counters": {"window": {}}}
    weights = checkpoints.weights(setup.model)
    checkpoints.save(folder, 0, weights, {}, state, keep=setup.config.train.keep)


def resume(config: RunConfig, run_dir: Path, *, console: Console) -> Setup:
    """An existing run at its newest undamaged checkpoint, or at its beginning if it has none yet.

    Raises ValueError if there is no run, or if `config` is not the same run: model, data, seed and batch size
    must be equal; steps (not below those that are done), schedule, logging, device and the like may change.
    """
    if not is_run(run_dir):
        raise CheckpointError(f"{run_dir}: no run to resume; without resume a new one begins there")
    device = check_settings(config)
    dry_run(config)
    stored = load_config(run_dir / "config.yaml")
    refuse_other_start(config, stored, run_dir)
    refuse_other_text(config, stored, run_dir)
    setup = assemble(config, run_dir, open_source(config, run_dir, prepared=True), device)
    facts = read_manifest(run_dir)
    refuse_other_run(run_dir, facts["identity"], setup.identity)
    folder = checkpoints.newest(run_dir)
    if folder is not None:
        setup.checkpoint = checkpoints.read(folder)
        checkpoints.check_architecture(setup.config, setup.checkpoint)
    step = setup.checkpoint.step if setup.checkpoint else 0
    if config.train.steps < step:
        raise ValueError(
            f"train.steps = {config.train.steps}, but {run_dir} has done {step}; say {step} or more to go on "
            "with it, or start a new run"
        )
    checkpoints.sweep(run_dir, step)
    check_space(run_dir, space(setup), "the run", REMEDY)
    setup.run_id = facts["id"]
    history = [*facts["history"], {"resumed_at_step": step, **facts["machine"]}]
    replace_text(run_dir / "config.yaml", dump_yaml(setup.config))
    replace_text(
        run_dir / "manifest.json", json.dumps({**manifest(setup), "history": history}, indent=1) + "\n"
    )
    tell(console, setup.source.describe())
    tell(console, describe(setup))
    if step == config.train.steps:
        tell(console, f"{run_dir}: complete at step {step}; a higher train.steps goes on with it")
    else:
        tell(console, f"{run_dir}: going on at step {step}")
    if (stored.train.steps, stored.train.schedule) != (config.train.steps, config.train.schedule):
        tell(
            console,
            "train.steps or train.schedule has changed: the learning rate follows the new curve",
        )
    return setup


def assemble(config: RunConfig, run_dir: Path, source: Source, device: torch.device) -> Setup:
    """Builds the model for the data and checks that they fit."""
    config = with_vocabulary(config, source.vocab_size)
    limit = config.model.embedding.max_positions
    if config.model.embedding.positions == "learned" and limit is not None and source.seq_len > limit:
        raise ValueError(
            f"the data has sequences of {source.seq_len} tokens, but the model has learned positions for "
            f"{limit} (model.embedding.max_positions); raise it, shorten the sequences, or use positions "
            "without a limit"
        )
    check_memory(config, device)
    model = build_model(config, seed=config.train.seed, device=device, backend=config.train.backend)
    init_from.freeze(model, config)
    return Setup(config, run_dir, source, model, device, identity(config, source), None, secrets.token_hex(4))


def check_memory(config: RunConfig, device: torch.device) -> None:
    """ValueError if weights, gradients and two moments alone are more than this machine's memory."""
    if device.type != "cpu":
        return
    shapes = build_model(config, weights=False)
    init_from.freeze(shapes, config)
    size = sum((16 if x.requires_grad else 4) * x.numel() for x in shapes.parameters())
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > there:
        raise ValueError(
            f"training this model takes {size / 1e9:,.1f} GB for weights, gradients and moments, and the "
            f"machine has {there / 1e9:,.1f} GB of memory; lower model.d_model or the number of layers"
        )


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keeps every other process from training in this folder; ValueError if one does."""
    with disk(f"cannot open the run's folder {run_dir}"):
        folder = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{run_dir}: another process is training this run; wait for it, or end it"
            ) from None
        yield
    finally:
        os.close(folder)


def identity(config: RunConfig, source: Source) -> dict[str, Any]:
    """What makes two runs the same run: the model, and which examples step n sees."""
    return {
        "architecture": architecture_hash(config),
        "data": source.fingerprint,
        "tokenizer": source.tokenizer.fingerprint if source.tokenizer else None,
        "train.seed": config.train.seed,
        "train.batch_size": config.train.batch_size,
        "train.accumulate": config.train.accumulate,
    }


def manifest(setup: Setup) -> dict[str, Any]:
    """The facts of a run for people and reports."""
    return {
        "format": FORMAT,
        "hybrid_lm": hybrid_lm.__version__,
        "id": setup.run_id,
        "identity": setup.identity,
        "architecture": setup.identity["architecture"],
        "parameters": sum(parameter.numel() for parameter in setup.model.parameters()),
        "frozen_parameters": n_frozen(setup),
        "data": {"fingerprint": setup.source.fingerprint, "description": setup.source.describe()},
        "machine": {
            "device": str(setup.device),
            "device_name": torch.cuda.get_device_name(setup.device)
            if setup.device.type == "cuda"
            else platform.machine(),
            "backends": dict(setup.model.backends),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "platform": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "history": [],
    }


def check_settings(config: RunConfig) -> torch.device:
    """Finds what is wrong with the settings before any work; returns the device.

    Raises ValueError naming the key.
    """
    c = config.train
    if c.stop_at_accuracy is not None:
        if isinstance(config.data, TextData):
            raise ValueError(
                "train.stop_at_accuracy: text has no accuracy to stop at; use it with data.kind: probe"
            )
        if c.eval_every_steps is None:
            raise ValueError("train.stop_at_accuracy needs train.eval_every_steps: how often to look")
    if c.wandb.mode != "off" and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "train.wandb.mode: wandb is not installed; pip install 'hybrid_lm[wandb]', or mode: off"
        )
    device = pick_device(c.device)
    backends.select(c.backend, device.type)
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    if c.compile and device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        raise ValueError(
            "train.compile: torch.compile needs a C++ compiler on a CPU; install g++, or set it to false"
        )
    return device


def pick_device(name: str) -> torch.device:
    """`auto`: cuda if there is one, else cpu; otherwise what is named.

    Raises ValueError if it is not a device or not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(
            f"train.device = {name}: not a torch device; use auto, cpu, cuda, cuda:1 or mps"
        ) from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = counts.get(device.type, 0)
    if (device.index or 0) >= count:
        here = ", ".join(kind for kind, n in counts.items() if n)
        raise ValueError(f"train.device = {name}: there is no such device here; there is: {here}")
    return device


def space(setup: Setup) -> int:
    """Bytes that the run's checkpoints will take: weights, and two moments of those that are trained; `keep`
    of them and the one being written.
    """
    sizes = [(3 if x.requires_grad else 1) * x.numel() * x.element_size() for x in setup.model.parameters()]
    size = sum(sizes)
    c = setup.config.train
    n = 1 if c.save_every_steps is None else min(c.keep, c.steps // c.save_every_steps) + 1
    # The metrics, and what else is written beside.
    return int(1.1 * size * n) + 4_000_000


def is_run(path: Path) -> bool:
    """Whether a folder is a run's."""
    return (path / "config.yaml").is_file() and (path / "manifest.json").is_file()


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """The run's manifest.json.

    Raises CheckpointError if it is damaged or of another format.
    """
    path = run_dir / "manifest.json"
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: missing or damaged ({error})") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}, this version reads format {FORMAT}")
    return facts


def read_data(config: RunConfig, folder: Path, console: Console) -> Source:
    """Opens the data, telling that text is being prepared."""
    if isinstance(config.data, TextData) and not is_store(config.data.path):
        tell(console, f"reading {config.data.path}")
    source = open_source(config, folder)
    tell(console, source.describe())
    return source


def describe(setup: Setup) -> str:
    """One line about the model and where it runs."""
    by_backend: dict[str, list[str]] = {}
    for op, backend in setup.model.backends.items():
        by_backend.setdefault(backend, []).append(op)
    chosen = next(iter(by_backend)) if len(by_backend) == 1 else ""
    parts = chosen or "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in by_backend.items())
    n, frozen = sum(parameter.numel() for parameter in setup.model.parameters()), n_frozen(setup)
    told = f" ({frozen:,} of them frozen)" if frozen else ""
    return f"{n:,} parameters{told} on {setup.device}, backend {parts}"


def n_frozen(setup: Setup) -> int:
    """Numbers in the parameters at the places of `init_from.freeze`."""
    wanted = setup.config.init_from
    names = init_from.frozen(setup.config.model, wanted.freeze) if wanted else []
    sizes = {entry.name: entry.parameter.numel() for entry in entries(setup.model)}
    return sum(sizes[name] for name in names)


def tell(console: Console, text: str) -> None:
    """One line as it is: no markup, no colours, no wrapping."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def refuse_existing(run_dir: Path, overwrite: bool) -> None:
    """ValueError if a new run may not be put at `run_dir`."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ValueError(f"{run_dir}: a file is in the way; a run is a folder")
    if not run_dir.is_dir() or not any(run_dir.iterdir()):
        return
    if not is_run(run_dir):
        raise ValueError(f"{run_dir}: the folder is not empty and no run; choose another place")
    if not overwrite:
        raise ValueError(
            f"{run_dir}: a run is already there; say resume to go on with it, or overwrite to replace it"
        )


def refuse_other_text(config: RunConfig, stored: RunConfig, run_dir: Path) -> None:
    """ValueError if the text is another one: a run goes on with its own copy and would not see it."""
    new, old, copy = config.data, stored.data, run_dir / "data"
    if not isinstance(new, TextData) or not isinstance(old, TextData):
        return
    back = "a run goes on with the data it began with: put it back, or start a new run"
    if is_store(new.path):
        # A store may have moved. Without a copy of the run's own, the new one is what is opened and compared.
        if is_store(copy) and TokenStore.open(new.path).fingerprint != TokenStore.open(copy).fingerprint:
            raise ValueError(
                f"data.path was {old.path} and is {new.path} now, a token store of something else; {back}"
            )
        return
    for key in ("path", "tokenizer"):
        if getattr(new, key) != getattr(old, key):
            raise ValueError(f"data.{key} was {getattr(old, key)} and is {getattr(new, key)} now; {back}")


def refuse_other_start(config: RunConfig, stored: RunConfig, run_dir: Path) -> None:
    """ValueError if the run began from another model. What is frozen may change."""
    new, old = ((c.init_from.path, c.init_from.replace) if c.init_from else None for c in (config, stored))
    if new != old:
        was, now = (" ".join(map(str, x)) if x else "null" for x in (old, new))
        raise ValueError(f"{run_dir}: init_from was {was} and is {now} now; put it back, or start a new run")


def refuse_other_run(run_dir: Path, stored: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """ValueError naming the first thing in which two runs are not the same run."""
    for key, value in ours.items():
        if stored.get(key) != value:
            was, now = (f"{x:.12}" if isinstance(x, str) else x for x in (stored.get(key), value))
            raise ValueError(
                f"{run_dir}: {key} has changed since this run began (was {was}, is {now}); resume with the "
                "run's own config.yaml, or start a new run"
            )
