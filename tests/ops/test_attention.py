"""Attention: blocks of queries, ALiBi's slopes, padding, dropout, memory."""

import importlib

import pytest
import torch
from torch import Tensor

from hybrid_lm import ops

module = importlib.import_module("hybrid_lm.ops.attention")
EXACT = 2**12 * torch.finfo(torch.float64).eps  # no sum here has more than 2**12 terms, each rounded once


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def qkv(t: int, s: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(
        torch.randn(2, n, h, 8, dtype=dtype, requires_grad=True) for n, h in ((t, 4), (s, 2), (s, 2))
    )


@pytest.mark.parametrize(("t", "s"), [(13, 13), (13, 20)])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("kind", ["plain", "docs", "alibi", "softcap", "sinks"])
def test_blocks_of_queries_equal_the_reference(
    monkeypatch: pytest.MonkeyPatch, t: int, s: int, window: int | None, kind: str
) -> None:
    monkeypatch.setattr(module, "BLOCK", 4)
    docs = torch.randint(0, 3, (2, s)).sort(1).values
    options = {
        "plain": {},
        "docs": {"q_docs": docs[:, s - t :], "k_docs": docs},
        "alibi": {"alibi_slopes": ops.alibi_slopes(4)},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": torch.randn(4, dtype=torch.float64, requires_grad=True)},
    }[kind]
    leaves = (*qkv(t, s), *(options[key] for key in ("sinks",) if key in options))
    results = []
    for backend in ("reference", "torch"):
        y = ops.attention(*leaves[:3], window=window, backend=backend, **options)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    for expected, actual in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= EXACT * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("n_heads", [1, 2, 3, 6, 8, 12, 20, 32, 40])
def test_alibi_slopes_equal_mpt_s(n_heads: int) -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    bias = build_mpt_alibi_tensor(n_heads, 2)  # (1 h 1 2): -slope for the key one back, 0 for the last
    ours = ops.alibi_slopes(n_heads)
    # MPT's order differs only where its list is cut; the bias is what counts
    assert torch.allclose(
        -ours, bias.flatten(0, -2)[:, 0].view(-1), rtol=4 * torch.finfo(torch.float32).eps, atol=0
    )


def test_alibi_bias_equals_mpt_s() -> None:
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    t, h = 6, 3
    q, k, v = (torch.randn(1, t, h, 8) for _ in range(3))
    bias = build_mpt_alibi_tensor(h, t).view(h, 1, t)
    scores = torch.einsum("bthp,bshp->bhts", q, k) * 8**-0.5 + bias
    future = torch.ones(t, t, dtype=torch.bool).triu(1)
    expected = torch.einsum("bhts,bshp->bthp", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    actual = ops.attention(q, k, v, alibi_slopes=ops.alibi_slopes(h))
    # softmax forgets a constant per query: a bias by distance equals MPT's by key index. 2**6 rounded terms
    assert (actual - expected).abs().max() <= 2**6 * torch.finfo(torch.float32).eps * expected.abs().max()


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_a_sink_takes_the_weight_that_it_is_worth(backend: str) -> None:
    q, k, v = qkv(7, 7)
    sinks = torch.tensor([-3.0, 0.0, 1.0, 5.0], dtype=torch.float64)
    y = ops.attention(q, k, v, sinks=sinks, backend=backend)
    # equation of gpt-oss: the part of the weights that the keys keep is sum exp(score) / (that + exp(sink))
    scores = torch.einsum("bthp,bshp->bths", q, k.repeat_interleave(2, 2)) * 8**-0.5
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)[:, None]
    total = scores.masked_fill(future, -torch.inf).exp().sum(-1)
    kept = (total / (total + sinks.exp()))[..., None]
    assert (y - ops.attention(q, k, v, backend=backend) * kept).abs().max() <= EXACT


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_is_finite_and_alone(backend: str, softcap: float | None) -> None:
    q, k, v = qkv(6, 6)
    docs = torch.tensor([[0, 0, 0, 1, 1, 2], [0, 0, 0, 0, 0, 0]])
    y = ops.attention(q, k, v, q_docs=docs, k_docs=docs, softcap=softcap, backend=backend)
    grads = torch.autograd.grad(y.sum(), (q, k, v))
    assert all(m.isfinite().all() for m in (y, *grads))
    alone = ops.attention(q[:1, 3:5], k[:1, 3:5], v[:1, 3:5], softcap=softcap, backend=backend)
    assert (y[:1, 3:5] - alone).abs().max() <= EXACT


@pytest.mark.parametrize("kind", ["plain", "docs", "softcap", "alibi", "sinks"])
def test_bf16_error_is_at_most_twice_plain_pytorch_s(kind: str) -> None:
    t = 40
    q, k, v = (m.detach().bfloat16() for m in qkv(t, t))
    docs = (torch.arange(t) // 17 + 1).expand(2, -1)
    slopes, sinks = ops.alibi_slopes(4), torch.randn(4).bfloat16()
    options = {
        "plain": {},
        "docs": {"q_docs": docs, "k_docs": docs},
        "softcap": {"softcap": 2.0},
        "alibi": {"alibi_slopes": slopes},
        "sinks": {"sinks": sinks},
    }[kind]
    exact = ops.attention(q.double(), k.double(), v.double(), backend="reference", **options)
    # the formula with every step rounded to bf16
    scores = torch.einsum("bthp,bshp->bhts", q, k.repeat_interleave(2, 2)) * 8**-0.5
    distance = torch.arange(t)[:, None] - torch.arange(t)
    scores = 2.0 * (scores / 2.0).tanh() if kind == "softcap" else scores
    scores = scores - (slopes[:, None, None] * distance).bfloat16() if kind == "alibi" else scores
    hidden = (distance < 0) | ((docs[0][:, None] != docs[0]) if kind == "docs" else False)
    scores = scores.masked_fill(hidden, -torch.inf)
    if kind == "sinks":
        scores = torch.cat((scores, sinks[:, None, None].expand(2, 4, t, 1)), -1)
    weights = scores.softmax(-1)[..., :t]
    plain = torch.einsum("bhts,bshp->bthp", weights, v.repeat_interleave(2, 2))
    y = ops.attention(q, k, v, backend="torch", **options)
    assert y.dtype == torch.bfloat16
    # the bound of FlashAttention's own tests
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2.0, 4.0, 4, dtype=torch.float64)])
def test_token_by_token_equals_the_whole(sinks: Tensor | None) -> None:
    q, k, v = qkv(9, 9)
    for window in (None, 1, 4):
        options = {"window": window, "sinks": sinks}
        whole = ops.attention(q, k, v, **options)
        ys = [ops.attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], **options) for i in range(9)]
        assert (torch.cat(ys, 1) - whole).abs().max() <= EXACT


