"""A checkpoint becomes a run that every verb takes, and goes out again as it came."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from native_models import CONFIGS, native
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_lm.cli import main
from hybrid_lm.data.tokenizer import train_bpe
from hybrid_lm.hf import convert
from hybrid_lm.hf.verify import verify_object
from hybrid_lm.train.checkpoint import load_run


@pytest.fixture
def here(monkeypatch):
    """Folders are compared in this process: another one takes seconds to import transformers."""

    def verify(folder, model, **how):
        return verify_object(AutoModelForCausalLM.from_pretrained(folder), model, **how)

    monkeypatch.setattr(convert, "verify", verify)


@pytest.fixture
def checkpoint(tmp_path):
    """A bfloat16 model with a tokenizer and settings for generation, and some text."""
    words = Path(os.__file__).read_text(encoding="utf-8")[:20_000]
    (tmp_path / "text.txt").write_text(words, encoding="utf-8")
    tokenizer = train_bpe([words], 300)
    options = {**CONFIGS["llama"][0], "vocab_size": 300, "tie_word_embeddings": False}
    model = native("llama", {**options, "eos_token_id": tokenizer.eot_id, "bos_token_id": 7})
    model.generation_config.do_sample, model.generation_config.top_k = True, 5
    model.to(torch.bfloat16).save_pretrained(tmp_path / "in")
    hf = tokenizer.to_hf(128)
    # As most published ones: specials in a text are specials.
    hf.init_kwargs["split_special_tokens"] = hf.split_special_tokens = False
    hf.save_pretrained(tmp_path / "in")
    return tmp_path


def test_in_train_eval_generate_and_out(checkpoint, here, capsys):
    run, text = str(checkpoint / "run"), f"data.path={checkpoint / 'text.txt'}"
    assert main(["import", str(checkpoint / "in"), "--out", run, text, "data.seq_len=32"]) == 0
    assert "greedy tokens the same" in capsys.readouterr().out
    stored = load_file(checkpoint / "run/checkpoints/step-00000000/model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    # Untouched, it goes out as it came, bit for bit.
    assert main(["export", run, "--out", str(checkpoint / "out")]) == 0
    assert "exported as native:llama" in capsys.readouterr().out
    before, after = (load_file(checkpoint / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    assert {x.dtype for x in after.values()} == {torch.bfloat16}
    assert all(torch.equal(x, after[key]) for key, x in before.items())
    config = json.loads((checkpoint / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (7, 0)
    assert config["max_position_embeddings"] == 128
    assert json.loads((checkpoint / "out/generation_config.json").read_text())["top_k"] == 5
    before, after = (AutoTokenizer.from_pretrained(checkpoint / name) for name in ("in", "out"))
    assert after.model_max_length == 128
    assert after.init_kwargs.keys() == before.init_kwargs.keys()
    # Text with a special in it is the same tokens.
    text = f"a{before.eos_token}b  c"
    assert after(text).input_ids == before(text).input_ids
    assert before.eos_token_id in after(text).input_ids
    # It is a run like any other.
    assert main(["eval", run, "--max-bytes", "2000"]) == 0
    assert main(["generate", run, "--prompt", "def ", "--max-new-tokens", "3"]) == 0
    assert main(["train", run, "--resume", "train.steps=2", "train.eval_batches=1"]) == 0
    assert load_run(run).step == 2
    assert main(["export", run, "--out", str(checkpoint / "trained")]) == 0
    assert AutoModelForCausalLM.from_pretrained(checkpoint / "trained").dtype == torch.float32


def test_mistakes_are_one_message(checkpoint, here, capsys):
    folder, out = str(checkpoint / "in"), str(checkpoint / "run")
    for words, message in (
        ([str(checkpoint / "none")], "none: not a model folder or hub name that loads"),
        ([folder, "model.block.eps=0.5"], "the architecture is that of the weights"),
        ([folder, "data.pth=x"], "data.pth"),
    ):
        assert main(["import", *words, "--out", out]) == 2
        assert message in capsys.readouterr().err
    for path in (checkpoint / "in").glob("*token*"):
        path.unlink()
    assert main(["import", folder, "--out", out]) == 2
    assert "no tokenizer; a run needs one for its data" in capsys.readouterr().err
    assert not (checkpoint / "run").exists()
