"""What others compute with, each on the inputs of our ops and in its own layout.

The transposes that a peer's layer pays for anyway are inside. transformers is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_lm.bench.measure import Candidate

Inputs = dict[str, Tensor]
Op = Callable[[Inputs], Tensor]


def compiled(run: Op) -> Op:
    """`run` under torch.compile, for one shape."""
    return torch.compile(run, dynamic=False)  # pyright: ignore[reportReturnType]


def transformers_scan(**how: bool) -> Op:
    """The scan of transformers' Mamba, which is channels first."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    quiet()

    def run(v: Inputs) -> Tensor:
        x, dt, z, B, C = (v[k].transpose(1, 2) for k in ("x", "dt", "z", "B", "C"))
        y = mamba_selective_scan(x, dt, v["A"], B, C, v["D"], z, v["dt_bias"], delta_softplus=True, **how)
        return y.transpose(1, 2)

    return run


def mambapy_scan() -> Op:
    """The layer of mambapy: its `selective_scan` and what stands around it."""
    from mambapy.mamba import MambaBlock

    # The method reads nothing of its object.
    block = MambaBlock.__new__(MambaBlock)

    def run(v: Inputs) -> Tensor:
        dt = F.softplus(v["dt"] + v["dt_bias"])
        y = block.selective_scan(v["x"], dt, v["A"], v["B"], v["C"], v["D"])
        return y * F.silu(v["z"])

    return run


def transformers_ssd(chunk: int) -> Op:
    """The chunked form of transformers' Mamba-2."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    quiet()

    def run(v: Inputs) -> Tensor:
        x, dt, A, B, C = (v[k] for k in ("x", "dt", "A", "B", "C"))
        return mamba2_chunk_scan(
            x, dt, A, B, C, chunk_size=chunk, D=v["D"], dt_bias=v["dt_bias"], dt_softplus=True
        )

    return run


def listing_1(v: Inputs, chunk: int = 64) -> Tensor:
    """The minimal method: sums over segments as a matrix, four einsums. Dao & Gu 2024, arXiv:2405.21060,
    listing 1; mamba2-minimal computes this."""
    t, h = v["x"].shape[1:3]
    dt = F.softplus(v["dt"] + v["dt_bias"])  # (b t h)
    # One group is broadcast over the heads.
    B, C = (u if u.shape[2] == 1 else u.repeat_interleave(h // u.shape[2], 2) for u in (v["B"], v["C"]))
    # 1. chunks
    x, a, B, C = (chunks(u, chunk) for u in (v["x"] * dt[..., None], dt * v["A"], B, C))
    a = a.permute(0, 3, 1, 2)  # (b h c q)
    total = a.cumsum(-1)
    # 2. inside a chunk: attention with the decays between two tokens as its mask
    decay = segment_sums(a).exp()  # (b h c q s)
    y = torch.einsum("bcqhn,bcshn,bhcqs,bcshp->bcqhp", C, B, decay, x)
    # 3. what every chunk adds to the state
    to_end = (total[..., -1:] - total).exp()
    states = torch.einsum("bcshn,bhcs,bcshp->bchpn", B, to_end, x)
    # 4. the state before every chunk
    between = segment_sums(F.pad(total[..., -1], (1, 0))).exp()[:, :, :-1]  # (b h c+1 c+1), no final state
    states = torch.einsum(
        "bhcz,bzhpn->bchpn", between, torch.cat((torch.zeros_like(states[:, :1]), states), 1)
    )
    # 5. its part of the output
    y = y + torch.einsum("bcqhn,bchpn,bhcq->bcqhp", C, states, total.exp())
    return y.flatten(1, 2)[:, :t] + v["D"][:, None] * v["x"]


def chunks(u: Tensor, chunk: int) -> Tensor:
    """u (b t ...) -> (b c q ...): zeros fill up the last chunk."""
    missing = -u.shape[1] % chunk
    if missing:
        u = torch.cat((u, u.new_zeros(u.shape[0], missing, *u.shape[2:])), 1)
    return u.unflatten(1, (-1, chunk))


def segment_sums(a: Tensor) -> Tensor:
    """a (... q) -> (... q s): the sum of a over s+1..q, minus infinity where s is later than q."""
    q = a.shape[-1]
    lower = torch.ones(q, q, dtype=torch.bool, device=a.device).tril()
    columns = a[..., None].expand(*a.shape, q).masked_fill(~lower.tril(-1), 0.0)
    return columns.cumsum(-2).masked_fill(~lower, -torch.inf)


def transformers_conv() -> Op:
    """F.conv1d over as many groups as channels, as transformers' Mamba calls it; channels first."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    quiet()
    return lambda v: causal_conv1d_fn(
        v["x"].transpose(1, 2), v["weight"], v["bias"], activation="silu"
    ).transpose(1, 2)


def shifted_adds(v: Inputs) -> Tensor:
    """The convolution as w products of shifted inputs."""
    (t, w), x = (v["x"].shape[1], v["weight"].shape[1]), F.pad(v["x"], (0, 0, v["weight"].shape[1] - 1, 0))
    return F.silu(sum((x[:, k : k + t] * v["weight"][:, k] for k in range(w)), v["bias"]))


def sdpa(v: Inputs) -> Tensor:
    """PyTorch's attention, heads before tokens."""
    q, k, u = (v[name].transpose(1, 2) for name in "qkv")
    return F.scaled_dot_product_attention(q, k, u, is_causal=True).transpose(1, 2)


def transformers_norm() -> Op:
    """The gated norm of transformers' Mamba-2."""
    from transformers.models.mamba2.modeling_mamba2 import MambaRMSNormGated

    def run(v: Inputs) -> Tensor:
        d = v["weight"].shape[0]
        norm = MambaRMSNormGated(d, d, eps=1e-5)
        return torch.func.functional_call(norm, {"weight": v["weight"]}, (v["y"], v["gate"]))

    return run


def quiet() -> None:
    """No advice from transformers to install CUDA kernels."""
    from transformers.utils import logging

    logging.set_verbosity_error()


HF = ("transformers",)
SCAN = (
    Candidate("transformers_mambapy", lambda: transformers_scan(use_mambapy=True), packages=(*HF, "mambapy")),
    # The backward pass of each step fills a gradient of full length: 10 s at 256 tokens, 51 s at 512.
    Candidate("transformers", transformers_scan, packages=HF, max_length=512, rounds=1),
    Candidate(
        "compile_transformers",
        lambda: compiled(transformers_scan(use_associative_scan=True)),
        packages=HF,
        compiled=True,
    ),
    Candidate("mambapy", mambapy_scan, packages=("mambapy",)),
)
SSD = (
    Candidate("transformers_chunk64", lambda: transformers_ssd(64), packages=HF),
    Candidate("transformers_chunk256", lambda: transformers_ssd(256), packages=HF),
    Candidate("listing_1", lambda: listing_1),
    Candidate("compile_listing_1", lambda: compiled(listing_1), compiled=True),
)
CONV = (
    Candidate("transformers", transformers_conv, packages=HF),
    Candidate("shifted_adds", lambda: shifted_adds),
    Candidate("compile_shifted_adds", lambda: compiled(shifted_adds), compiled=True),
)
NORM = (Candidate("transformers", transformers_norm, packages=HF),)
ATTENTION = (Candidate("sdpa", lambda: sdpa),)