def test_dropout_keeps_the_mean_and_drops() -> None:
    q, k, _ = qkv(8, 8)
    v = torch.ones(2, 8, 2, 8, dtype=torch.float64)
    ys = torch.stack([ops.attention(q, k, v, dropout_p=0.5) for _ in range(400)])
    assert ys.std(0).max() > 0.1
    # a weight w becomes 0 or 2 w: the variance of a sum is sum w^2 <= 1, and 5 sigma of 400 draws is 0.25
    assert (ys.mean(0) - 1).abs().max() <= 5 / 400**0.5


@pytest.mark.parametrize("kind", ["docs", "softcap", "window", "sinks", "narrow values"])
def test_memory_kept_for_backward_is_linear(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(module, "BLOCK", 16)

    def kept(t: int) -> int:
        docs = torch.ones(2, t, dtype=torch.int32)
        options = {
            "docs": {"q_docs": docs, "k_docs": docs},
            "softcap": {"softcap": 2.0},
            "window": {"window": 20},
            "sinks": {"sinks": torch.zeros(4)},
            "narrow values": {},
        }[kind]
        q, k, v = qkv(t, t, torch.float32)
        v = v[..., :5] if kind == "narrow values" else v
        sizes: dict[int, int] = {}

        def pack(m: Tensor) -> Tensor:
            sizes[m.untyped_storage().data_ptr()] = m.untyped_storage().nbytes()
            return m

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda m: m):
            y = ops.attention(q, k, v, **options)
        assert y.shape[1] == t
        return sum(sizes.values())

    assert kept(512) <= 4 * kept(128)
