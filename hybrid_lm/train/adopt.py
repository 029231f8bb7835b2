"""A run made of a model that comes from elsewhere: its weights are the checkpoint of step 0."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console

from hybrid_lm.config.load import architecture_hash, dump_yaml
from hybrid_lm.config.schema import RunConfig
from hybrid_lm.files import disk, new_folder, replace_text
from hybrid_lm.model.build import with_vocabulary
from hybrid_lm.model.lm import HybridLM
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import optim
from hybrid_lm.train.loop import Counters
from hybrid_lm.train.run import (
    Setup,
    check_settings,
    describe,
    identity,
    manifest,
    read_data,
    refuse_existing,
    tell,
)
from hybrid_lm.train.source import open_source


def adopt(
    model: HybridLM,
    config: RunConfig,
    run_dir: Path,
    *,
    overwrite: bool,
    console: Console,
    more: Callable[[Path], None] = lambda folder: None,
) -> Setup:
    """A run of `model` on the data of `config`, with no step done: `train --resume`, `eval`, `generate` and
    `export` take it. The weights are stored in the types that they have.

    more: writes what else belongs into the run's folder.

    Raises ValueError if `config.model` is another architecture, and for data that does not fit; then no file
    has changed.
    """
    refuse_existing(run_dir, overwrite)
    if config.init_from is not None:
        raise ValueError("init_from: an import is the model as it is; `hybrid-lm train` starts from one")
    if architecture_hash(config) != architecture_hash(model.config):
        raise ValueError("model: the architecture is that of the weights; take out what changes it")
    device = check_settings(config)
    cannot = f"cannot write the run's folder {run_dir}"
    with new_folder(run_dir, cannot) as new:
        source = read_data(config, new, console)
        if source.vocab_size > (config.model.vocab_size or 0):
            raise ValueError(
                f"data.tokenizer has {source.vocab_size} entries, the model {config.model.vocab_size}; use "
                "the one that the model was trained with"
            )
        config = with_vocabulary(config, source.vocab_size)
        facts = identity(config, source)
        setup = Setup(config, run_dir, source, model, device, facts, None, secrets.token_hex(4))
        replace_text(new / "config.yaml", dump_yaml(config))
        replace_text(new / "manifest.json", json.dumps(manifest(setup), indent=1) + "\n")
        if source.tokenizer is not None:
            with disk(cannot):
                source.tokenizer.save(new / "tokenizer")
        state = {
            "identity": facts,
            "optimizer": optim.implementation(torch.device(device)),
            "counters": asdict(Counters()),
        }
        # Without moments: the optimizer starts afresh.
        checkpoints.save(new, 0, checkpoints.weights(model), {}, state, keep=config.train.keep)
        with disk(cannot):
            more(new)
    tell(console, describe(setup))
    setup.source = open_source(config, run_dir, prepared=True)
    return setup
