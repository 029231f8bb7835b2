"""Training from an imported model: weights that are taken over, that start afresh, and that are frozen."""

from __future__ import annotations

import io
import json
import shutil

import pytest
import torch
from rich.console import Console

from hybrid_lm.config.load import ConfigError, load_config, parse_config
from hybrid_lm.data import ByteTokenizer
from hybrid_lm.model.build import build_model
from hybrid_lm.train import checkpoint as checkpoints
from hybrid_lm.train import init_from
from hybrid_lm.train.adopt import adopt
from hybrid_lm.train.checkpoint import load_run
from hybrid_lm.train.loop import train

MAMBA = {"type": "mamba2", "d_state": 8, "head_dim": 16, "chunk": 8}


@pytest.fixture
def base(make_config, tmp_path, quiet):
    """A run of three steps: a Transformer of two blocks, untied."""
    config = make_config("train.steps=3", "model.embedding.tied=false", pattern="a f a f")
    train(config, tmp_path / "base", console=quiet)
    return tmp_path / "base"


@pytest.fixture
def make(base, text):
    """A configuration that starts from `base`, changed by overrides."""

    def make_from(*overrides, model=None, **init):
        data = {
            "init_from": {"path": str(base), **init},
            "data": {"kind": "text", "path": str(text), "seq_len": 16},
            "train": {"steps": 2, "batch_size": 2, "log_every_steps": 1, "eval_batches": 2, "device": "cpu"},
        }
        return parse_config(data | ({"model": model} if model else {}), "test", overrides)

    return make_from


def start(run_dir):
    """The weights of a run before its first step."""
    return checkpoints.read(run_dir / "checkpoints" / checkpoints.step_name(0)).model


def test_without_changes_it_goes_on_where_the_other_ended(base, make, tmp_path, quiet):
    config = make()
    assert config.model == load_config(base / "config.yaml").model
    train(config, tmp_path / "new", console=quiet)
    ended = {name: p.detach() for name, p in load_run(base).model.named_parameters()}
    begun = start(tmp_path / "new")
    assert begun.keys() == ended.keys()
    assert all(torch.equal(begun[name], ended[name]) for name in ended)


def test_replaced_layers_start_from_the_policy_and_all_others_are_copied(base, make, tmp_path, quiet):
    config = make(model={"layers": {"m": MAMBA}}, replace={"a": "m", "lm_head": None})
    assert config.model.pattern == "m f m f"
    train(config, tmp_path / "new", console=quiet)
    ended = {name: p.detach() for name, p in load_run(base).model.named_parameters()}
    fresh = {name: p.detach() for name, p in build_model(config).named_parameters()}
    for name, x in start(tmp_path / "new").items():
        new = name.startswith(("layers.0.", "layers.2.", "lm_head."))
        assert torch.equal(x, fresh[name] if new else ended[name]), name


def test_one_branch_of_a_parallel_layer(make_config, text, tmp_path, quiet):
    train(make_config("train.steps=1", pattern="a+m f"), tmp_path / "base", console=quiet)
    window = {"type": "attention", "n_heads": 2, "window": 4}
    data = {
        "init_from": {"path": str(tmp_path / "base"), "replace": {"a": "w"}},
        "model": {"layers": {"w": window}},
        "data": {"kind": "text", "path": str(text), "seq_len": 16},
        "train": {"steps": 1, "batch_size": 2},
    }
    config = parse_config(data)
    assert config.model.pattern == "w+m f"
    train(config, tmp_path / "new", console=quiet)
    ended = dict(load_run(tmp_path / "base").model.named_parameters())
    kept = {name: torch.equal(x, ended[name]) for name, x in start(tmp_path / "new").items() if name in ended}
    assert not kept["layers.0.layer.layers.0.q_proj.weight"]
    assert kept["layers.0.layer.layers.1.in_proj.weight"]
    assert kept["layers.0.pre_norm.weight"]


