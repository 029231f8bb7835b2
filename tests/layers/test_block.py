"""Composition: norms, residuals, parallel branches, shared weights and Zamba's injection, each against its
formula."""

from __future__ import annotations

import re

import pytest
import torch

from hybrid_lm.config.schema import BlockConfig, ModelConfig
from hybrid_lm.laws import LAWS, Subject, compiled_is_eager
from hybrid_lm.layers.base import Context, LayerOptions
from hybrid_lm.layers.block import Parallel, Residual, Shared
from hybrid_lm.layers.mlp import MLP
from hybrid_lm.model.build import build_model

CTX = Context(torch.zeros(2, 5, dtype=torch.int64))


def mlp(seed):
    layer = MLP(8, MLP.Options(d_ff=12))
    rng = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, generator=rng)
    return layer.double()


@pytest.mark.parametrize("placement", ["pre", "pre_each", "post", "sandwich", "none"])
def test_residual_is_its_formula(placement):
    layer = mlp(0)
    block = BlockConfig(placement=placement, unit_offset=True, residual_multiplier=0.7)
    residual = Residual(layer, block).double()
    norms = [norm for norm in (residual.pre_norm, residual.post_norm) if norm is not None]
    for i, norm in enumerate(norms):
        torch.nn.init.constant_(norm.weight, 0.3 + i)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def normed(v, i):
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * (1 + 0.3 + i)

    y = layer(normed(x, 0) if placement in ("pre", "pre_each", "sandwich") else x, None, CTX)[0]
    if placement in ("post", "sandwich"):
        y = normed(y, len(norms) - 1)
    torch.testing.assert_close(residual(x, None, CTX)[0], x + 0.7 * y, rtol=1e-12, atol=1e-12)


def test_parallel_branches_add_up():
    one, two, x = mlp(1), mlp(2), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = one(x, None, CTX)[0] + two(x, None, CTX)[0]
    torch.testing.assert_close(Parallel([one, two])(x, None, CTX)[0], expected)


def test_parallel_branches_with_norms_of_their_own():
    """GPT-NeoX: x + one(norm_1(x)) + two(norm_2(x)), norms in the branches and none around them."""
    block = {"placement": "pre_each", "residual_multiplier": 0.7}
    layers = {"a": {"type": "mlp", "d_ff": 12}, "b": {"type": "mlp", "d_ff": 16}}
    config = {"d_model": 8, "vocab_size": 11, "pattern": "a+b a", "layers": layers, "block": block}
    model = build_model(ModelConfig.model_validate(config)).double()
    weights = dict(model.named_parameters())
    scales = [f"layers.0.layer.layers.{i}.pre_norm.weight" for i in (0, 1)]
    assert [name for name in weights if "norm" in name] == [
        *scales,
        "layers.1.pre_norm.weight",
        "final_norm.weight",
    ]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = x
    for i, scale in enumerate(scales):
        torch.nn.init.normal_(weights[scale])
        branch = model.layers[0].layer.layers[i].layer
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weights[scale]
        expected = expected + 0.7 * branch(normed, None, CTX)[0]
    torch.testing.assert_close(model.layers[0](x, None, CTX)[0], expected, rtol=1e-12, atol=1e-12)


def test_norms_of_their_own_keep_the_laws():
    """Memories of both branches, and a layer that norms its own input beside one that does not."""
    layers = {
        "a": {"type": "attention", "n_heads": 4, "window": 6, "rope": {}},
        "m": {"type": "mamba2", "d_state": 4, "head_dim": 8, "chunk": 8},
        "f": {"type": "mlp", "d_ff": 16},
        "z": {"type": "inject", "block": "f", "into": "m"},
    }
    config = {"d_model": 16, "vocab_size": 11, "pattern": "a+m z+a a+f", "layers": layers}
    judged = Subject(ModelConfig.model_validate({**config, "block": {"placement": "pre_each"}}), tokens=40)
    for law in LAWS:
        if law is not compiled_is_eager:
            verdict = law(judged)
            assert verdict.holds, verdict


def zamba(**per_call):
    layers = {
        "m": {"type": "mlp", "d_ff": 12},
        "s": {
            "type": "mlp",
            "d_ff": 16,
            "share": {"copies": 2},
            **({"per_call": per_call} if per_call else {}),
        },
    }
    config = {"d_model": 8, "vocab_size": 11, "pattern": "s m s m s", "layers": layers}
    return build_model(ModelConfig.model_validate(config))


