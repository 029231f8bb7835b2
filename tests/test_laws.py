"""Every registered layer, in every variant it names, keeps every law. Nothing here names a layer."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch

from hybrid_lm.config.load import config_names, load_config
from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.laws import LAWS, Subject, causal, compiled_is_eager, subject
from hybrid_lm.layers import LAYERS
from hybrid_lm.layers.base import Layer
from hybrid_lm.registry import locate

VARIANTS = [(name, i) for name in LAYERS for i in range(len(LAYERS[name].EXAMPLES))]
EAGER_LAWS = [law for law in LAWS if law is not compiled_is_eager]


def config_of(name: str, variant: int) -> ModelConfig:
    """Two of the layer in a row, at width 32."""
    options = dict(LAYERS[name].EXAMPLES[variant])
    recipes = {**options.pop("recipes", {}), "L": {"type": name, **options}}
    return ModelConfig.model_validate({"d_model": 32, "vocab_size": 50, "pattern": "L L", "layers": recipes})


@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_layer_keeps_the_laws(name, variant):
    judged = Subject(config_of(name, variant), tokens=90)
    for law in EAGER_LAWS:
        verdict = law(judged)
        assert verdict.holds, verdict


@pytest.mark.parametrize("name", list(LAYERS))
def test_no_layer_imports_another(name):
    others = {LAYERS.place(other).partition(":")[0] for other in LAYERS} - {LAYERS[name].__module__}
    tree = ast.parse(inspect.getsource(inspect.getmodule(LAYERS[name])))
    found = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not found & others


@pytest.mark.compile
@pytest.mark.parametrize(("name", "variant"), VARIANTS)
def test_layer_compiles_to_one_graph(name, variant):
    verdict = compiled_is_eager(Subject(config_of(name, variant), tokens=20, compiler="aot_eager"))
    assert verdict.holds, verdict


@pytest.mark.compile
@pytest.mark.parametrize("name", config_names())
def test_shipped_configuration_compiles_to_one_graph(name):
    verdict = compiled_is_eager(subject(load_config(name).model, tokens=20, compiler="aot_eager"))
    assert verdict.holds, verdict


@pytest.mark.compile
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_hybrid_compiles_through_inductor():
    verdict = compiled_is_eager(subject(load_config("recall/mqar_small_mamba2_attention").model, tokens=20))
    assert verdict.holds, verdict
    assert verdict.skipped or "inductor" in verdict.note


@pytest.mark.parametrize("law", EAGER_LAWS, ids=lambda law: law.__name__)
def test_model_with_everything_keeps_the_laws(hybrid_config, law):
    verdict = law(Subject(hybrid_config, tokens=70))
    assert verdict.holds, verdict


NARROW = {"pretrain/jamba_moe_130m": ["model.layers.e.d_ff=128", "model.layers.f.d_ff=512"]}
"""What keeps a model that is large in float64 within memory."""


@pytest.mark.parametrize("name", config_names())
def test_shipped_configuration_keeps_the_laws(name):
    judged = subject(load_config(name, NARROW.get(name, ())).model, tokens=70)
    for law in EAGER_LAWS:
        verdict = law(judged)
        assert verdict.holds, verdict


def test_every_layer_says_what_it_is():
    for name in LAYERS:
        layer = LAYERS[name]
        assert issubclass(layer, Layer)
        assert layer.__doc__, f"{name} has no docstring"
        assert layer.Options.__doc__, f"{name}.Options has no docstring"


class Broken(Layer):
    """A layer that breaks one law at a time."""

    how = ""

    def forward(self, x, state, ctx):
        y = {
            "causal": lambda: x.roll(-1, 1),
            "packed": lambda: x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None],
            "batch": lambda: x * x.mean(0, keepdim=True),
            "nan": lambda: x / (x - x)[..., :1],
            "late nan": lambda: torch.where(torch.arange(x.shape[1])[:, None] > 2, x, x * torch.nan),
            "nothing": lambda: x * 0.5,
        }[self.how]()
        return y, state


@pytest.mark.parametrize(
    ("how", "broken"),
    [
        ("causal", "causal"),
        ("packed", "packed = separate"),
        ("packed", "left-padded = unpadded"),
        ("packed", "any split = whole"),
        ("packed", "token by token = whole"),
        ("batch", "alone = in a batch"),
        *(
            (how, law)
            for how in ("nan", "late nan")
            for law in (
                "chunked = recurrent",
                "any split = whole",
                "token by token = whole",
                "packed = separate",
                "left-padded = unpadded",
                "alone = in a batch",
                "save -> load exact",
                "bf16 drift bounded",
            )
        ),
        ("nan", "causal"),
        ("nothing", None),
    ],
)
def test_a_broken_layer_is_found_out(how, broken, monkeypatch):
    """The laws can fail: each finds the layer that breaks it, and none blames one that is sound."""
    LAYERS.add("broken", f"{__name__}:Broken")
    monkeypatch.setattr(Broken, "how", how)
    monkeypatch.setattr(
        "hybrid_lm.registry.locate", lambda place, real=locate: Broken if ":Broken" in place else real(place)
    )
    try:
        config = ModelConfig.model_validate(
            {"d_model": 8, "vocab_size": 20, "pattern": "L", "layers": {"L": {"type": "broken"}}}
        )
        judged = Subject(config, tokens=30)
        failed = {verdict.law for verdict in (law(judged) for law in EAGER_LAWS) if not verdict.holds}
    finally:
        LAYERS.remove("broken")
    if broken is None:
        assert not failed
    else:
        assert broken in failed


def test_a_model_that_ignores_its_input_is_not_called_causal():
    config = {
        "d_model": 8,
        "vocab_size": 20,
        "pattern": "f",
        "layers": {"f": {"type": "mlp"}},
        "embedding": {"multiplier": 0.0},
    }
    assert not causal(Subject(ModelConfig.model_validate(config), tokens=20)).holds
