"""Causal softmax attention with grouped heads, documents, a window, ALiBi, a logit softcap and sinks.

Attention: Vaswani et al. 2017, arXiv:1706.03762. Grouped heads: Ainslie et al. 2023, arXiv:2305.13245.
ALiBi: Press et al. 2021, arXiv:2108.12409. Softcap: Gemma 2, arXiv:2408.00118.
Sinks: gpt-oss, arXiv:2508.10925, after Xiao et al. 2023, arXiv:2309.17453.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.precision import wide

# Queries that share one exact mask: memory is BLOCK * keys per head, whatever the length.
BLOCK = 256


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale * q k^T + bias, over the keys that a query may see) v.

    q             (b t h p)
    k, v          (b s m p), (b s m pv); s >= t, h a multiple of m: h / m consecutive query heads share a key
                  head. The last query stands at the last key: query i has the index s - t + i among the
                  keys.
    scale         of the dot products; p ** -0.5 where it is None
    window        tokens that a query sees, itself included; None for all
    softcap       c: the scaled scores become c * tanh(score / c), before bias and mask
    alibi_slopes  (h) float: adds -slope * (distance back to the key, in keys)
    sinks         (h) float: one more score per head, of nothing: exp(sink) joins the softmax's denominator,
                  so that the weights of the keys sum to less than 1
    q_docs        (b t) int, k_docs (b s) int, both or neither: a query sees only keys of its own document.
                  Padding is document 0 and sees only padding, so that its output is finite.
    dropout_p     probability that a weight is dropped
    Returns (b t h pv) in q's dtype.
    """
    assert (q_docs is None) == (k_docs is None), "documents are given for queries and keys, or for neither"
    run = _attention(backend, q)
    return run(
        q, k, v,
        scale=scale, window=window, softcap=softcap, alibi_slopes=alibi_slopes, sinks=sinks,
        q_docs=q_docs, k_docs=k_docs, dropout_p=dropout_p,
    )  # fmt: skip


def alibi_slopes(n_heads: int) -> Tensor:
    """The slopes (n_heads) of ALiBi: 2^(-8 i / n), i = 1..n, for a power of two; else those of the next
    lower power of two, followed by every second one of twice that number (the authors' code, and MPT)."""
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)]
    return torch.tensor(slopes + between[: n_heads - power], dtype=torch.float32)