def test_shared_weights_are_used_in_turn_and_stored_once():
    model = zamba()
    calls = [layer.layer for layer in model.layers if isinstance(layer.layer, Shared)]
    assert calls[0].core is calls[2].core
    assert calls[0].core is not calls[1].core
    assert sorted({name.split(".")[1] for name in model.state_dict() if name.startswith("shared")}) == ["s"]
    assert len([name for name in model.state_dict() if "up_proj" in name]) == 2 + 2
    copy = __import__("copy").deepcopy(model)
    assert copy.layers[0].layer.core is copy.shared["s"][0], "a copy shares its own weights"


def test_per_call_parts_are_low_rank_additions_and_a_projection():
    model = zamba(lora={"rank": 2, "on": ["up_proj"]}, out_proj=True)
    call = model.layers[0].layer
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        assert torch.equal(call.lora["up_proj"].B, torch.zeros(16, 2)), "an adapter starts as no change"
        torch.nn.init.normal_(call.lora["up_proj"].B)
        core, lora = call.core, call.lora["up_proj"]
        up = core.up_proj(x, CTX) + (x @ lora.A.T) @ lora.B.T
        expected = call.out_proj(
            core.down_proj(torch.nn.functional.silu(core.gate_proj(x, CTX)) * up, CTX), CTX
        )
        # float32 sums of tens of terms in two orders.
        torch.testing.assert_close(call(x, None, CTX)[0], expected, rtol=1e-5, atol=1e-5)


