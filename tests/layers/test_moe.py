"""A mixture of experts equals the sum over each token's chosen experts, written out one token at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.config.schema import InitConfig, ModelConfig
from hybrid_lm.laws import Subject, bf16_stays_close
from hybrid_lm.layers.base import Auxiliary, Choices, Context
from hybrid_lm.layers.moe import MoE
from hybrid_lm.model.build import build_model
from hybrid_lm.model.init import initialise
from hybrid_lm.model.stats import layer_table

D, T = 12, 23
ACTS = {"silu": F.silu, "relu2": lambda x: x.clamp(min=0) ** 2}


def made(**options) -> MoE:
    """A layer in float64 with every parameter off its start."""
    layer = MoE(D, MoE.Options(**options)).double()
    initialise(layer, InitConfig(), n_layers=1)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) * (parameter.std() if parameter.dim() > 1 else 1)
    return layer


def context(doc_ids: Tensor | None = None, **parts) -> Context:
    return Context(torch.zeros(2, T, dtype=torch.int64), doc_ids, **parts)


def expert(layer: MoE, e: int, x: Tensor) -> Tensor:
    """One expert on one token."""
    o, w = layer.options, layer.experts
    if o.gated:
        gate, up = (w.gate_up[e] @ x + (w.gate_up_bias[e] if o.bias else 0)).chunk(2)
        if o.limit is None:
            hidden = ACTS[o.act](gate) * up
        else:
            # GPT-OSS: `GptOssExperts` of transformers
            gate, up = gate.clamp(max=o.limit), up.clamp(min=-o.limit, max=o.limit)
            hidden = (up + 1) * gate * torch.sigmoid(o.alpha * gate)
    else:
        hidden = ACTS[o.act](w.up[e] @ x + (w.up_bias[e] if o.bias else 0))
    return w.down[e] @ hidden + (w.down_bias[e] if o.bias else 0)


def routed(layer: MoE, x: Tensor) -> dict[int, Tensor]:
    """The experts of one token and their weights."""
    o = layer.options
    logits = layer.router.weight @ x + (layer.router.bias if o.router_bias else 0)
    if o.router == "topk_softmax":
        chosen = sorted(range(o.n_experts), key=lambda e: -logits[e].item())[: o.top_k]
        weights = logits[chosen].softmax(0)
    else:
        scores = logits.softmax(0) if o.router == "softmax_topk" else 1 / (1 + (-logits).exp())
        wanted = scores + layer.router_correction if o.router == "sigmoid" else scores
        size = o.n_experts // o.n_groups
        groups = [sorted(wanted[g * size : (g + 1) * size].tolist())[-2:] for g in range(o.n_groups)]
        open_groups = sorted(range(o.n_groups), key=lambda g: -sum(groups[g]))[: o.top_k_groups]
        there = [e for e in range(o.n_experts) if e // size in open_groups]
        chosen = sorted(there, key=lambda e: -wanted[e].item())[: o.top_k]
        weights = scores[chosen]
        weights = weights / weights.sum() if o.renormalise else weights
    return {e: weights[i] * o.scale for i, e in enumerate(chosen)}


CASES = [
    {"n_experts": 5, "d_ff": 8},
    {"n_experts": 5, "top_k": 3, "d_ff": 8, "renormalise": False, "scale": 1.7},
    {"n_experts": 4, "d_ff": 8, "router": "topk_softmax", "router_bias": True, "bias": True, "limit": 0.2},
    {"n_experts": 6, "d_ff": 8, "router": "sigmoid", "act": "relu2", "gated": False, "bias": True},
    {
        "n_experts": 8,
        "top_k": 3,
        "d_ff": 8,
        "router": "sigmoid",
        "n_groups": 4,
        "top_k_groups": 2,
        "scale": 2.5,
        "d_shared": 10,
        "shared_gate": True,
    },
    {"n_experts": 6, "d_ff": 8, "router": "sigmoid", "n_groups": 6, "top_k_groups": 3, "renormalise": False},
    {"n_experts": 4, "d_ff": 8, "d_latent": 7, "d_shared": 10},
]


@pytest.mark.parametrize("options", CASES)
def test_moe_is_a_sum_over_the_chosen(options):
    layer = made(**options)
    x, expected = torch.randn(2, T, D, dtype=torch.float64), torch.zeros(2, T, D, dtype=torch.float64)
    for row in range(2):
        for t in range(T):
            token = x[row, t]
            inner = token if layer.latent_in is None else layer.latent_in.weight @ token
            y = sum(w * expert(layer, e, inner) for e, w in routed(layer, token).items())
            y = y if layer.latent_out is None else layer.latent_out.weight @ y
            if layer.shared is not None:
                s = layer.shared
                common = s.down_proj.weight @ (
                    F.silu(s.gate_proj.weight @ token) * (s.up_proj.weight @ token)
                )
                gate = layer.shared_gate
                y = y + common * (1 if gate is None else torch.sigmoid(gate.weight @ token))
            expected[row, t] = y
    y, state = layer(x, None, context())
    assert state is None
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)  # float64 sums of tens of terms


def measured(layer: MoE, x: Tensor, doc_ids: Tensor | None = None) -> Auxiliary:
    auxiliary = Auxiliary([], [])
    layer(x, None, context(doc_ids, auxiliary=auxiliary))
    return auxiliary


def test_losses_are_those_of_switch_and_st_moe():
    layer = made(n_experts=4, d_ff=8, balance="loss", balance_factor=0.3, z_loss=0.2)
    x = torch.randn(2, T, D, dtype=torch.float64)
    found = measured(layer, x)
    logits = x.flatten(0, 1) @ layer.router.weight.T
    p, shares = logits.softmax(-1), torch.zeros(4, dtype=torch.float64)
    for row in x.flatten(0, 1):
        for e in routed(layer, row):
            shares[e] += 1 / (2 * 2 * T)
    balance = 4 * sum(shares[e] * p[:, e].mean() for e in range(4))
    z = torch.stack([row.exp().sum().log() ** 2 for row in logits]).mean()
    terms = {term.name: term for term in found.terms}
    assert {name: term.factor for name, term in terms.items()} == {"balance": 0.3, "router_z": 0.2}
    # float64 sums of 46 terms
    torch.testing.assert_close(terms["balance"].value, balance, rtol=1e-13, atol=0)
    torch.testing.assert_close(terms["router_z"].value, z, rtol=1e-13, atol=0)
    torch.testing.assert_close(found.objective, 0.3 * balance + 0.2 * z, rtol=1e-13, atol=0)
    (load,) = found.loads
    torch.testing.assert_close(load.counts, shares * 4 * T, rtol=1e-13, atol=0)
    assert (load.correction, load.rate) == (None, 0.0)


def test_even_routing_has_a_balance_loss_of_one():
    layer = made(n_experts=4, top_k=3, d_ff=8, balance="loss")
    layer.router.weight.data.zero_()
    (term,) = measured(layer, torch.randn(2, T, D, dtype=torch.float64)).terms
    # every score is 1/4 exactly, whoever is chosen
    assert float(term.value.detach()) == pytest.approx(1.0, rel=1e-13)


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_padding_does_not_count(router):
    layer = made(n_experts=4, d_ff=8, router=router, balance="loss", z_loss=0.1)
    x = torch.randn(2, T, D, dtype=torch.float64)
    docs = torch.ones(2, T, dtype=torch.int32)
    docs[0, :9] = docs[1, :4] = 0
    padded = measured(layer, x, docs)
    alone = Auxiliary([], [])
    layer(x[docs > 0][None], None, Context(torch.zeros(1, 33, dtype=torch.int64), auxiliary=alone))
    for one, other in zip(padded.terms, alone.terms, strict=True):
        torch.testing.assert_close(one.value, other.value, rtol=1e-13, atol=0)  # float64 sums of 46 terms
    assert torch.equal(padded.loads[0].counts, alone.loads[0].counts)
    nothing = measured(layer, x, torch.zeros(2, T, dtype=torch.int32))
    assert torch.as_tensor(nothing.objective).detach() == 0.0


def test_a_balance_loss_of_sigmoids_is_of_their_shares():
    layer = made(n_experts=4, d_ff=8, router="sigmoid", balance="loss")
    x = torch.randn(2, T, D, dtype=torch.float64)
    (term,), (load,) = measured(layer, x)
    scores = (x.flatten(0, 1) @ layer.router.weight.T).sigmoid()
    mean = (scores / scores.sum(-1, keepdim=True)).mean(0)
    expected = 4 * (load.counts / load.counts.sum() * mean).sum()
    torch.testing.assert_close(term.value, expected, rtol=1e-13, atol=0)  # float64 sums of 46 terms


def test_a_correction_chooses_and_does_not_weigh():
    layer = made(n_experts=4, top_k=1, d_ff=8, router="sigmoid", renormalise=False)
    layer.router_correction.data = torch.tensor([0.0, 0.0, 9.0, 0.0])
    logits = layer.router(torch.randn(5, D, dtype=torch.float64), context())
    _, chosen, weights = layer.choose(logits, context())
    assert (chosen == 2).all()
    assert torch.equal(weights[:, 0], logits[:, 2].sigmoid())


def test_a_router_works_in_the_precision_that_its_checkpoints_had():
    """DeepSeek-V3's in float32 in a model of bfloat16, Mixtral's in the model's type and its softmax in
    float32."""
    for router, kept in (("sigmoid", torch.float32), ("softmax_topk", torch.bfloat16)):
        layer = made(n_experts=4, d_ff=8, router=router).bfloat16()
        x = torch.randn(5, D, dtype=torch.bfloat16)
        logits = layer.router(x, context())
        assert logits.dtype == kept
        scores, _, weights = layer.choose(logits, context())
        assert (scores.dtype, weights.dtype) == (torch.float32, torch.float32)
        layer = layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            assert layer.router(x, context()).dtype == torch.float32
            assert layer(torch.randn(2, T, D), None, context())[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_experts": 2, "top_k": 3}, "top_k: 3 of 2 experts"),
        ({"router": "sigmoid", "n_groups": 3}, "n_groups: 3 does not divide n_experts 8"),
        ({"router": "sigmoid", "n_groups": 2, "top_k_groups": 3}, "top_k_groups: 3 of 2 groups"),
        ({"router": "sigmoid", "n_groups": 8, "top_k": 2}, "top_k_groups: 1 groups have fewer than top_k 2"),
        ({"n_groups": 2}, "n_groups: groups belong to router: sigmoid, this is softmax_topk"),
        ({"balance": "bias"}, "balance: bias needs router: sigmoid"),
        ({"limit": 7.0, "act": "gelu"}, "limit: it belongs to experts with gated: true and act: silu"),
        ({"shared_gate": True}, "shared_gate: there is no shared expert"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    config = {"d_model": 16, "vocab_size": 9, "pattern": "e", "layers": {"e": {"type": "moe", **options}}}
    with pytest.raises(ValueError, match=message):
        build_model(ModelConfig.model_validate(config))


def test_a_token_costs_its_own_experts_only():
    moe = {"type": "moe", "n_experts": 8, "top_k": 2, "d_ff": 24, "d_shared": 40}
    config = {"d_model": 16, "vocab_size": 9, "pattern": "e", "layers": {"e": moe}}
    (row,) = layer_table(build_model(ModelConfig.model_validate(config), weights=False))
    experts, shared, router = 3 * 16 * 24, 3 * 16 * 40, 8 * 16
    assert row.parameters == 8 * experts + shared + router + 16
    assert row.flops_per_token == 2 * (2 * experts + shared + router)


def test_the_default_width_costs_what_an_mlp_does():
    moe = MoE(96, MoE.Options(n_experts=4, top_k=2))
    assert moe.experts.down.shape == (4, 96, 128)
    assert 2 * 128 == 8 * 96 // 3


def test_settings_without_effect_are_resolved():
    one = MoE.Options(router="topk_softmax", renormalise=False, alpha=3.0, d_ff=32)
    assert one.resolved(24) == MoE.Options(router="topk_softmax").resolved(24)
    all_open = MoE.Options(router="sigmoid", n_groups=4, top_k_groups=4)
    assert all_open.resolved(24) == MoE.Options(router="sigmoid").resolved(24)
    half_open = MoE.Options(router="sigmoid", n_groups=4, top_k_groups=2)
    assert half_open.resolved(24)["n_groups"] == 4


@pytest.mark.parametrize("router", ["softmax_topk", "topk_softmax", "sigmoid"])
def test_choices_can_be_made_again(router):
    layer = made(n_experts=4, d_ff=8, router=router)
    x, first = torch.randn(2, T, D, dtype=torch.float64), Choices()
    y, _ = layer(x, None, context(choices=first))
    again, _ = layer(x, None, context(choices=Choices(first.made)))
    assert torch.equal(again, y)
    others = Choices([(chosen + 1) % 4 for chosen in first.made])
    assert not torch.equal(layer(x, None, context(choices=others))[0], y)
    assert torch.equal(others.made[0], (first.made[0] + 1) % 4)


def test_bfloat16_is_measured_at_the_same_choices():
    """Without them, tokens between two experts make it 0.1 and more."""
    moe = {"type": "moe", "n_experts": 16, "d_ff": 32}
    config = {"d_model": 64, "vocab_size": 50, "pattern": "e e e e", "layers": {"e": moe}}
    verdict = bf16_stays_close(Subject(ModelConfig.model_validate(config), tokens=90))
    assert verdict.holds, verdict
