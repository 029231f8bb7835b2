"""Training goes on from a Hugging Face checkpoint at the loss that it has there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from native_models import CONFIGS, native
from rich.console import Console
from transformers import AutoModelForCausalLM

from hybrid_lm.cli import main
from hybrid_lm.config.load import ConfigError, parse_config
from hybrid_lm.data.tokenizer import train_bpe
from hybrid_lm.hf import convert
from hybrid_lm.hf.origin import origin
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train.checkpoint import load_run
from hybrid_lm.train.log import read_metrics
from hybrid_lm.train.loop import train
from hybrid_lm.train.source import open_source

BOUND = 1e-5
"""Relative. A loss moves by at most twice what logits do, 4e-5, and theirs are about ln 300 = 5.7."""


@pytest.fixture(autouse=True)
def here(monkeypatch):
    """Folders are compared in this process: another one takes seconds to import transformers."""

    def verify(folder, model, **how):
        return verify_object(AutoModelForCausalLM.from_pretrained(folder), model, **how)

    monkeypatch.setattr(convert, "verify", verify)


def save(name: str, folder: Path) -> Path:
    """A tiny checkpoint of a family with a tokenizer, and text beside it."""
    words = Path(os.__file__).read_text(encoding="utf-8")[:20_000]
    (folder / "text.txt").write_text(words, encoding="utf-8")
    tokenizer = train_bpe([words], 300)
    options = {**CONFIGS[name][0], "vocab_size": 300, "eos_token_id": tokenizer.eot_id}
    native(name, options).save_pretrained(folder / "in")
    tokenizer.to_hf(96).save_pretrained(folder / "in")
    return folder / "in"


def settings(folder: Path, **more) -> dict:
    return {
        "init_from": {"path": str(folder / "in"), **more.pop("init", {})},
        "data": {"kind": "text", "path": str(folder / "text.txt"), "seq_len": 48, "packing": "concat"},
        "train": {"steps": 1, "batch_size": 4, "log_every_steps": 1, "eval_batches": 1, "device": "cpu"},
        **more,
    }


# One of attention, of Mamba and of both; their losses have dropout in training, which is taken out.
@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba2", "jamba"])
def test_training_starts_at_the_loss_of_the_native_model(name, tmp_path):
    folder = save(name, tmp_path)
    config = parse_config(settings(tmp_path))
    assert config.data.tokenizer.path == str(folder)
    calm = {
        key: {**recipe.model_dump(), "dropout": 0.0}
        for key, recipe in config.model.layers.items()
        if "dropout" in recipe.options
    }
    model = {"layers": calm, "block": {"dropout": 0.0}, "embedding": {"dropout": 0.0}}
    config = parse_config(settings(tmp_path, model=model))
    train(config, tmp_path / "run", console=Console(quiet=True))
    (record,) = (r for r in read_metrics(tmp_path / "run") if r["kind"] == "train")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    batch = open_source(config, tmp_path / "run", prepared=True).batch(0, 0)
    tokens, labels = (torch.as_tensor(x.astype("int64")) for x in (batch.tokens, batch.labels))
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(theirs(tokens).logits.flatten(0, 1), labels.flatten())
    assert abs(record["loss"] - float(loss)) <= BOUND * float(loss)


def test_attention_of_a_llama_becomes_mamba(tmp_path):
    folder = save("llama", tmp_path)
    mamba = {"type": "mamba2", "d_state": 8, "head_dim": 16}
    init = {"replace": {"a": "m"}, "freeze": ["embed", "f", "final_norm"]}
    config = parse_config(settings(tmp_path, init=init, model={"layers": {"m": mamba}}))
    assert config.model.pattern == "(m f)x3"
    train(config, tmp_path / "run", console=Console(quiet=True))
    first, last = (checkpoints.read(path).model for path in checkpoints.step_folders(tmp_path / "run"))
    theirs = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for stored in (first, last):
        assert torch.equal(stored["embed.weight"], theirs["model.embed_tokens.weight"])
        gate = theirs["model.layers.1.mlp.gate_proj.weight"]
        assert torch.equal(stored["layers.3.layer.gate_proj.weight"], gate)
    assert not torch.equal(first["layers.0.layer.in_proj.weight"], last["layers.0.layer.in_proj.weight"])
    # An export of it knows the ids of the checkpoint.
    assert origin(load_run(tmp_path / "run")).ids["eos_token_id"] == 0


def test_what_a_folder_holds_is_shown_and_what_it_lacks_is_told(tmp_path, capsys):
    folder = save("llama", tmp_path)
    assert main(["show", str(folder)]) == 0
    assert "pattern  (a f)x3" in capsys.readouterr().out
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ConfigError, match=r"data\.tokenizer: missing, and the imported model has none"):
        parse_config(settings(tmp_path))
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match=r"init_from\.path = .* has the model_type 'bert'; from_hf reads"):
        parse_config(settings(tmp_path))
