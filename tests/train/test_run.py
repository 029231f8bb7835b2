"""What is wrong is found before the first step, and nothing on disk is lost without being asked."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple

import pytest
import torch

from hybrid_lm.config.load import config_names, load_config
from hybrid_lm.config.schema import TokenizerConfig
from hybrid_lm.data import prepare
from hybrid_lm.files import DiskError
from hybrid_lm.train import loop
from hybrid_lm.train import run as runs
from hybrid_lm.train.checkpoint import CheckpointError
from hybrid_lm.train.dry_run import dry_run
from hybrid_lm.train.loop import train

BOGUS = "model.layers.f.per_call={lora: {rank: 2, 'on': [bogus]}}"


def snapshot(folder):
    """Every file below a folder with its bytes."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def done(make_config, tmp_path, quiet):
    """A finished run of two steps."""
    train(make_config("train.steps=2"), tmp_path / "runs" / "one", console=quiet)
    return tmp_path / "runs" / "one"


def test_a_run_is_one_folder_that_says_what_it_is(done):
    names = sorted(path.name for path in done.iterdir())
    assert names == ["checkpoints", "config.yaml", "data", "manifest.json", "metrics.jsonl", "tokenizer"]
    assert sorted(path.name for path in done.parent.iterdir()) == ["one"]
    assert load_config(done / "config.yaml").model.vocab_size == 258
    facts = json.loads((done / "manifest.json").read_text())
    assert facts["parameters"] == sum(
        x.numel() for x in runs.build_model(load_config(done / "config.yaml")).parameters()
    )
    assert facts["machine"]["torch"] == torch.__version__
    assert facts["machine"]["backends"]["ssd"] in ("torch", "native")
    assert facts["data"]["fingerprint"] == facts["identity"]["data"]


def test_an_existing_run_needs_resume_or_overwrite(done, make_config, tmp_path, quiet):
    before = snapshot(done)
    with pytest.raises(ValueError, match="a run is already there; say resume to go on with it, or overwrite"):
        train(make_config(), done, console=quiet)
    with pytest.raises(ValueError, match="say one of them"):
        train(make_config(), done, resume=True, overwrite=True, console=quiet)
    assert snapshot(done) == before
    result = train(make_config("train.steps=1"), done, overwrite=True, console=quiet)
    assert result.step == 1
    assert sorted(path.name for path in (done / "checkpoints").iterdir()) == ["step-00000001"]
    assert sorted(path.name for path in done.parent.iterdir()) == ["one"]


def test_a_folder_of_something_else_is_never_replaced(make_config, tmp_path, quiet):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="not empty and no run; choose another place"):
            train(make_config(), tmp_path / "thesis", overwrite=overwrite, console=quiet)
    with pytest.raises(ValueError, match="a file is in the way"):
        train(make_config(), tmp_path / "thesis" / "chapter.txt", console=quiet)
    (tmp_path / "empty").mkdir()
    assert train(make_config("train.steps=1"), tmp_path / "empty", console=quiet).step == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=/no/such/text"], "/no/such/text"),
        (["data.seq_len=100000"], "use a seq_len of at most"),
        (["model.vocab_size=100"], r"model\.vocab_size = 100, but the data has 258"),
        (["train.device=gpu"], r"train\.device = gpu: not a torch device"),
        (["train.device=xpu:3"], r"train\.device = xpu:3: there is no such device here; there is: cpu"),
        (["train.backend=mamba_ssm"], "backend 'mamba_ssm' cannot run on cpu"),
        (["train.stop_at_accuracy=0.9"], r"train\.stop_at_accuracy: text has no accuracy"),
    ],
)
def test_faults_are_found_before_anything_is_written_or_replaced(
    done, make_config, quiet, overrides, message
):
    before = snapshot(done.parent)
    config = make_config(*overrides)
    with pytest.raises(ValueError, match=message):
        train(config, done.parent / "two", console=quiet)
    with pytest.raises(ValueError, match=message):
        train(config, done, overwrite=True, console=quiet)
    assert snapshot(done.parent) == before


@pytest.mark.parametrize(
    ("pattern", "overrides", "message"),
    [
        ("m f", ["model.layers.f.share=true", BOGUS], "no matrix 'bogus' in MLP; there are gate_proj"),
        ("a+m", ["model.layers.m.residual={norm: layernorm}"], "a and m have different `residual` settings"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_before_data_is_read(
    done, make_config, quiet, monkeypatch, pattern, overrides, message
):
    config = make_config("data.tokenizer={kind: bpe, vocab_size: 300}", *overrides, pattern=pattern)
    monkeypatch.setattr(runs, "open_source", lambda *args, **kwargs: pytest.fail("the data was read"))
    before = snapshot(done.parent)
    for out, how in ((done.parent / "two", {}), (done, {"overwrite": True}), (done, {"resume": True})):
        with pytest.raises(ValueError, match=message):
            train(config, out, **how, console=quiet)
    assert snapshot(done.parent) == before


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, TypeError])
def test_a_layer_that_fails_when_it_runs_is_named_before_data_is_read(make_config, tmp_path, quiet, kind):
    from hybrid_lm.layers.mlp import MLP

    def forward(self, x, state, ctx):
        raise kind("shapes do not match")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MLP, "forward", forward)
        with pytest.raises(ValueError, match=r"model\.pattern, layer 1 \(f\): shapes do not match"):
            train(make_config("data.path=/no/such/text"), tmp_path / "run", console=quiet)


