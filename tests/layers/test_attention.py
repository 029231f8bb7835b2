"""Attention equals equation 1 of Vaswani et al. 2017, arXiv:1706.03762, with each option written out."""

from __future__ import annotations

import pytest
import torch

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.attention import Attention
from hybrid_lm.layers.base import Context
from hybrid_lm.model.init import initialise


def build(**options):
    layer = Attention(24, Attention.Options.model_validate(options)).double()
    initialise(layer, InitConfig(), n_layers=1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return layer


def rms(x, norm):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * (norm.weight + norm.unit_offset)


def layer_norm(x, norm):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def rotate(x, theta, r):
    """The first r of each head's p numbers, as complex pairs (x_i, x_{i + r/2}) times e^{i position
    theta^{-2i/r}}."""
    t = x.shape[1]
    angle = torch.arange(t)[:, None].double() * theta ** (-torch.arange(0, r, 2).double() / r)
    pair = (
        torch.complex(x[..., : r // 2], x[..., r // 2 : r])
        * torch.polar(torch.ones_like(angle), angle)[:, None]
    )
    return torch.cat([pair.real, pair.imag, x[..., r:]], -1)


def denominator(layer):
    """What a sink adds to the softmax's denominator, per head."""
    return torch.zeros(layer.n_heads) if layer.sinks is None else layer.sinks.exp()


@pytest.mark.parametrize(
    "options",
    [
        {"n_heads": 4},
        {"n_heads": 4, "n_kv_heads": 2, "rope": {"theta": 100.0}},
        {"n_heads": 4, "n_kv_heads": 1, "window": 4, "qk_norm": "head"},
        {"n_heads": 2, "rope": {"fraction": 0.5}, "qk_norm": "full", "softcap": 2.0, "scale": 0.4},
        {"n_heads": 4, "alibi": True, "qkv_bias": True, "out_bias": True, "window": 5},
        {"n_heads": 3, "head_dim": 10},
        {"n_heads": 4, "n_kv_heads": 2, "qk_norm": "layernorm", "qk_norm_eps": 1e-2},
        {"n_heads": 4, "qk_norm": "head", "qk_norm_eps": 1e-2, "qk_norm_unit_offset": True},
        {"n_heads": 4, "n_kv_heads": 2, "sinks": True, "window": 5, "rope": {}},
        {"n_heads": 4, "out_gate": "element", "qkv_bias": True, "softcap": 2.0, "sinks": True},
        {"n_heads": 4, "head_dim": 8, "out_gate": "head", "in_multiplier": 0.7, "key_multiplier": 1.6},
        {"n_heads": 4, "out_multiplier": 0.4, "in_multiplier": 1.3, "out_bias": True, "qkv_bias": True},
    ],
)
def test_attention_is_equation_1(options):
    layer, t = build(**options), 11
    o, h, k, hd = layer.options, layer.n_heads, layer.n_kv_heads, layer.head_dim
    x = torch.randn(2, t, 24, dtype=torch.float64)
    with torch.no_grad():
        y, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))
    layer.requires_grad_(False)
    x = x * o.in_multiplier

    def project(linear):
        return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)

    q, key, v = project(layer.q_proj), project(layer.k_proj) * o.key_multiplier, project(layer.v_proj)
    if o.qk_norm == "full":
        q, key = rms(q, layer.q_norm), rms(key, layer.k_norm)
    q, key, v = q.view(2, t, h, hd), key.view(2, t, k, hd), v.view(2, t, k, hd)
    if o.qk_norm == "head":
        q, key = rms(q, layer.q_norm), rms(key, layer.k_norm)
    if o.qk_norm == "layernorm":
        q, key = layer_norm(q, layer.q_norm), layer_norm(key, layer.k_norm)
    if o.rope:
        r = round(o.rope.fraction * hd)
        q, key = rotate(q, o.rope.theta, r), rotate(key, o.rope.theta, r)
    key, v = key.repeat_interleave(h // k, 2), v.repeat_interleave(h // k, 2)
    scores = torch.einsum("bihp,bjhp->bhij", q, key) * (o.scale or hd**-0.5)
    if o.softcap:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    back = torch.arange(t)[:, None] - torch.arange(t)
    if o.alibi:
        slopes = 2.0 ** (-8 * torch.arange(1, h + 1).double() / h)
        scores = scores - slopes[:, None, None] * back
    scores = scores.masked_fill((back < 0) | (back >= (o.window or t)), -torch.inf)
    # softmax with one more term in its denominator
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + denominator(layer)[:, None, None])
    heads = torch.einsum("bhij,bjhp->bihp", weights, v)
    if o.out_gate != "none":
        gate = project(layer.gate_proj).view(2, t, h, hd if o.out_gate == "element" else 1)
        heads = heads / (1 + torch.exp(-gate))
    expected = heads.flatten(-2) @ layer.o_proj.weight.T
    if o.out_bias:
        expected = expected + layer.o_proj.bias
    expected = expected * o.out_multiplier
    # float64 sums of tens of terms; rope's tables are made in float32, whose eps times the position this is.
    torch.testing.assert_close(
        y, expected, rtol=0, atol=(1e-5 if o.rope else 1e-12) * float(expected.abs().max())
    )