def test_frozen_parameters_stay_and_take_no_room(base, make, tmp_path, quiet):
    config = make(freeze=["embed", "f", "0"])
    told = io.StringIO()
    result = train(config, tmp_path / "new", console=Console(file=told))
    model = load_run(tmp_path / "new").model
    still = {
        n
        for n, _ in model.named_parameters()
        if n.startswith(("embed.", "layers.0.", "layers.1.", "layers.3."))
    }
    n = sum(p.numel() for name, p in model.named_parameters() if name in still)
    assert f"({n:,} of them frozen)" in told.getvalue()
    assert json.loads((tmp_path / "new" / "manifest.json").read_text())["frozen_parameters"] == n
    # As an import of it, an hour later, resumed: the source is gone and the frozen places are known.
    shutil.rmtree(base)
    config = load_config(tmp_path / "new" / "config.yaml", ["train.steps=4"])
    train(config, tmp_path / "new", resume=True, console=quiet)
    begun, stored = (
        start_of(tmp_path / "new"),
        checkpoints.read(result.run_dir / "checkpoints" / "step-00000004"),
    )
    for name, x in stored.model.items():
        assert torch.equal(x, begun[name]) == (name in still), name
    moved = {name.rpartition(".")[0] for name in stored.optimizer}
    assert moved == stored.model.keys() - still


def start_of(run_dir):
    """The weights of the oldest checkpoint."""
    return checkpoints.read(checkpoints.step_folders(run_dir)[0]).model


def test_what_is_frozen_may_change_between_the_parts_of_a_run(make, tmp_path, quiet):
    train(make(freeze=["f"]), tmp_path / "new", console=quiet)
    for words, step in (("[a]", 3), ("[]", 4)):
        overrides = [f"init_from.freeze={words}", f"train.steps={step}", "train.keep=9"]
        config = load_config(tmp_path / "new" / "config.yaml", overrides)
        train(config, tmp_path / "new", resume=True, console=quiet)
    two, three, four = (checkpoints.read(path) for path in checkpoints.step_folders(tmp_path / "new")[-3:])
    names = [name for name in two.model if name.startswith("layers.")]
    attention, mlp = (tuple(f"layers.{i + j}." for i in (0, 2)) for j in (0, 1))
    for name in names:
        assert torch.equal(two.model[name], three.model[name]) == name.startswith(attention)
        assert not torch.equal(three.model[name], four.model[name])
    assert not any(name.startswith(mlp) for name in two.optimizer)
    assert not any(name.startswith(attention) for name in three.optimizer)
    assert four.optimizer.keys() == two.optimizer.keys() | three.optimizer.keys()


def test_resume_is_exact(make, tmp_path, quiet):
    options = {"model": {"layers": {"m": MAMBA}}, "replace": {"0": "m"}, "freeze": ["embed", "1"]}
    constant = ("train.schedule.kind=constant", "train.steps=4")
    train(make(*constant, **options), tmp_path / "whole", console=quiet)
    train(make("train.schedule.kind=constant", **options), tmp_path / "parts", console=quiet)
    train(make(*constant, **options), tmp_path / "parts", resume=True, console=quiet)
    one, two = (
        checkpoints.read(tmp_path / name / "checkpoints" / "step-00000004") for name in ("whole", "parts")
    )
    for x, y in ((one.model, two.model), (one.optimizer, two.optimizer)):
        assert x.keys() == y.keys()
        assert all(torch.equal(x[name], y[name]) for name in x)


def test_options_that_are_not_the_imported_ones_are_told(make, tmp_path):
    told = io.StringIO()
    config = make(model={"layers": {"a": {"window": 4}}, "block": {"eps": 0.1}})
    train(config, tmp_path / "new", console=Console(file=told, width=200))
    assert "init_from: layers 0 2: window = 4, imported null" in told.getvalue()
    assert "init_from: layers 0 1 2 3: residual.eps = 0.1, imported 1e-05" in told.getvalue()
    assert "init_from: block.eps = 0.1, imported 1e-05" in told.getvalue()


