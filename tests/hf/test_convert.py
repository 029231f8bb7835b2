"""What is saved is what is loaded: by our classes, by remote code in another process, through a pipeline."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hf_models import HYBRID, PARALLEL, RECURRENT, WHOLE, ZAMBA, bound, build, examples
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM, pipeline

import hybrid_lm
from hybrid_lm.config.dump import architecture_hash
from hybrid_lm.data.tokenizer import ByteTokenizer, train_bpe
from hybrid_lm.files import DiskError
from hybrid_lm.hf import convert, verify
from hybrid_lm.hf.bundle import bundle
from hybrid_lm.hf.convert import export, from_hf, to_hf
from hybrid_lm.registry import table

ALL = {**examples(), **WHOLE}


@pytest.mark.parametrize("name", list(ALL))
def test_save_and_load_is_exact(name, tmp_path):
    model = build(ALL[name])
    to_hf(model, format="remote").save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert "Infinity" not in (tmp_path / "config.json").read_text()
    assert architecture_hash(loaded.model.config) == architecture_hash(model.config)
    x = torch.randint(61, (2, 12))
    with torch.no_grad():
        # With a cache the sums of decays begin a token earlier, at a state of zeros, and round otherwise.
        assert torch.equal(loaded(x, use_cache=False).logits, model(x).logits)
        assert torch.equal(from_hf(tmp_path)(x).logits, model(x).logits)


REMOTE = """
import json, sys
for name in ("hybrid_lm", "pydantic", "einops"):
    sys.modules[name] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
