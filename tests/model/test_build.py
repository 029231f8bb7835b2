"""Building: starts, parameter classes, types, and what cannot be built."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_lm.config.schema import ModelConfig
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import POLICY, entries
from hybrid_lm.model.stats import class_table, layer_table, totals


def test_weights_do_not_depend_on_how_the_model_came_to_be(hybrid_config):
    one, two = build_model(hybrid_config, seed=3), build_model(hybrid_config, seed=3)
    other = build_model(hybrid_config, seed=4)
    half = build_model(hybrid_config, seed=3, dtype=torch.bfloat16)
    for name, x in one.state_dict().items():
        assert torch.equal(x, two.state_dict()[name])
        assert torch.equal(x.to(half.state_dict()[name].dtype), half.state_dict()[name])
    assert not torch.equal(one.embed.weight, other.embed.weight)


def test_every_parameter_has_one_class_and_its_start(hybrid_config):
    model = build_model(hybrid_config)
    found = list(entries(model))
    assert len({id(entry.parameter) for entry in found}) == len(list(model.parameters())) == len(found)
    assert {entry.spec.kind for entry in found} == set(POLICY)
    n_layers = len(model.layers)
    for name, parameter, spec in found:
        assert parameter.isfinite().all(), name
        if spec.kind in ("matrix", "output") and spec.init is None:
            bound = parameter.shape[-1] ** -0.5 / (math.sqrt(n_layers) if spec.kind == "output" else 1)
            assert 0.8 * bound < parameter.abs().max() <= bound * (1 + 1e-6), name
        if spec.kind == "bias":
            assert not parameter.any(), name
    assert sum(row.parameters for row in class_table(model)) == sum(p.numel() for p in model.parameters())


def test_dynamics_stay_in_float32(hybrid_config):
    model = build_model(hybrid_config, dtype=torch.bfloat16)
    again = build_model(hybrid_config).to(torch.bfloat16)
    exact = {name: x for name, x, spec in entries(build_model(hybrid_config)) if spec.kind == "dynamics"}
    for lm in (model, again, again.float().half()):
        for name, parameter, spec in entries(lm):
            assert (parameter.dtype == torch.float32) == POLICY[spec.kind].float32, name
            if spec.kind == "dynamics":
                assert torch.equal(parameter, exact[name]), f"{name} was rounded on the way"
    assert build_model(hybrid_config).double().layers[0].layer.A_log.dtype == torch.float64


def test_normal_start_and_unscaled_outputs(hybrid_config):
    init = {"matrix": "normal", "std": 0.05, "scale_residual": False}
    model = build_model(hybrid_config.model_copy(update={"init": type(hybrid_config.init)(**init)}))
    for name, parameter, spec in entries(model):
        if spec.kind in ("matrix", "output", "embedding") and spec.init is None and parameter.numel() > 500:
            # The spread of n samples has a relative error of 1 / sqrt(2 n): four of them.
            assert abs(float(parameter.detach().std()) / 0.05 - 1) < 4 / math.sqrt(2 * parameter.numel()), (
                name
            )


def test_costs_are_counted_on_the_meta_device(hybrid_config):
    model, real = build_model(hybrid_config, weights=False), build_model(hybrid_config)
    assert model.embed.weight.is_meta
    # as on a GPU
    real.backends["mamba2_mixer"] = "native"
    assert layer_table(model) == layer_table(real)
    assert totals(model).parameters == sum(p.numel() for p in real.parameters())
    rows = layer_table(real)
    assert sum(row.parameters for row in rows) + 61 * 32 + 32 == totals(real).parameters
    # Two key and two value heads of width 8 in float32, and the number of the document.
    assert rows[2].state_bytes_per_token == 2 * 2 * 8 * 4 + 4
    assert rows[1].state_bytes_fixed == rows[1].state_bytes_per_token == 0


def test_memory_after_n_tokens_is_what_the_table_says(hybrid_config):
    model, n = build_model(hybrid_config), 200
    state = model.empty_state(1, max_tokens=n)
    with torch.no_grad():
        model(torch.randint(61, (1, n)), state=state)
    row = totals(model)
    assert sum(s.nbytes for s in state.layers if s) == row.state_bytes_fixed + n * row.state_bytes_per_token


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": None}, "model.vocab_size is not set"),
        ({"embedding": {"positions": "learned"}}, "model.embedding.max_positions is needed"),
        (
            {"layers": {"m": {"type": "attention", "n_heads": 3}}},
            r"model.layers.m.n_heads: 3 does not divide",
        ),
        ({"layers": {"m": {"type": "mamba3"}}}, "unknown layer 'mamba3'.*Did you mean"),
    ],
)
def test_what_cannot_be_built_says_why(changes, message):
    config = {"d_model": 16, "vocab_size": 9, "pattern": "m", "layers": {"m": {"type": "mlp"}}, **changes}
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig.model_validate(config))


def test_a_missing_backend_is_not_replaced():
    config = {"d_model": 16, "vocab_size": 9, "pattern": "m", "layers": {"m": {"type": "mlp"}}}
    with pytest.raises(ValueError, match="mamba_ssm"):
        build_model(ModelConfig.model_validate(config), backend="mamba_ssm")