def test_a_layer_that_looks_at_values_is_not_refused(make_config, tmp_path, quiet, monkeypatch):
    from hybrid_lm.layers.mlp import MLP

    forward = MLP.forward

    def curious(self, x, state, ctx):
        assert float(x.detach().abs().max()) >= 0
        return forward(self, x, state, ctx)

    monkeypatch.setattr(MLP, "forward", curious)
    assert train(make_config("train.steps=1"), tmp_path / "run", console=quiet).step == 1


@pytest.mark.parametrize("name", config_names())
def test_every_shipped_configuration_passes(name):
    dry_run(load_config(name))


def test_a_probe_longer_than_the_learned_positions(make_probe, tmp_path, quiet):
    learned = ("model.embedding.positions=learned", "model.embedding.max_positions=16")
    with pytest.raises(
        ValueError, match="sequences of 32 tokens, but the model has learned positions for 16"
    ):
        train(make_probe(*learned), tmp_path / "run", console=quiet)
    assert not (tmp_path / "run").exists()


def test_stopping_at_an_accuracy_needs_validations(make_probe, tmp_path, quiet):
    with pytest.raises(ValueError, match=r"needs train\.eval_every_steps"):
        train(make_probe("train.stop_at_accuracy=0.9"), tmp_path / "run", console=quiet)


def test_a_missing_wandb_is_told_first(make_config, tmp_path, quiet, monkeypatch):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hybrid_lm\[wandb\]', or mode: off"):
        train(make_config("train.wandb.mode=offline"), tmp_path / "run", console=quiet)


def test_a_disk_without_room_or_permission_is_told_first(make_config, tmp_path, quiet, monkeypatch):
    with pytest.raises(DiskError, match=r"cannot write the run's folder /dev/null/run: Not a directory"):
        train(make_config(), "/dev/null/run", console=quiet)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DiskError, match=r"the run needs 4\.[0-9] MB and 0\.0 MB are free; make room"):
        train(make_config(), tmp_path / "run", console=quiet)
    assert not list(tmp_path.glob("*run*"))


def test_resume_without_a_run_and_of_another_run(done, make_config, text, tmp_path, quiet):
    with pytest.raises(CheckpointError, match="no run to resume"):
        train(make_config(), tmp_path / "nowhere", resume=True, console=quiet)
    before = snapshot(done)
    changes = {
        "architecture has changed": make_config("model.layers.f.d_ff=64"),
        "data has changed": make_config("data.seq_len=8"),
        r"train\.batch_size has changed since this run began \(was 2, is 4\)": make_config(
            "train.batch_size=4"
        ),
        r"train\.seed has changed": make_config("train.seed=3"),
        r"data\.path was .*text and is stdlib now": make_config("data.path=stdlib"),
    }
    for message, config in changes.items():
        with pytest.raises(ValueError, match=message):
            train(config, done, resume=True, console=quiet)
    assert snapshot(done) == before
    # The text itself may be gone or changed: the run has its own copy.
    shutil.rmtree(text)
    assert train(make_config("train.steps=3"), done, resume=True, console=quiet).step == 3


def test_a_store_of_other_text_is_refused_and_one_of_the_same_is_not(
    done, make_config, text, tmp_path, quiet
):
    same = prepare(text, tmp_path / "same", TokenizerConfig())
    (text / "more.txt").write_text("something else\n" * 40)
    prepare(text, tmp_path / "other", TokenizerConfig())
    before = snapshot(done)
    other = make_config("train.steps=3", f"data.path={tmp_path / 'other'}")
    with pytest.raises(ValueError, match=r"data\.path was .*text and is .*other now, a token store of some"):
        train(other, done, resume=True, console=quiet)
    assert snapshot(done) == before
    moved = make_config("train.steps=3", f"data.path={same.folder}")
    assert train(moved, done, resume=True, console=quiet).step == 3
    # The same for a run that began with a store and has no copy.
    train(moved, tmp_path / "direct", console=quiet)
    with pytest.raises(ValueError, match="data has changed since this run began"):
        train(other, tmp_path / "direct", resume=True, console=quiet)


def test_fewer_steps_than_are_done_are_refused(done, make_config, quiet):
    before = snapshot(done)
    with pytest.raises(ValueError, match=r"train\.steps = 1, but .* has done 2; say 2 or more to go on"):
        train(make_config("train.steps=1"), done, resume=True, console=quiet)
    assert snapshot(done) == before


def test_a_run_without_a_checkpoint_begins_again(make_config, tmp_path, quiet, monkeypatch):
    def crash(*args):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "fit", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(make_config("train.steps=2"), tmp_path / "run", console=quiet)
    result = train(make_config("train.steps=2"), tmp_path / "run", resume=True, console=quiet)
    assert result.step == 2


def test_a_run_goes_where_a_link_points(make_config, tmp_path, quiet):
    (tmp_path / "big").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "big" / "run")
    (tmp_path / "big" / "run").mkdir()
    train(make_config("train.steps=1"), tmp_path / "link", console=quiet)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "big" / "run" / "manifest.json").is_file()