@pytest.mark.parametrize(
    ("model", "init", "message"),
    [
        ({"d_model": 32}, {}, r"embed\.weight: \(258, 32\) here, \(258, 16\) in the imported model"),
        (
            {"layers": {"f": {"d_ff": 64}}},
            {},
            r"layer 1 \(f\), layer\..*: \(64, 16\) here, \(32, 16\) in the imported model; weights that are",
        ),
        (
            {"layers": {"a": {"qkv_bias": True}}},
            {},
            r"layer 0 \(a\), layer\.q_proj\.bias: \(16,\) here, absent",
        ),
        ({"embedding": {"tied": True}}, {}, r"lm_head\.weight: absent here, \(258, 16\) in the imported"),
        (
            {"layers": {"a": MAMBA}},
            {},
            r"layer 0 is a \(mamba2\), the imported one a \(attention\); say so in",
        ),
        ({}, {"freeze": ["q"]}, r"init_from\.freeze: 'q' is no place"),
        ({}, {"freeze": ["embed_positions"]}, r"init_from\.freeze: embed_positions: it has no parameters"),
        ({}, {"freeze": ["0-3", "embed", "final_norm", "lm_head"]}, "everything is frozen"),
        ({}, {"freeze": ["a"], "replace": {"0": None}}, r"freeze: layer 0 \(a\), .* starts afresh"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_read(
    make, tmp_path, quiet, monkeypatch, model, init, message
):
    config = make(model=model, **init)
    monkeypatch.setattr(init_from, "load_run", lambda *args: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "new", console=quiet)
    assert not list(tmp_path.glob("*new*"))


def test_a_whole_model_is_held_against_the_imported_one(base, make, tmp_path, quiet):
    layers = {"a": {"type": "attention", "n_heads": 2}, "f": {"type": "mlp", "d_ff": 32}, "m": MAMBA}
    whole = {"d_model": 16, "embedding": {"tied": False}, "layers": layers}
    for pattern, replace, message in (
        (
            "m f a f",
            {},
            r"layer 0 is m \(mamba2\), the imported one a \(attention\); say so in init_from.replace",
        ),
        ("m f a", {"0": "m"}, r"model\.pattern has 3 layers, the imported one 4"),
        ("m f a f", {"0": "m", "2": "m"}, r"layer 2 is to be m, model\.pattern has a there"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make(model={**whole, "pattern": pattern}, replace=replace), tmp_path / "new", console=quiet)
    config = make(model={**whole, "pattern": "m f a f"}, replace={"0": "m"})
    assert train(config, tmp_path / "new", console=quiet).step == 2
    # What is whole needs the source for its weights only.
    assert load_config(tmp_path / "new" / "config.yaml").model.vocab_size == 258


def test_shared_weights_stay_with_their_layers(make_config, text, tmp_path, quiet):
    share = ["model.layers.f.share={copies: 2}", "train.steps=1"]
    train(make_config(*share, pattern="f m f m f m f"), tmp_path / "base", console=quiet)
    data = {
        "init_from": {"path": str(tmp_path / "base"), "replace": {"2": "m"}},
        "data": {"kind": "text", "path": str(text), "seq_len": 16},
    }
    with pytest.raises(ValueError, match=r"layer 4 would use other shared weights \(f\.1\) than"):
        train(parse_config(data), tmp_path / "new", console=quiet)
    data["init_from"] = {"path": str(tmp_path / "base"), "replace": {"f": None}}
    config = parse_config(data, overrides=["train.steps=1", "train.eval_batches=1"])
    train(config, tmp_path / "new", console=quiet)
    fresh = dict(build_model(config).named_parameters())
    begun = start(tmp_path / "new")
    places = ("shared.", *(f"layers.{i}." for i in (0, 2, 4, 6)))
    assert all(torch.equal(begun[name], fresh[name]) == name.startswith(places) for name in begun)


def test_a_folder_that_is_no_model_is_one_message(make, base, text, tmp_path):
    for path, message in (
        (str(tmp_path), "it cannot be read: Unrecognized model"),
        (str(tmp_path / "none" / "x" / "y"), "not a model folder or hub name that loads"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            make(f"init_from.path={path}")
        assert len(caught.value.problems) == 1
    with pytest.raises(ConfigError, match=r"init_from\.pth=x: unknown key"):
        make("init_from.pth=x")


def test_the_tokenizer_comes_along(make_config, text, tmp_path, quiet):
    bpe = "data.tokenizer={kind: bpe, vocab_size: 270}"
    train(make_config(bpe, "train.steps=1"), tmp_path / "base", console=quiet)
    data = {
        "init_from": {"path": str(tmp_path / "base")},
        "data": {"kind": "text", "path": str(text), "seq_len": 16},
        "train": {"steps": 1, "eval_batches": 1},
    }
    train(parse_config(data), tmp_path / "new", console=quiet)
    one, two = (load_run(tmp_path / name).tokenizer for name in ("base", "new"))
    assert one.fingerprint == two.fingerprint
    # Another one is the user's right, and is told.
    data["data"]["tokenizer"], told = {"kind": "bytes"}, io.StringIO()
    train(parse_config(data), tmp_path / "other", console=Console(file=told, width=300))
    assert "read with the tokenizer bytes, the imported model was trained with bpe" in told.getvalue()


def test_bytes_that_went_out_are_still_bytes(make, tmp_path):
    ByteTokenizer().to_hf(64).save_pretrained(tmp_path / "hf")
    _, plan = init_from.make_plan(make())
    exported = plan.base._replace(tokenizer={"kind": "huggingface", "path": str(tmp_path / "hf")})
    assert init_from.other_tokenizer(plan._replace(base=exported), ByteTokenizer()) is None
    # One that cannot be used here is not compared.
    nothing = plan.base._replace(tokenizer={"kind": "huggingface", "path": str(tmp_path)})
    assert init_from.other_tokenizer(plan._replace(base=nothing), ByteTokenizer()) is None


def test_a_probe_has_no_tokenizer_to_take_over(make_probe, text, tmp_path, quiet):
    train(make_probe("train.steps=1"), tmp_path / "base", console=quiet)
    data = {"init_from": {"path": str(tmp_path / "base")}, "data": {"kind": "text", "path": str(text)}}
    with pytest.raises(ConfigError, match=r"data\.tokenizer: missing, and the imported model has none"):
        parse_config(data)


def test_a_checkpoint_of_a_run_is_a_start_too(make_config, make, text, tmp_path, quiet):
    often = make_config("train.save_every_steps=1", "train.keep=9", "train.steps=3")
    train(often, tmp_path / "long", console=quiet)
    first = tmp_path / "long" / "checkpoints" / "step-00000001"
    train(make(f"init_from.path={first}"), tmp_path / "new", console=quiet)
    stored = checkpoints.read(first).model
    assert all(torch.equal(x, stored[name]) for name, x in start(tmp_path / "new").items())


def test_another_start_is_another_run(make, tmp_path, quiet):
    train(make(), tmp_path / "new", console=quiet)
    config = load_config(tmp_path / "new" / "config.yaml", ["init_from=null"])
    with pytest.raises(ValueError, match=r"init_from was .* and is null now; put it back"):
        train(config, tmp_path / "new", resume=True, console=quiet)
    with pytest.raises(ValueError, match="an import is the model as it is"):
        adopt(build_model(make()), make(), tmp_path / "other", overwrite=False, console=quiet)


def test_what_has_no_gradient_keeps_having_none(make):
    moe = {"type": "moe", "n_experts": 4, "d_ff": 8, "router": "sigmoid"}
    config = make(model={"layers": {"e": moe}}, replace={"1": "e"}, freeze=["0"])
    model = build_model(config.model)
    init_from.freeze(model, config)
    frozen = {name for name, x in model.named_parameters() if not x.requires_grad}
    at_0 = {name for name, _ in model.named_parameters() if name.startswith("layers.0.")}
    assert frozen == at_0 | {"layers.1.layer.router_correction"}


def test_what_no_gradient_reaches_is_not_called_frozen(make_config, text, tmp_path, quiet):
    experts = {"type": "moe", "n_experts": 4, "d_ff": 8, "router": "sigmoid"}
    data = {
        "model": {"d_model": 16, "pattern": "e f", "layers": {"e": experts, "f": {"type": "mlp", "d_ff": 8}}},
        "data": {"kind": "text", "path": str(text), "seq_len": 16},
        "train": {"steps": 1, "batch_size": 2, "eval_batches": 1, "device": "cpu"},
    }
    told = io.StringIO()
    train(parse_config(data), tmp_path / "base", console=Console(file=told))
    assert "frozen" not in told.getvalue()
    del data["model"]
    data["init_from"] = {"path": str(tmp_path / "base"), "freeze": ["e"]}
    train(parse_config(data), tmp_path / "new", console=Console(file=told))
    model = load_run(tmp_path / "new").model
    frozen = sum(p.numel() for name, p in model.named_parameters() if name.startswith("layers.0."))
    assert f"({frozen:,} of them frozen)" in told.getvalue()
