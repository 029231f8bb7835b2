"""The gated delta rule: a matrix state that forgets by one factor per token, and is corrected, not added to.

Yang et al. 2024, arXiv:2412.06464 (Gated DeltaNet), eq. 10; without the decay: Schlag et al. 2021,
arXiv:2102.11174, and Yang et al. 2024, arXiv:2406.06484. This file: the signature and the reference. The fast
form is in `delta_rule_torch.py`.
"""

import torch
from torch import Tensor

from hybrid_lm.ops.backend import define
from hybrid_lm.ops.delta_rule_torch import delta_rule_torch
from hybrid_lm.ops.precision import full_precision, wide


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """S = exp(g_t) S_{t-1};  S_t = S + k_t beta_t (v_t - S^T k_t)^T;  y_t = scale S_t^T q_t, in every head.

    q, k       (b t g k): queries and keys. A key of length 1 and a beta in [0, 2] keep the state bounded
    v          (b t h v), h a multiple of g: h / g consecutive heads share one query and key
    log_decay  (b t h) g_t <= 0: the natural log of the factor on the state
    beta       (b t h): how much of what the state says of k_t is replaced by v_t; 1: all of it
    scale      of the queries; k^-1/2 where it is None
    initial    (b h k v) state before the first token; zeros where it is None
    reset      (b t) bool: the decay into a true token is 0, so nothing that stands before it reaches it
    chunk      tokens that the fast form handles at once; any value gives the same result up to rounding
    donate     `initial` is not used again: without gradients, its memory may become the final state's
    Returns y (b t h v) in v's dtype and the final state (b h k v) in float32 (float64 for float64 v), in
    which all is computed.
    """
    run = _delta_rule(backend, v)
    return run(
        q, k, v, log_decay, beta, scale=scale, initial=initial, reset=reset, chunk=chunk, donate=donate
    )


@full_precision
def _delta_rule_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial: Tensor | None = None,
    reset: Tensor | None = None,
    chunk: int = 64,
    donate: bool = False,
) -> tuple[Tensor, Tensor]:
    dtype, wide_dtype = v.dtype, wide(v)
    q, k, v, log_decay, beta = (x.to(wide_dtype) for x in (q, k, v, log_decay, beta))
    b, _, h, p = v.shape
    # 1. every head gets its group's query and key
    q, k = (x.repeat_interleave(h // x.shape[2], dim=2) for x in (q, k))  # (b t h k)
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    S = v.new_zeros(b, h, k.shape[-1], p) if initial is None else initial.to(wide_dtype)
    ys = []
    for i in range(v.shape[1]):
        # 2. forget; everything where a document starts
        a = log_decay[:, i].exp()  # (b h)
        if reset is not None:
            a = torch.where(reset[:, i, None], 0, a)
        S = a[..., None, None] * S
        # 3. what the state says of this key, and by how much that is wrong
        delta = beta[:, i, :, None] * (v[:, i] - torch.einsum("bhkv,bhk->bhv", S, k[:, i]))
        # 4. correct it and read out
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, i], delta)
        ys.append(torch.einsum("bhkv,bhk->bhv", S, q[:, i]))
    return torch.stack(ys, 1).to(dtype), S


_delta_rule = define("delta_rule", reference=_delta_rule_reference, torch=delta_rule_torch)