work, names = sys.argv[1], json.loads(sys.argv[2])
tokens, found = load_file(work + "/in.safetensors")["x"], {}
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{work}/{name}", trust_remote_code=True).eval()
    found[name] = model(tokens).logits.detach()
    how = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None}
    new = model.generate(tokens[:, :5], attention_mask=torch.ones(2, 5), **how)
    found[name + ".new"] = new
    model.train()(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.save_pretrained(f"{work}/{name}-again")
save_file(found, work + "/out.safetensors")
"""


def test_remote_code_runs_without_us(tmp_path, monkeypatch):
    # One process for all of them: their operators must not get in each other's way either.
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr(convert, "verify", lambda folder, model: {})
    # Folders name modules, and modules operators, which torch wants to be ASCII.
    models = {"hybrid": build(HYBRID), "ëxport": build(ZAMBA), "äxport": build(PARALLEL)}
    for name, model in models.items():
        export(model, tmp_path / name)
    x = torch.randint(61, (2, 20))
    save_file({"x": x}, tmp_path / "in.safetensors")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    command = [sys.executable, "-I", "-c", REMOTE, str(tmp_path), json.dumps(list(models))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "out.safetensors")
    for name, model in models.items():
        with torch.no_grad():
            ours = model(x).logits
            assert (found[name] - ours).abs().max() <= bound(ours)
            again = from_hf(tmp_path / f"{name}-again")
            assert torch.equal(again(x).logits, ours)
        greedy = to_hf(model).generate(
            x[:, :5], attention_mask=torch.ones(2, 5), do_sample=False, max_new_tokens=6, eos_token_id=None
        )
        assert torch.equal(found[f"{name}.new"], greedy)


def test_export_is_whole_checked_and_speaks_text(tmp_path):
    tokenizer = ByteTokenizer()
    model = build(HYBRID, vocab_size=tokenizer.vocab_size)
    out = export(
        model, tmp_path / "deep" / "model", tokenizer=tokenizer, dtype=torch.bfloat16, max_length=128
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["model"]
    assert model.embed.weight.dtype == torch.float32, "the user's model is left as it was"
    record = json.loads((out / "hybrid_lm_export.json").read_text())
    assert record["dtype"] == "bfloat16"
    assert record["architecture_sha256"] == architecture_hash(model.config)
    assert record["check"]["max_abs_logit_difference"] <= record["check"]["bound"]
    card = (out / "README.md").read_text()
    assert "(m f a f) m f w f" in card or "m f a f m f w f" in card
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in card
    text = AutoTokenizer.from_pretrained(out)
    assert text("déf")["input_ids"] == list("déf".encode())
    assert (text.model_max_length, text.pad_token_id, text.eos_token_id) == (128, 257, 256)
    spoken = pipeline("text-generation", model=AutoModelForCausalLM.from_pretrained(out), tokenizer=text)
    one, two = spoken(["def f(", "import os, sys"], max_new_tokens=6, do_sample=False, batch_size=2)
    assert one[0]["generated_text"].startswith("def f(")
    assert two[0]["generated_text"].startswith("import os, sys")


def test_a_folder_that_is_no_export_is_never_replaced(tmp_path):
    model, out = build(RECURRENT), tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty and no export; choose another folder"):
            export(model, out, overwrite=overwrite)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "thesis",
        "thesis/chapter.txt",
    ]


def test_export_overwrites_only_when_asked_and_leaves_nothing_when_it_fails(tmp_path, monkeypatch):
    model, out = build(RECURRENT), tmp_path / "model"
    out.mkdir()
    monkeypatch.setattr(convert, "verify", lambda folder, model: {})
    export(model, out)
    with pytest.raises(ValueError, match="an export is already there; choose another folder, or say overwr"):
        export(model, out)
    (out / "note.txt").write_text("from the first export")

    def broken(folder, model, **how):
        assert (folder / "model.safetensors").exists()
        raise verify.VerificationError("the export is not the model")

    monkeypatch.setattr(convert, "verify", broken)
    with pytest.raises(ValueError, match="not the model"):
        export(model, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (out / "note.txt").exists()
    monkeypatch.setattr(convert, "verify", lambda folder, model: {})
    export(model, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (out / "note.txt").exists()


@contextmanager
def files_of_at_most(n_bytes):
    """The kernel refuses to let a file grow past the limit, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# The first that does not fit: the configuration, the weights.
@pytest.mark.parametrize("limit", [1_000, 15_000])
def test_a_full_disk_is_one_message(limit, tmp_path):
    model = build(RECURRENT)
    with (
        files_of_at_most(limit),
        pytest.raises(DiskError, match=rf"^cannot write {tmp_path}/model: .*File too large"),
    ):
        export(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_disk_too_full_for_a_tokenizer_or_for_the_check_is_one_too(tmp_path):
    tokenizer = train_bpe(["some words"], 300)
    for call in (
        lambda: tokenizer.to_hf(100).save_pretrained(tmp_path),
        lambda: verify.run_child(tmp_path, torch.zeros(100, 100), torch.float32, 1, 1),
    ):
        with (
            files_of_at_most(1_000),
            pytest.raises(DiskError, match=r"^cannot write .*File too large"),
            verify.disk_and_rust("cannot write it"),
        ):
            call()
    with pytest.raises(ZeroDivisionError), verify.disk_and_rust("cannot write it"):
        raise ZeroDivisionError


WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
from hybrid_lm import build_model, from_hf, to_hf
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.hf.convert import export
layers = {"f": {"type": "mlp", "d_ff": 8}}
model = build_model(ModelConfig(d_model=8, vocab_size=8, pattern="f", layers=layers))
for call in (lambda: to_hf(model), lambda: from_hf("x"), lambda: export(model, "out")):
    try:
        call()
    except ValueError as error:
        print(error)
"""


def test_without_transformers_it_says_how_to_get_it(tmp_path):
    root = str(Path(hybrid_lm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.endswith("the package transformers: pip install 'hybrid_lm[hf]'") for line in lines)
    assert not list(tmp_path.iterdir())


def test_a_file_is_never_replaced(tmp_path):
    model, out = build(RECURRENT), tmp_path
    (out / "README.md").write_text("mine")
    with pytest.raises(ValueError, match="is a file"):
        export(model, out / "README.md")


def test_verification_finds_a_wrong_weight_and_code_that_does_not_load(tmp_path, monkeypatch):
    model, out = build(RECURRENT), tmp_path / "model"
    monkeypatch.setattr(convert, "verify", lambda folder, model: {})
    export(model, out)

    def off_by_a_little(folder, tokens, dtype, prompt, new, **how):
        logits = model(tokens).logits
        return {"logits": logits * 1.001, "new": tokens[:, : prompt + new]}

    monkeypatch.setattr(verify, "run_child", off_by_a_little)
    with pytest.raises(ValueError, match="logits differ"):
        verify.verify(out, model)

    def wrong_words(folder, tokens, dtype, prompt, new, **how):
        return {"logits": model(tokens).logits, "new": tokens[:, : prompt + new]}

    monkeypatch.setattr(verify, "run_child", wrong_words)
    with pytest.raises(ValueError, match="generates something else"):
        verify.verify(out, model)
    monkeypatch.undo()
    (out / "configuration_hybrid_lm.py").write_text("import hybrid_lm\n")
    with pytest.raises(ValueError, match="does not load"):
        verify.verify(out, model)


def test_the_bundle_is_the_same_every_time_and_holds_only_what_it_needs():
    small, again = bundle(["mlp", "attention"]), bundle(["attention", "mlp", "mlp"])
    assert small == again
    assert all(
        "hybrid_lm." not in line for text in small.values() for line in text.split("\n") if "import " in line
    )
    assert "class Mamba" not in small["modeling_hybrid_lm.py"]
    assert "pydantic" not in {
        line.split(" ")[1] for text in small.values() for line in text.split("\n") if " import " in line
    }
    for text in bundle(list(table("layer"))).values():
        compile(text, "bundle", "exec")


def test_from_hf_names_what_it_reads(tmp_path):
    sizes = {"hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = OPTForCausalLM(
        OPTConfig(vocab_size=11, word_embed_proj_dim=8, max_position_embeddings=8, **sizes)
    )
    with pytest.raises(ValueError, match="'opt'; from_hf reads: hybrid_lm"):
        from_hf(model)
    model.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="from_hf reads: hybrid_lm"):
        from_hf(tmp_path / "gpt2")
    with pytest.raises(ValueError, match="not a model folder or hub name that loads"):
        from_hf(tmp_path / "missing")


def test_a_tokenizer_must_fit():
    with pytest.raises(ValueError, match="258 entries, the model 61"):
        to_hf(build(RECURRENT), ByteTokenizer())