def test_one_addition_for_several_matrices():
    """Zamba2's adapter: rows of one B, as if the matrices were one."""
    model = zamba(lora={"rank": 2, "on": ["gate_proj+up_proj"]})
    call, x = model.layers[0].layer, torch.randn(2, 5, 8)
    lora, core = call.lora["gate_proj_up_proj"], call.core
    assert {name: x.shape for name, x in call.lora.named_parameters()} == {
        "gate_proj_up_proj.A": (2, 8),
        "gate_proj_up_proj.B": (32, 2),
    }
    with torch.no_grad():
        torch.nn.init.normal_(lora.B)
        fused = x @ torch.cat([core.gate_proj.weight, core.up_proj.weight]).T + (x @ lora.A.T) @ lora.B.T
        gate, up = fused.chunk(2, -1)
        expected = core.down_proj(torch.nn.functional.silu(gate) * up, CTX)
        # float32 sums of tens of terms in two orders.
        torch.testing.assert_close(call(x, None, CTX)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("placement", ["pre", "post", "sandwich"])
def test_norms_are_shared_with_the_layer(placement):
    layers = {
        "s": {"type": "mlp", "d_ff": 12, "share": {"copies": 2, "norms": True}},
        "m": {"type": "mlp", "d_ff": 12},
    }
    config = {"d_model": 8, "vocab_size": 11, "block": {"placement": placement}, "layers": layers}
    model = build_model(ModelConfig.model_validate({**config, "pattern": "s m s s"})).double()
    kinds = {"pre": ["pre"], "post": ["post"], "sandwich": ["pre", "post"]}[placement]
    assert sorted(name for name in model.state_dict() if "norm" in name) == sorted(
        [f"{at}.{kind}_norm.weight" for at in ("shared.s.0", "shared.s.1", "layers.1") for kind in kinds]
        + ["final_norm.weight"]
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def normed(v, norm):
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5) * norm.weight

    for i, copy in ((0, 0), (2, 1), (3, 0)):
        branch = model.shared["s"][copy]
        y = branch.layer(normed(x, branch.pre_norm) if "pre" in kinds else x, None, CTX)[0]
        y = normed(y, branch.post_norm) if "post" in kinds else y
        torch.testing.assert_close(model.layers[i](x, None, CTX)[0], x + y, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cannot share the norm"):
        build_model(ModelConfig.model_validate({**config, "pattern": "s+m"}))


@pytest.mark.parametrize(
    ("layers", "pattern", "message"),
    [
        (
            {
                "s": {
                    "type": "mlp",
                    "d_ff": 16,
                    "share": True,
                    "per_call": {"lora": {"rank": 1, "on": ["up_proj+down_proj"]}},
                }
            },
            "s",
            "up_proj+down_proj: one addition reads one width, not [8, 16]",
        ),
        (
            {"s": {"type": "mlp", "per_call": {"out_proj": True}}},
            "s",
            "per_call: only a recipe with `share` has calls",
        ),
        (
            {"s": {"type": "mlp", "share": True, "per_call": {"lora": {"rank": 1, "on": ["q_proj"]}}}},
            "s",
            "no matrix 'q_proj' in MLP; there are gate_proj, up_proj, down_proj",
        ),
        (
            {"a": {"type": "mlp"}, "b": {"type": "mlp", "residual": {"placement": "post"}}},
            "a+b",
            "different `residual` settings",
        ),
    ],
)
def test_impossible_compositions_say_why(layers, pattern, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build_model(
            ModelConfig.model_validate({"d_model": 8, "vocab_size": 11, "pattern": pattern, "layers": layers})
        )


def test_adapters_see_what_is_loaded_moved_and_trained():
    """The view with an occurrence's additions has the model's weights, whatever happens to them."""
    model = zamba(lora={"rank": 2, "on": ["up_proj", "gate_proj"]})
    tokens = torch.arange(11)[None]
    other = zamba(lora={"rank": 2, "on": ["up_proj", "gate_proj"]})
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(tokens).logits, other(tokens).logits)
    double = __import__("copy").deepcopy(model).double()
    # float32 rounding of sums of tens of terms.
    torch.testing.assert_close(double(tokens).logits.float(), model(tokens).logits, rtol=1e-4, atol=1e-4)
    view = model.train().layers[0].layer._view[0]
    assert view.training
    assert not model.eval().layers[0].layer._view[0].training


@pytest.mark.parametrize("placement", ["pre", "pre_each", "post", "sandwich"])
def test_injection_norms_each_part_once(placement):
    layers = {
        "b": {"type": "mlp"},
        "m": {"type": "mlp"},
        "z": {"type": "inject", "block": "b", "into": "m"},
    }
    config = {
        "d_model": 8,
        "vocab_size": 11,
        "pattern": "z",
        "layers": layers,
        "block": {"placement": placement},
    }
    model = build_model(ModelConfig.model_validate(config))
    names = [name for name in model.state_dict() if "norm" in name and "final" not in name]
    assert len(names) == 2 * (2 if placement == "sandwich" else 1), names
    shared = () if placement == "pre_each" else (({"pattern": "z+m"}, "cannot share the norm"),)
    for change, message in (
        *shared,
        (
            {"layers": {**layers, "m": {"type": "mlp", "residual": {"dropout": 0.1}}}},
            "no residual of its own",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(ModelConfig.model_validate({**config, **change}))


def test_a_shift_needs_a_layernorm():
    config = {
        "d_model": 8,
        "vocab_size": 11,
        "pattern": "f",
        "layers": {"f": {"type": "mlp"}},
        "block": {"bias": True},
    }
    with pytest.raises(ValueError, match="rmsnorm has no shift"):
        build_model(ModelConfig.model_validate(config))


def test_injection_reaches_one_layer_only():
    """Zamba2: x + into(norm(x + block([x, embeddings]))); the block's output is not in the stream."""
    layers = {
        "b": {"type": "mlp", "d_ff": 6},
        "m": {"type": "mlp", "d_ff": 12},
        "z": {"type": "inject", "block": "b", "into": "m"},
    }
    model = build_model(
        ModelConfig.model_validate({"d_model": 8, "vocab_size": 11, "pattern": "m z", "layers": layers})
    ).double()
    x, e = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    ctx = Context(CTX.positions, embeddings=e)
    inject = model.layers[1].layer

    def normed(v):
        return v * torch.rsqrt(v.square().mean(-1, keepdim=True) + 1e-5)

    block, into = inject.block[0].layer, inject.into[0].layer
    injected = block(normed(torch.cat([x, e], -1)), None, ctx)[0]
    expected = x + into(normed(x + injected), None, ctx)[0]
    torch.testing.assert_close(model.layers[1](x, None, ctx)[0], expected, rtol=1e-12, atol=1e-12)
    assert LayerOptions().check(8) == ()
