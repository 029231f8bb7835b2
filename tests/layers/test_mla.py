"""MLA equals the equations of DeepSeek-V2, arXiv:2405.04434, section 2.1, written out token by token."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hybrid_lm.config.schema import InitConfig
from hybrid_lm.layers.base import Context
from hybrid_lm.layers.mla import MLA
from hybrid_lm.model.init import initialise

SIZES = {"n_heads": 3, "kv_rank": 10, "nope_dim": 6, "rope_dim": 4, "v_dim": 8}
EXACT = 2**10 * torch.finfo(torch.float64).eps  # sums of tens of terms in two orders


def made(**options) -> MLA:
    """A layer of width 16 in float64, every parameter off its start."""
    layer = MLA(16, MLA.Options(**{**SIZES, **options}))
    initialise(layer, InitConfig(), n_layers=1)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=rng)
    return layer.double().requires_grad_(False)


def inputs(t: int) -> torch.Tensor:
    return torch.randn(2, t, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def rms(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def rotated(x, t, theta=10000.0):
    """Neighbouring pairs of x (... r) as complex numbers, turned by the angles of position t."""
    r = x.shape[-1]
    # The layer's table of angles is float32 (`ops.rope`), and so must these be.
    angles = (t * theta ** (-torch.arange(0, r, 2, dtype=torch.float32) / r)).double()
    turned = torch.view_as_complex(x.unflatten(-1, (r // 2, 2)).contiguous()) * torch.polar(
        torch.ones_like(angles), angles
    )
    return torch.view_as_real(turned).flatten(-2)


@pytest.mark.parametrize(
    "options", [{}, {"q_rank": 7, "bias": True, "norm_eps": 1e-2, "scale": 0.3}, {"rope": None}]
)
def test_mla_is_the_papers(options):
    layer, t = made(**options), 9
    o, p, x = layer, dict(layer.named_parameters()), inputs(t)
    turn = rotated if options.get("rope", {}) is not None else lambda x, t: x
    eps, scale = options.get("norm_eps", 1e-6), options.get("scale", 10**-0.5)
    zero = torch.zeros(1, dtype=torch.float64)
    queries, keys, values = [], [], []
    for i in range(t):
        if "q_rank" in options:
            q = x[:, i] @ p["q_a_proj.weight"].T + p["q_a_proj.bias"]
            q = rms(q, p["q_a_norm.weight"], eps) @ p["q_b_proj.weight"].T
        else:
            q = x[:, i] @ p["q_proj.weight"].T
        q = q.view(2, o.n_heads, -1)
        queries.append(torch.cat((q[..., :6], turn(q[..., 6:], i)), -1))
        latent = x[:, i] @ p["kv_a_proj.weight"].T + p.get("kv_a_proj.bias", zero)
        c, shared = rms(latent[:, :10], p["kv_a_norm.weight"], eps), turn(latent[:, 10:], i)
        kv = (c @ p["kv_b_proj.weight"].T).view(2, o.n_heads, -1)
        keys.append(torch.cat((kv[..., :6], shared[:, None].expand(-1, o.n_heads, -1)), -1))
        values.append(kv[..., 6:])
    q, k, v = (torch.stack(m, 2) for m in (queries, keys, values))  # (b h t .)
    scores = (q @ k.mT * scale).masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
    y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    expected = y @ p["o_proj.weight"].T + p.get("o_proj.bias", zero)
    actual, _ = layer(x, None, Context(torch.arange(t).expand(2, t)))
    # float32's cosines, of libraries that round them in their own ways
    near = EXACT if turn is not rotated else 4 * torch.finfo(torch.float32).eps
    assert (actual - expected).abs().max() <= near * expected.abs().max()


def read(layer: MLA, x: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """Outputs of reading x in pieces."""
    state, ys, at = layer.empty_state(len(x)), [], 0
    for size in sizes:
        positions = torch.arange(at, at + size).expand(len(x), size)
        y, state = layer(x[:, at : at + size], state, Context(positions))
        ys.append(y)
        at += size
    return torch.cat(ys, 1)


def test_both_ways_to_look_are_one(monkeypatch):
    layer, x = made(), inputs(12)
    absorbed = read(layer, x, [5, 1, 4, 1, 1])
    monkeypatch.setattr(MLA, "absorbed", MLA.expanded)
    expanded = read(layer, x, [5, 1, 4, 1, 1])
    assert not torch.equal(absorbed, expanded)
    assert (absorbed - expanded).abs().max() <= EXACT * expanded.abs().max()


def test_a_matrix_that_something_is_added_to_is_called(monkeypatch):
    class Added(nn.Module):
        """What an adapter does: it holds the matrix and adds something to its output."""

        def __init__(self, linear):
            super().__init__()
            self.linear, self.weight = linear, linear.weight

        def forward(self, x, ctx):
            return self.linear(x, ctx) + 1.0

    layer, x = made(), inputs(6)
    layer.kv_b_proj = Added(layer.kv_b_proj)
    whole, _ = layer(x, None, Context(torch.arange(6).expand(2, 6)))
    assert (read(layer, x, [4, 1, 1]) - whole).abs().max() <= EXACT * whole.abs().max()


def test_the_memory_is_the_latent():
    layer = MLA(16, MLA.Options(**SIZES)).float()
    state = layer.empty_state(1, max_tokens=100)
    # kv_rank + rope_dim numbers of 4 bytes, and the document's number of 4, whatever the number of heads
    assert state.nbytes == 100 * (4 * (10 + 4) + 4)


@pytest.mark.parametrize("given", [{}, {"mscale_all_dim": 0.8}, {"mscale_all_dim": 0.8, "mscale": 1.2}])
def test_yarn_scales_the_scores_as_deepseek_s(given):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import yarn_apply_mscale

    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, **given}
    layer = made(rope={"scaling": scaling, "max_positions": 256})
    assert layer.scale == pytest.approx(yarn_apply_mscale(scaling, 10**-0.5), rel=1e-15)
    # A factor that is left out is the ratio of the lengths.
    assert made(rope={"scaling": {**scaling, "factor": None}, "max_positions": 256}).scale == layer.scale


@pytest.mark.parametrize(
    ("options", "key"),
    [({"rope_dim": 5}, "rope_dim"), ({"rope": {"fraction": 0.5}}, "rope.fraction")],
)
def test_what_cannot_be_rotated_is_refused(options, key):
    problems = dict(MLA.Options(**{**SIZES, **options}).check(16))
    assert list(problems) == [key]