@torch.no_grad()
def test_windowed_memory_stays_small():
    """After any number of tokens a window holds its own tokens and a little room, however they came."""
    layer = build(n_heads=4, window=8)
    for pieces in ([1] * 200, [150, 1, 1, 48], [64, 65, 71]):
        state = layer.empty_state(2)
        for t in pieces:
            layer(
                torch.randn(2, t, 24, dtype=torch.float64),
                state,
                Context(torch.zeros(2, t, dtype=torch.int64)),
            )
            assert state.k.shape[1] <= 7 + 1, "the window and an eighth"
    unlimited = build(n_heads=4)
    state = unlimited.empty_state(1, max_tokens=10)
    room = state.nbytes
    for _ in range(10):
        unlimited(
            torch.randn(1, 1, 24, dtype=torch.float64), state, Context(torch.zeros(1, 1, dtype=torch.int64))
        )
    assert state.nbytes == room, "reserved room is used, not grown"


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"n_heads": 5}, "n_heads"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads"),
        ({"n_heads": 8, "rope": {}}, "rope"),
        ({"n_heads": 4, "rope": {}, "alibi": True}, "alibi"),
        ({"n_heads": 4, "rope": {"scaling": {"rope_type": "linear"}}}, "rope.scaling"),
        (
            {"n_heads": 4, "rope": {"scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 9.0}}},
            "rope.scaling",
        ),
        ({"n_heads": 4, "rope": {"scaling": {"rope_type": "dynamic", "factor": 2.0}}}, "rope.scaling"),
    ],
)
def test_impossible_sizes_are_named(options, key):
    problems = dict(Attention.Options.model_validate(options).check(24))
    assert set(problems) == {key}


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "lama3"}, {"type": "linear", "factor": 2.0}, {"rope_type": "yarn", "beta_fst": 1.0}],
)
def test_a_wrong_key_or_rule_of_scaling_is_refused(scaling):
    with pytest.raises(ValueError, match=r"rope_type|beta_fst"):
        Attention.Options.model_validate({"rope": {"scaling": scaling}})


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_a_memory_stays_in_the_graph_whatever_is_trained(trained):
    layer = build(n_heads=4)
    layer.requires_grad_(False)
    getattr(layer, trained).requires_grad_(True)
    state, total = layer.empty_state(1, max_tokens=12), 0.0
    for _ in range(3):
        y, state = layer(
            torch.randn(1, 4, 24, dtype=torch.float64), state, Context(torch.zeros(1, 4, dtype=torch.int64))
        )
        total = total + y.square().sum()
    total.backward()
    assert getattr(layer, trained).weight.grad.isfinite().all()