def _attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    dtype = q.dtype
    q, k, v = (m.to(wide(q)) for m in (q, k, v))
    t, s = q.shape[1], k.shape[1]
    # 1. every query head gets its key head
    k, v = (m.repeat_interleave(q.shape[2] // m.shape[2], dim=2) for m in (k, v))
    # 2. scores, soft-capped
    scores = torch.einsum("bthp,bshp->bhts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    # 3. distances back from query to key: negative is the future
    distance = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)  # (t s)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[:, None, None] * distance
    # 4. who sees whom
    visible = distance >= 0
    visible = visible if window is None else visible & (distance < window)
    if q_docs is not None and k_docs is not None:
        visible = visible & (q_docs[:, :, None] == k_docs[:, None, :])[:, None]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    # 5. weights, of which a sink takes its part, and their average of the values
    scores = scores if sinks is None else _beside(scores, sinks)
    weights = F.dropout(scores.softmax(-1)[..., :s], dropout_p)
    return torch.einsum("bhts,bshp->bthp", weights, v).to(dtype)


def _attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    q_docs: Tensor | None = None,
    k_docs: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    t, s = q.shape[1], k.shape[1]
    window = None if window is None or window >= s else window
    if window is not None and t == 1 and k_docs is not None:
        k_docs = k_docs[:, s - window :]
    if window is not None and t == 1:
        k, v, s, window = k[:, s - window :], v[:, s - window :], window, None
    q, k, v = (m.transpose(1, 2) for m in (q, k, v))  # (b h t p)
    plain = window is None and softcap is None and alibi_slopes is None and sinks is None and q_docs is None
    if plain and dropout_p == 0.0 and t == 1:
        return _sdpa(q, k, v, scale).transpose(1, 2)
    if plain and dropout_p == 0.0 and t == s:
        return _sdpa(q, k, v, scale, is_causal=True).transpose(1, 2)
    blocks, learned = [], (q, k, v) if sinks is None else (q, k, v, sinks)
    for start in range(0, t, BLOCK):
        stop = min(start + BLOCK, t)
        # the keys that this block of queries can see
        first = 0 if window is None else max(s - t + start - window + 1, 0)
        last = s - t + stop
        arguments = (
            q[:, :, start:stop],
            k[:, :, first:last],
            v[:, :, first:last],
            None if q_docs is None else q_docs[:, start:stop],
            None if k_docs is None else k_docs[:, first:last],
            alibi_slopes,
            sinks,
            scale,
            window,
            softcap,
            dropout_p,
        )
        # Several blocks: the backward pass makes masks and scores again instead of keeping t * s of them.
        again = t > BLOCK and torch.is_grad_enabled() and any(m.requires_grad for m in learned)
        blocks.append(checkpoint(_block, *arguments, use_reentrant=False) if again else _block(*arguments))
    return torch.cat(blocks, 2).transpose(1, 2)


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_docs: Tensor | None,
    k_docs: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout_p: float,
) -> Tensor:
    """Attention of a block of queries (b h t p) to keys (b m s p) that end where the queries end, by an
    exact mask."""
    t, s = q.shape[2], k.shape[2]
    distance = torch.arange(s - t, s, device=q.device)[:, None] - torch.arange(s, device=q.device)
    visible = distance >= 0
    visible = visible if window is None else visible & (distance < window)
    if q_docs is not None and k_docs is not None:
        visible = visible & (q_docs[:, :, None] == k_docs[:, None, :])[:, None]  # (b 1 t s)
    bias = None if slopes is None else -slopes.to(q.dtype)[:, None, None] * distance.to(q.dtype)  # (h t s)
    if softcap is None:
        mask = visible if bias is None else bias.masked_fill(~visible, -math.inf)
        if sinks is not None:
            return _sdpa_with_sinks(q, k, v, scale, sinks, mask=mask, dropout_p=dropout_p)
        return _sdpa(q, k, v, scale, mask=mask, dropout_p=dropout_p)
    k, v = (m.repeat_interleave(q.shape[1] // m.shape[1], dim=1) for m in (k, v))
    scores = (q @ k.transpose(-1, -2)).to(wide(q)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = softcap * (scores / softcap).tanh()
    scores = scores if bias is None else scores + bias
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    scores = scores if sinks is None else _beside(scores, sinks)
    return F.dropout(scores.softmax(-1)[..., :s], dropout_p).to(v.dtype) @ v


def _beside(scores: Tensor, sinks: Tensor) -> Tensor:
    """The scores (b h t s) and each head's sink behind them, (b h t s+1)."""
    return torch.cat((scores, sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)), -1)


def _sdpa_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, sinks: Tensor, *, mask: Tensor, dropout_p: float
) -> Tensor:
    """One key more, whose score is the head's sink and whose value is zero.

    The score comes from one more channel, sink / scale in q and 1 in that key: sinks get their gradient
    through q, where one through the mask would cost PyTorch's fast kernels. There are seven more, of zeros:
    on GPUs these kernels want widths in steps of eight.
    """
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    sink = (sinks / factor).to(q.dtype)[:, None, None].expand(*q.shape[:-1], 1)
    q = torch.cat((q, F.pad(sink, (0, 7))), -1)
    key = F.pad(k.new_ones(*k.shape[:2], 1, 1), (k.shape[-1], 7))
    k = torch.cat((key, F.pad(k, (0, 8))), 2)
    v = F.pad(v, (0, 0, 1, 0))
    # Everyone sees it: true in a mask, 0 in a bias.
    mask = F.pad(mask, (1, 0), value=float(mask.dtype == torch.bool))
    return _sdpa(q, k, v, factor, mask=mask, dropout_p=dropout_p)


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    mask: Tensor | None = None,
    is_causal: bool = False,
    dropout_p: float = 0.0,
) -> Tensor:
    width, values = q.shape[-1], v.shape[-1]
    if width != values:
        # The fast kernels want all heads equally wide, and the other keeps t * s scores: zeros in channels
        # that are not there change nothing. What is wide enough is left alone, for under torch.compile a pad
        # of nothing has other strides than it is thought to have.
        scale = width**-0.5 if scale is None else scale
        if width > values:
            v = F.pad(v, (0, width - values))
        else:
            q, k = (F.pad(m, (0, values - width)) for m in (q, k))
        y = _sdpa(q, k, v, scale, mask=mask, is_causal=is_causal, dropout_p=dropout_p)
        return y[..., :values]
    # A branch, not an expression: with dynamic shapes a comparison is no bool until it is branched on.
    shared = False
    if q.shape[1] != k.shape[1]:
        shared = True
    if shared and q.shape[2] == 1 and not is_causal:
        return _one_query(q, k, v, scale, mask, dropout_p)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=shared
    )


def _one_query(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, dropout_p: float
) -> Tensor:
    """A single query (b h 1 p) whose heads share keys (b m s p): the h / m heads of a key are so many queries
    of one head, and no key is copied for each."""
    heads = q.shape[1]
    if mask is not None and mask.dim() > 2 and mask.shape[-3] == heads:
        mask = mask.unflatten(-3, (k.shape[1], -1)).squeeze(-2)  # (... m h/m s)
    q = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # (b m h/m p)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return y.flatten(1, 2).unsqueeze(2)


_attention = define("attention", reference=_attention_reference, torch=_attention_torch)
